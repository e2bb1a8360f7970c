"""The code that goes with a hybrid: complete, free of our packages, and the same model bit for bit."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hub.code import ENTRY, auto_map, code_files
from distill.hub.package import package
from distill.hub.sources import REQUIRED, Copy
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import hybridize
from distill.mixers import available, set_kernels
from distill.teacher import load_model, trust_code

Make = Callable[..., Any]
IDS = torch.randint(5, 56, (2, 23), generator=torch.Generator().manual_seed(0))


def case(model: Any, folder: Path, kernels: str, choice: str | None = None) -> dict[str, Any]:
    """What the model in a folder gives with these kernels (by ``choice``, what stands in for them here)."""
    set_kernels(model, choice or kernels)
    with torch.no_grad():
        logits, text = model(IDS).logits, model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return {"folder": str(folder), "kernels": kernels, "ids": IDS, "logits": logits, "text": text}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, make_model: Make, tokenizer: Any) -> dict[str, Any]:
    """What a process without our packages found: hybrids of every family, each with every mixer."""
    folder = tmp_path_factory.mktemp("code")
    cases: dict[str, Any] = {}
    for family in FAMILIES:
        for mixer in available():
            model = hybridize(make_model(family), [mixer, "attention", "attention", mixer], MixerConfig(), seed=0)
            name = f"{family}-{mixer}"
            model.save_pretrained(folder / "checkpoints" / name)
            tokenizer.save_pretrained(folder / "checkpoints" / name)
            target = package(folder / "checkpoints" / name, folder / name, code=True)
            cases[name] = case(model, target, "reference")
            if name == "llama-mamba1":
                cases["compiled"] = case(model, target, "auto")
            if name == "mistral-mamba1":  # the choice of a kernel is remembered in a folder's own modules
                cases["plain"] = case(model, target, "auto", "reference")
    commit, cached = "0" * 40, folder / "hub/hub/models--owner--name"
    shutil.copytree(folder / "qwen3-mamba1", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    torch.save(cases, folder / "cases.pt")
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("without_us.py")
    command = [sys.executable, "-I", str(script), str(folder / "cases.pt"), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": str(folder)}


def test_our_packages_were_not_there(found: dict[str, Any]) -> None:
    assert found["importable"] == [] and found["loaded of ours"] == []


def test_every_family_and_mixer_is_the_same_bit_for_bit(found: dict[str, Any]) -> None:
    assert len(found["same"]) == len(FAMILIES) * len(available()) + 1
    assert all(found["same"].values()), found["same"]


def test_on_a_hub_it_is_the_same(found: dict[str, Any]) -> None:
    """In the hub's cache; from there transformers takes the files one by one, as it does when it downloads them."""
    assert found["of the hub"]


def test_without_numba_it_runs_in_plain_pytorch(found: dict[str, Any]) -> None:
    assert found["without numba"]


def test_saved_again_it_brings_its_code_along(found: dict[str, Any]) -> None:
    assert found["saved"] and found["class"] == ENTRY
    packaged, saved = Path(found["folder"], "llama-mamba1"), Path(found["folder"], "saved")
    names = {path.name for path in packaged.glob("*.py")}
    assert names and {path.name for path in saved.glob("*.py")} == names
    assert json.loads((saved / "config.json").read_text())["auto_map"] == auto_map("llama")


def test_a_pipeline_takes_it(found: dict[str, Any]) -> None:
    assert found["pipeline"].startswith("add 1+1") and len(found["pipeline"]) > len("add 1+1")


def test_with_our_package_our_own_code_is_taken(found: dict[str, Any], tmp_path: Path) -> None:
    """The code beside the weights is not run, consent or not, nor named by what is saved from here."""
    folder = Path(found["folder"], "qwen3-mamba2")
    for allowed in (False, True):
        trust_code(str(folder), allowed)
        model = load_model(str(folder))
        assert type(model).__module__ == "distill.hybrid.model"
    trust_code(str(folder), False)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_saved_from_our_own_classes_it_asks_for_no_code(found: dict[str, Any], tmp_path: Path) -> None:
    """As the card's snippet loads it; what names a repository stays, since the files are there."""
    folder = str(Path(found["folder"], "llama-mamba1"))
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())
    there = {"AutoConfig": "owner/name--modeling_hybrid.HybridLlamaConfig"}
    config = AutoConfig.from_pretrained(tmp_path / "saved", auto_map=there)
    assert config.to_dict()["auto_map"] == there


def test_code_of_another_architecture_is_still_refused(found: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="brings Python code of its own"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("mixers", [["mamba1"], ["mamba2"], ["mamba1", "mamba2"]])
def test_the_files_need_nothing_of_ours_and_no_option(mixers: list[str]) -> None:
    files = code_files("llama", mixers)
    assert f"{ENTRY}.py" in files
    for name, text in files.items():
        tree = ast.parse(text)
        tried = {id(node) for each in ast.walk(tree) if isinstance(each, ast.Try) for node in ast.walk(each)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module is None or f"{node.module}.py" in files, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in tried:
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert {str(each).split(".")[0] for each in modules} <= REQUIRED, f"{name}: {ast.unparse(node)}"
    assert "omegaconf" not in "".join(files.values())


def test_only_the_mixers_that_a_model_has_go_along() -> None:
    assert "distill_mixers_mamba2.py" not in code_files("llama", ["attention", "mamba1"])


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """``copy({"ops/scan.py": text, ...}, module, *names, texts=())``: the files copied from a package of these."""

    def make(sources: dict[str, str], module: str, *names: str, texts: tuple[str, ...] = ()) -> dict[str, str]:
        for name, text in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return Copy(f"distill.{module}", names, texts, tmp_path).files()

    return make


def run(files: dict[str, str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import one of the files from a package that holds them all."""
    folder = tmp_path / "copied" / f"copied_{abs(hash(tuple(files.items())))}"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for file, text in files.items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    return __import__(f"{folder.name}.{name}", fromlist=["_"])


def test_what_is_not_needed_stays_behind(copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "a.py": '"""Text."""\n\nimport json\nimport os\n\nfrom distill.b import one, two\n\n'
        '# of f\nX = one\n"""Of X."""\n\n\n'
        "def f():\n    return X, os.sep\n\n\ndef g():\n    return two, json\n",
        "b.py": "one = 1\ntwo = 2\nfrom distill.c import three\n",
        "c.py": "three = 3\n",
    }
    files = copy(sources, "a", "f")
    assert sorted(files) == ["distill_a.py", "distill_b.py"]
    assert "# of f" in files["distill_a.py"] and '"""Of X."""' in files["distill_a.py"]
    assert "json" not in files["distill_a.py"] and "def g" not in files["distill_a.py"]
    assert "two" not in files["distill_b.py"] and "three" not in files["distill_b.py"]
    assert run(files, "distill_a", tmp_path, monkeypatch).f() == (1, os.sep)


def test_what_acts_when_it_is_imported_goes_along(copy: Any) -> None:
    text = "import atexit\nKEPT = []\nKEPT.append(1)\n\n\n@atexit.register\ndef at_end():\n    pass\n\n\nx = 1\ny = 2\n"
    (copied,) = copy({"a.py": text}, "a", "x").values()
    assert "KEPT.append(1)" in copied and "def at_end" in copied and "y = 2" not in copied


def test_imports_by_name_are_followed_and_named_for_transformers(
    copy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "ops/__init__.py": "",
        "ops/pick.py": "import importlib\n\n\ndef pick(operator, kernel):\n"
        '    return importlib.import_module(f"distill.ops.{operator}_{kernel}")\n',
        "ops/scan.py": 'from distill.ops.pick import pick\n\nKERNELS = ("cpu", "cuda")\n\n\n'
        'def scan(kernel):\n    assert kernel in KERNELS\n    return pick("scan", kernel).scan()\n',
        "ops/scan_cpu.py": "from distill.ops import tables as t\n\n\ndef scan():\n    return t.VALUE\n",
        "ops/scan_cuda.py": "def scan():\n    import nowhere_to_be_had\n    return nowhere_to_be_had\n",
        "ops/scan_other.py": "",
        "ops/tables.py": "VALUE = 7\n",
        "kinds/__init__.py": "import importlib\nimport pkgutil\n\n\ndef available():\n"
        "    return [each.name for each in pkgutil.iter_modules(__path__)]\n\n\ndef kind(name):\n"
        '    return importlib.import_module(f"{__name__}.{name}")\n',
        "kinds/red.py": "from distill.ops.scan import scan\n",
        "kinds/blue.py": "",
    }
    files = copy(sources, "kinds", "available", "kind", texts=("red",))
    assert sorted(files) == [
        "distill_kinds.py", "distill_kinds_red.py", "distill_ops_pick.py", "distill_ops_scan.py",
        "distill_ops_scan_cpu.py", "distill_ops_scan_cuda.py", "distill_ops_tables.py",
    ]  # fmt: skip
    from transformers.dynamic_module_utils import check_imports, get_relative_import_files

    kinds = run(files, "distill_kinds", tmp_path, monkeypatch)
    assert kinds.available() == ["red"]
    assert kinds.kind("red").scan("cpu") == 7
    reached = {Path(name).name for name in get_relative_import_files(kinds.__file__)}
    assert reached == files.keys() - {"distill_kinds.py"}, "what transformers copies"
    for name in files:
        check_imports(Path(kinds.__file__).with_name(name))  # what is not installed must not be asked for


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import distill.b\nx = distill.b", "write 'from distill.x import y'"),
        ("from distill.b import nothing\nx = nothing", "distill.b has no nothing"),
        ("import importlib\nx = importlib.import_module(f())", "cannot follow importlib.import_module"),
    ],
)
def test_an_import_that_cannot_be_followed_is_named(copy: Any, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy({"a.py": f"f = 2\n{line}\n", "b.py": ""}, "a", "x")


@pytest.mark.slow
def test_lm_evals_own_command_line_takes_it(found: dict[str, Any], tmp_path: Path) -> None:
    """With ``trust_remote_code=True``, in a process that does not know our package."""
    task = {
        "task": "two_sums", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.json")},
        "output_type": "multiple_choice", "test_split": "train", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
    }  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([{"q": "add 1+1=", "c": ["2", "3"], "a": 0}] * 4))
    (tmp_path / "two_sums.yaml").write_text(json.dumps(task))
    start = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import lm_eval.__main__ as m; m.cli_evaluate(); assert 'distill' not in sys.modules"
    )
    model = f"pretrained={found['folder']}/qwen2-mamba2,trust_remote_code=True"
    options = ["--model", "hf", "--model_args", model, "--tasks", "two_sums", "--include_path", str(tmp_path)]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-I", "-c", start, *options, "--device", "cpu", "--batch_size", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "two_sums" in done.stdout and "acc" in done.stdout
