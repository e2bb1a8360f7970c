"""Model cards: what hubs read is valid, what is not known is not said, and no place of this machine is named."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoTokenizer

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hub.card import card
from distill.hub.facts import Facts, facts_of, license_of, named, without_paths
from distill.hub.package import package
from distill.hybrid.surgery import hybridize
from distill.storage import DiskFull

BARE = Facts("H1-2/4", "llama", ["mamba1", "attention", "attention", "mamba1"], {"d_state": 16})
ENTRY = {"task": "add", "kind": "generative", "metric": "exact_match", "value": 0.9, "stderr": 0.03, "n": 100}
SPEED = {"batch": 2, "context": 64, "kv_bytes": 2**20, "state_bytes": 0}
FULL = Facts(
    name="H1-2/4",
    family="llama",
    mixers=["mamba2", "mamba1", "attention", "attention"],
    options={"d_state": 16},
    context=4096,
    dtype="float32",
    chat=True,
    lineage=[{"name": "H1-2/4", "steps": 5, "tokens": 1234, "data": "traces.jsonl", "loss": "reverse_kl"}],
    trainings=[{"name": "H1-2/4", "steps": 5, "tokens": 1234, "data": "traces.jsonl", "loss": "reverse_kl", "seed": 7,
                "eval_loss_start": 1.5, "eval_loss_end": 0.25, "sequence_length": 128}],
    teacher="owner/teacher",
    license="apache-2.0",
    accuracy=[ENTRY],
    teachers_accuracy=[{**ENTRY, "value": 1.0, "stderr": 0.0}],
    headline={"batch": 2, "output_tokens": 64, "tokens_per_second": 200.0, "teacher_tokens_per_second": 100.0,
              "ratio": 2.0},
    speeds=[{**SPEED, "model": "teacher"}, {**SPEED, "model": "H1-2/4", "kv_bytes": 2**19, "state_bytes": 2**18}],
    parameters=1_000_000,
    versions={"torch": "2.13.0"},
)  # fmt: skip


def test_the_front_matter_is_what_hubs_read() -> None:
    data = ModelCard(card(FULL, "my-hybrid", code=True)).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "owner/teacher" and data.license == "apache-2.0"
    assert {"mamba1", "mamba2", "hybrid"} <= set(data.tags)
    (result,) = data.eval_results
    assert data.model_name == "my-hybrid"
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("add", "exact_match", 90.0)
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "my-hybrid" and len(results) == 1


def test_what_was_done_and_measured_stands_in_the_text() -> None:
    text = card(FULL, "my-hybrid", code=True)
    for part in (
        "2 of 4 blocks", "mamba1 (1) or mamba2 (1)", "`owner/teacher`", "| 2-3 | attention |", "1,000,000 parameters",
        "| add (exact_match, generative) | 90.0 ± 3.0 | 100.0 ± 0.0 | 100 |",
        "2.00 times the teacher's", "200 against 100 output tokens/s, batch 2, 1 token in and 64 out",
        "batch 2, 64 tokens of context", "| teacher | 1.0 | 0.0 |", "| hybrid | 0.5 | 0.2 |",
        "1,234 tokens along the lineage", "| H1-2/4 | 5 | 1,234 | traces.jsonl | reverse_kl | 1.5000 → 0.2500 | 7 |",
        "at most 128 tokens", "4,096 positions", "torch 2.13.0", "apply_chat_template",
    ):  # fmt: skip
        assert part in text, part


def test_what_is_not_known_is_not_said() -> None:
    text = card(BARE, "my-hybrid", code=False)
    data = ModelCard(text).data
    assert data.license is None and data.base_model is None and data.eval_results is None
    assert data.library_name == "distill-hybrid"
    assert "Nothing yet" in text and "Not recorded" in text and "trust_remote_code" not in text
    assert not re.search(r"\b(None|nan|null)\b|\{\}|\[\]", text)
    assert "import distill" in text and "apply_chat_template" not in text


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("embedded", "embedded"),
        ("owner/data", "owner/data"),
        ("/data/of/mine/traces.jsonl", "traces.jsonl"),
        ("~/traces.jsonl", "traces.jsonl"),
        ("/data/of/mine/", "mine"),
        ("../up/here.parquet", "here.parquet"),
        ("/", "files"),
        ("/data/a.jsonl + owner/data", "a.jsonl + owner/data"),
    ],
)
def test_sources_are_named_without_their_place(place: str, name: str) -> None:
    assert named(place) == name


def test_texts_lose_absolute_paths_and_nothing_else() -> None:
    value = {"a": ["merged with /home/me/runs/x (alpha 0.5)", 3], "b": "H1-5/10 of owner/data, ~/secret/b.jsonl"}
    assert without_paths(value) == {"a": ["merged with x (alpha 0.5)", 3], "b": "H1-5/10 of owner/data, b.jsonl"}


@pytest.mark.parametrize(
    ("readme", "license"),
    [("---\nlicense: mit\n---\n# x\n", "mit"), ("# x\n", ""), ("---\n: [\n---\n", ""), (None, "")],
)
def test_the_license_is_what_the_teachers_card_says(readme: str | None, license: str, tmp_path: Path) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert license_of(str(tmp_path)) == license
    assert license_of(str(tmp_path / "gone")) == "" and license_of("owner/not-in-the-cache") == ""
    assert license_of("embedded") == "apache-2.0"


@pytest.fixture
def checkpoint(llama: Any, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    hybridize(llama, ["mamba1", "attention", "attention", "mamba1"], MixerConfig(), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lineage = [{"name": "H1-2/4", "tokens": 10, "steps": 1, "data": str(tmp_path / "secret/traces.jsonl")}]
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "merge.json").write_text(json.dumps({"a": str(tmp_path / "a")}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": str(tmp_path)}))
    return folder


def test_a_packaged_checkpoint_names_no_place_and_leaves_the_checkpoint_alone(checkpoint: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/LICENSE.txt").write_text("do what you like")
    target = package(checkpoint, tmp_path / "out", code=True, origin=str(tmp_path / "teacher"))
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    for path in target.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert (target / "LICENSE.txt").read_text() == "do what you like"
    assert not (target / "merge.json").exists()
    assert "traces.jsonl" in (target / "lineage.json").read_text()
    assert (target / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert (target / "model.safetensors").stat().st_mode & 0o777 == (target / "README.md").stat().st_mode & 0o777


def test_what_else_lies_in_a_folder_stays_there(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    """As a trainer leaves a folder; of the tokenizer all goes along, every template too."""
    templates = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    taught = copy.deepcopy(tokenizer)
    taught.chat_template = templates
    taught.save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/me/checkpoint-6"}')
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    for name in ("notes.txt", "optimizer.safetensors", "adapter_model.safetensors"):
        (checkpoint / name).write_text("/home/me")
    target = package(checkpoint, tmp_path / "out")
    assert {path.name for path in target.iterdir()} == {
        "README.md", "additional_chat_templates", "chat_template.jinja", "config.json", "generation_config.json",
        "lineage.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(target).chat_template == templates


def test_the_options_are_those_that_the_mixers_have(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """mamba2 reads no d_state: its states are as wide as a head."""
    for mixers, told, untold in (
        (["mamba2"] * 2, "d_state 32", "mil_layout"),
        (["mamba1"] * 2, "d_state 16", "(mamba1)"),
        (["mamba1", "mamba2"], "d_state (mamba1) 16, d_state (mamba2) 32", "d_state 16"),
    ):
        folder = tmp_path / "-".join(mixers)
        hybridize(llama, [*mixers, "attention", "attention"], MixerConfig(), seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = card(facts_of(folder), "x", code=False)
        assert told in text and untold not in text


def test_a_template_in_the_tokenizers_config_is_a_template(checkpoint: Path, tmp_path: Path) -> None:
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["chat_template"] = (checkpoint / "chat_template.jinja").read_text()
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "apply_chat_template" in (package(checkpoint, tmp_path / "out") / "README.md").read_text()


def test_what_is_not_there_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no checkpoint"):
        package(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "stage/train").mkdir(parents=True)
    checkpoint.rename(tmp_path / "stage/train/checkpoint")
    assert (package(tmp_path / "stage", tmp_path / "out") / "config.json").is_file()


def test_the_cards_snippet_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(checkpoint, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    exec(block.replace("max_new_tokens=256", "max_new_tokens=3").replace('"..."', '"add 1+1"'), {})
    assert "<|assistant|>" in capsys.readouterr().out


def test_a_package_can_be_packaged_again(checkpoint: Path, tmp_path: Path) -> None:
    with_code = package(checkpoint, tmp_path / "one", code=True)
    without = package(with_code, tmp_path / "two")
    assert not list(without.glob("*.py")) and "auto_map" not in (without / "config.json").read_text()
    assert (without / "lineage.json").read_bytes() == (with_code / "lineage.json").read_bytes()


def test_where_it_cannot_be_written_nothing_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="exists already"):
        package(checkpoint, checkpoint)
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000, "total": 10**9, "used": 0})()
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(DiskFull, match="MiB free"):
            package(checkpoint, tmp_path / "out")

    def fails(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.hub.package.card", fails)
    with pytest.raises(KeyboardInterrupt):
        package(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_shard_that_is_missing_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        package(checkpoint, tmp_path / "out")


def test_what_is_no_hybrid_is_refused(make_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is no hybrid but a llama"):
        facts_of(tmp_path / "llama")
    assert not (tmp_path / "out").exists()
