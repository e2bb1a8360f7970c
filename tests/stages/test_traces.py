"""``distill traces`` through the command line: its rows, its record, resumption byte for byte, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stages.traces
from distill import lock
from distill.config import Origin
from distill.data.sample import Completion
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import read_documents
from stages.cli import main

COMMAND = ["traces", "--teacher", "embedded", "--threads", "1", "--max-new-tokens", "64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with prompts of every kind: right, wrong and unknown answers, one too long, one twice."""
    monkeypatch.chdir(tmp_path)
    prompts: list[dict[str, Any]] = [
        {"prompt": "add 347+586", "answer": 933},
        {"prompt": "add 347+586", "answer": "933."},
        {"messages": [{"role": "user", "content": "sort 312"}, {"role": "assistant", "content": "?"}], "answer": "123"},
        {"prompt": "sort 4213"},
        {"prompt": "add 1+1", "answer": 3},
        {"prompt": "sort " + "1" * 4096},
        {"prompt": "add 20+21", "answer": 41},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path


def run(*extra: str, output: str = "t.jsonl") -> int:
    return main([*COMMAND, "--prompts", "p.jsonl", "--output", output, *extra])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_record_and_filters(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--temperature", "0", "--batch-size", "4") == 0
    made = rows(folder / "t.jsonl")
    assert [(row["source"], row["sample"], row["correct"]) for row in made] == [
        (0, 0, True),
        (2, 0, True),
        (3, 0, None),
        (6, 0, True),
    ]
    assert made[1]["messages"] == [
        {"role": "user", "content": "sort 312"},
        {"role": "assistant", "content": "<think>3 13 123</think>123"},
    ]
    tokenizer = build_tokenizer()
    documents = read_documents(Origin(source=str(folder / "t.jsonl")), tokenizer, "completion")
    assert [len(d.ids) - d.completion - 1 for d in documents] == [row["tokens"] for row in made]

    record = json.loads((folder / "t.record.json").read_text())
    rejected = {"duplicate": 1, "prompt too long": 1, "wrong answer": 1}
    tokens = sum(row["tokens"] for row in made)
    counts = {"sampled": 7, "kept": 4, "tokens": tokens, "judged": 5, "right": 4, "rejected": rejected}
    assert record["counts"] == counts
    assert record["settings"]["sampling"]["batch_size"] == 4
    assert "torch" in record["provenance"]["packages"]
    assert sorted(path.name for path in folder.iterdir()) == ["p.jsonl", "t.jsonl", "t.record.json"]

    # again: done; with other settings: refused, or begun anew
    before = (folder / "t.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run("--temperature", "0", "--batch-size", "4") == 0
    assert capsys.readouterr().out == "t.jsonl is done already\n"
    assert run("--temperature", "0", "--batch-size", "4", "--keep-wrong") == 2
    assert "filters.keep_wrong: False -> True" in capsys.readouterr().err
    assert (folder / "t.jsonl").stat().st_mtime_ns == before
    assert run("--temperature", "0", "--batch-size", "4", "--keep-wrong", "--force") == 0
    assert [(row["source"], row["correct"]) for row in rows(folder / "t.jsonl")][3] == (4, False)
    (folder / "p.jsonl").write_text('{"prompt": "sort 21"}\n')
    assert run("--temperature", "0", "--batch-size", "4", "--keep-wrong") == 2
    assert "prompts.content" in capsys.readouterr().err


@pytest.mark.parametrize(("finished", "torn"), [(0, b'{"bat'), (1, b'{"batch": 1, "compl'), (3, b"")])
def test_an_interruption_changes_no_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torn: bytes, finished: int
) -> None:
    options = ["--samples", "2", "--batch-size", "3", "--temperature", "1.5", "--max-new-tokens", "24"]
    assert run(*options, output="whole.jsonl") == 0
    append = stages.traces.Partial.append
    sampled = []

    def cut_short(self: Any, batch: list[Completion]) -> None:
        if len(sampled) == finished:
            with open(self.path, "ab") as file:
                file.write(torn)
            raise KeyboardInterrupt
        sampled.append(batch)
        append(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(stages.traces.Partial, "append", cut_short)
        assert run(*options) == 130
    assert not (folder / "t.jsonl").exists()
    assert len((folder / "t.jsonl.partial").read_bytes().split(b"\n")) == finished + 2
    assert run(*options, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "sampling.seed: 0 -> 1" in error
    assert "t.jsonl.partial was made with other settings" in error

    calls = []
    sample = stages.traces.sample
    monkeypatch.setattr(stages.traces, "sample", lambda *args: calls.append(args[-1]) or sample(*args))
    assert run(*options) == 0
    assert calls == list(range(finished, 4)), "what was finished is not sampled again"
    assert (folder / "t.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    counts = [json.loads((folder / f"{name}.record.json").read_text())["counts"] for name in ("t", "whole")]
    assert counts[0] == counts[1]
    assert not (folder / "t.jsonl.partial").exists()


def test_filters_can_change_before_the_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing passes, nothing is written, and other filters need no new samples."""
    greedy = ["--temperature", "0", "--limit", "4"]
    assert run(*greedy, "--min-tokens", "60") == 2
    assert "no completion was kept" in capsys.readouterr().err
    assert not (folder / "t.jsonl").exists()
    assert run(*greedy) == 0
    assert "continuing after batch 1 of 1" in capsys.readouterr().out
    assert len(rows(folder / "t.jsonl")) == 3


def test_the_second_process_on_one_output_is_told_of_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "t.jsonl.lock").write_text(json.dumps({**lock.myself(), "host": "node7", "pid": 7}))
    assert run("--temperature", "0", "--limit", "1") == 2
    assert "t.jsonl is in use: host node7, pid 7" in capsys.readouterr().err
    assert not (folder / "t.jsonl.partial").exists()
    (folder / "t.jsonl.lock").unlink()
    assert run("--temperature", "0", "--limit", "1") == 0
    assert not (folder / "t.jsonl.lock").exists()


def test_embedded_prompts(folder: Path) -> None:
    assert main([*COMMAND, "--prompts", "embedded", "--limit", "6", "--output", "new/t"]) == 0
    made = rows(folder / "new/t")
    assert all(row["correct"] is True for row in made)
    assert made[0]["messages"][0]["content"].startswith("add ")
    assert (folder / "new/t.record.json").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--prompts", "q.jsonl"], "no such file: q.jsonl (did you mean 'p.jsonl'?); give 'embedded' or a JSONL file"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["--prompts", "p.jsonl", "--output", "p.jsonl"], "would overwrite the prompts"),
        (["--teacher", "nowhere"], "no model 'nowhere'"),
        (["--samples", "0"], "--samples 0 must be above 0"),
        (["--batch-size", "-1"], "--batch-size -1 must be above 0"),
        (["--temperature", "-1"], "--temperature -1.0 must be at least 0"),
        (["--temperature", "nan"], "--temperature nan must be at least 0"),
        (["--temperature", "0", "--samples", "2"], "the same trace each time"),
        (["--top-p", "0"], "--top-p 0.0 must be in (0, 1]"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--limit", "-1"], "--limit -1 must be at least 0"),
        (["--threads", "-1"], "--threads -1 must be at least 0"),
        (["--min-tokens", "65"], "--min-tokens 65 is above --max-new-tokens 64"),
        (["--max-new-tokens", "9999"], "no prompt leaves room for --max-new-tokens 9999 in the teacher's 4096"),
        (["--dtype", "float16"], "allowed: bfloat16, float32"),
        (["--output", "bad.jsonl/t.jsonl"], "cannot write to bad.jsonl/t.jsonl"),
        (["--output", "bad.jsonl"], "not of this command's making"),
        (["--output", "bad.jsonl", "--force"], "not of this command's making"),
        (["--output", "."], "--output . is a folder"),
        (["--output", "torn"], "torn.partial is damaged"),
        (["--output", "twice"], "two processes wrote at once"),
    ],
)
def test_a_mistake_is_one_clear_message(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    message: str,
) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{\n')
    (folder / "torn.partial").write_text("{}\n[]\n")
    line = '{"batch": 0, "completions": []}\n'
    (folder / "twice.partial").write_text('{"settings": {}, "threads": 1}\n' + line + line)
    monkeypatch.setattr(stages.traces, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main([*COMMAND, "--prompts", "p.jsonl", *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("distill traces: ")
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "nothing is written"


def test_the_command_line_itself() -> None:
    for extra in (["--samples", "two"], ["seed=1"], ["--keep-wrong", "--correct-only"], ["--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main([*COMMAND, "--prompts", "embedded", *extra])
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["traces"])
    assert stop.value.code == 2
