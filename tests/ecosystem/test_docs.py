"""The snippets of docs/ecosystem.md do what the page says; they run in order, in a folder with a tiny hybrid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[tuple[str, str]]:
    """(section, text) of every block in a language."""
    sections = re.split(r"^## (.+)$", f"## Loading\n{PAGE}", flags=re.MULTILINE)[1:]
    return [
        (name, block)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def place(make_hybrid: Callable[[str], Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page takes as there; it is the current one."""
    make_hybrid("mamba2").save_pretrained(tmp_path / "my-hybrid")
    tokenizer.save_pretrained(tmp_path / "my-hybrid")
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    lines = {"talks": [], "pairs": []}
    for number in range(24):
        question, answer = [turn("user", f"{number}+1=")], [turn("assistant", str(number + 1))]
        lines["talks"].append({"messages": question + answer})
        lines["pairs"].append({"prompt": question, "chosen": answer, "rejected": [turn("assistant", "no")]})
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_what_it_is_about() -> None:
    sections = [name for name, _ in snippets("python")]
    assert sections == ["Loading", "PEFT", "TRL", "TRL", "Accelerate", "Accelerate", "DeepSpeed", "DeepSpeed"]
    assert [name for name, _ in snippets("sh")] == ["lm-eval", "lm-eval"]


def test_python_snippets(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for section, text in snippets("python"):
        if section != "DeepSpeed":  # run by tests/ecosystem/deepspeed_worker.py, on two ranks
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            exec(compile(text, f"docs/ecosystem.md, {section}", "exec"), {})
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert "trainable params: " in capsys.readouterr().out
    for name in ("my-merged-hybrid", "my-tuned-hybrid", "my-trained-hybrid"):
        assert json.loads((place / name / "config.json").read_text())["model_type"] == "hybrid_llama"
        assert (place / name / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [text for _, text in snippets("sh")], ids=["package", "program"])
def test_commands(place: Path, command: str) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"\|embedded_choice\|.*\|acc", done.stdout) and re.search(
        r"\|embedded_mod .*\|exact_match", done.stdout
    )
