"""The Python in README.md and docs/python.md runs as it stands, on the embedded teacher, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.teacher import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
CUT = {"steps=200": "steps=2", "questions=100": "questions=5", "max_new_tokens=64": "max_new_tokens=4"}
"""What a text says and what is run in its place."""
RUN = re.compile(r'"runs/[^"]*checkpoint"')
"""A checkpoint of a run that is not here; a small hybrid stands in."""


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_python_of_a_document_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks one after the other, in one namespace and an empty working directory."""
    found = blocks(document)
    assert found, f"{document} has no python"
    text = "\n".join(found)
    if RUN.search(text):
        model = load_model("embedded")
        mixers = ["mamba1" if block in (3, 6) else "attention" for block in range(model.config.num_hidden_layers)]
        hybridize(model, mixers, MixerConfig()).save_pretrained(tmp_path / "checkpoint")
        load_tokenizer("embedded").save_pretrained(tmp_path / "checkpoint")
        text = RUN.sub(repr(str(tmp_path / "checkpoint")), text)
    for said, run in CUT.items():
        text = text.replace(said, run)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, document, "exec"), namespace)
    assert "<|assistant|>" in capsys.readouterr().out, "something was generated and shown"
    if document == "docs/python.md":
        hybrid, model = namespace["hybrid"], namespace["model"]
        assert sum(mixer == "mamba1" for mixer in hybrid.config.mixers) == 5 and not hasattr(model.config, "mixers")
        assert (tmp_path / "for-the-hub/README.md").is_file() and (
            tmp_path / "for-the-hub/modeling_hybrid.py"
        ).is_file()
