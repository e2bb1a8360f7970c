"""``distill traces --show``: of a config, of a file and a teacher, coloured on a terminal; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from stages.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    rows = [{"messages": [*chat, {"role": "user", "content": f"add {i}+1"}, chat[1]]} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_rows_of_a_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["traces", "--show", "2", "demo", "data.source=t.jsonl", "data.sequence_length=64"]
    assert main([*command, "data.mask=assistant"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("row ")] == ["row 1", "row 2"]
    assert "── document 1: 19 tokens, 6 learned" in lines or "── document 1: 20 tokens, 6 learned" in lines
    assert any(line.startswith("<|user|>sort 21<|assistant|>⟦12<|end|>⟧<|user|>add") for line in lines)
    assert lines[-1].startswith("t.jsonl: first 40 documents read; ")
    assert main(command) == 0
    assert "<|user|>sort 21<|assistant|>12<|end|><|user|>add" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["t.jsonl"], "nothing is written"


def test_the_rows_of_a_teacher_and_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--teacher", "embedded", "--prompts", "t.jsonl"]
    assert main(["traces", *options, "--show", "1", "data.sequence_length=32"]) == 0
    first = capsys.readouterr().out
    assert main(["traces", "--show", "1", "data.source=t.jsonl", "data.sequence_length=32"]) == 0
    assert capsys.readouterr().out == first


def test_the_embedded_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traces", "demo", "--show", "1"]) == 0
    assert "embedded: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colour_on_a_terminal(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_colour: str,
    coloured: bool,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert main(["traces", "--show", "1", "demo", "data.source=t.jsonl"]) == 0
    text = capsys.readouterr().out
    assert ("\x1b[1;32m12<|end|>\x1b[0m" in text) is coloured
    assert ("⟦12<|end|>⟧" in text) is not coloured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "0", "demo"], "--show 0 must be above 0"),
        (["--show", "1"], "--show needs a CONFIG"),
        (["--show", "1", "dmo"], "no config 'dmo' (did you mean 'demo'?)"),
        (["--show", "1", "demo", "data.source=u.jsonl"], "no such file: u.jsonl (did you mean 't.jsonl'?)"),
        (["--show", "1", "demo", "data.source=t.jsonl", "data.too_long=crop"], "unknown data.too_long 'crop'"),
        (
            ["--show", "1", "demo", "data.source=t.jsonl", "data.sequence_length=16", "data.too_long=drop"],
            "t.jsonl: all documents are longer than data.sequence_length=16; 40 of 40 documents are longer",
        ),
    ],
)
def test_what_cannot_be_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["traces", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_code_is_trusted_as_the_config_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, bool]] = []
    monkeypatch.setattr("stages.show.trust_code", lambda name, allowed: said.append((name, allowed)))
    for arguments in (["demo"], ["demo", "trust_remote_code=true"], ["demo", "--trust-remote-code"]):
        assert main(["traces", "--show", "1", *arguments]) == 0
    assert said == [("embedded", False), ("embedded", True), ("embedded", True)]
