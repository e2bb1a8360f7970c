"""The run folder: files whole or not at all; steps skipped, resumed, begun anew or refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill import records
from distill.errors import UserError
from distill.records import Step, differences, fingerprint, provenance, read_json, write_json, write_text
from distill.storage import DiskFull

INPUTS = {"seed": 0, "train": {"steps": 10, "learning_rate": 1e-3}}


def make(folder: Path, inputs: Any = None, after: dict[str, str] | None = None) -> Step:
    return Step("01-H1-5/train", folder / "train", INPUTS if inputs is None else inputs, after or {})


def work(folder: Path) -> None:
    write_text(folder / "result.txt", "right")


def cut_short(step: Step) -> None:
    """Leave the step as a crash in the middle of its work would."""

    def crash(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step.perform(crash, resumable=True)


class Torn(io.StringIO):
    """A file on a disk that fills up."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    path = tmp_path / "measure.json"
    write_json(path, {"accuracy": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fault == "write":
            patch.setattr(records, "open", lambda *_, **__: Torn(), raising=False)
        else:
            patch.setattr(os, fault, fail)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"accuracy": 2})
    assert read_json(path) == {"accuracy": 1}
    write_json(path, {"accuracy": 3})
    assert read_json(path) == {"accuracy": 3}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "measure.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == [1]


def test_nothing_else_is_left_beside_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "naïve\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == "naïve\n".encode()


def test_reading_what_is_missing_or_torn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.json is missing; run the step"):
        read_json(tmp_path / "score.json")
    (tmp_path / "score.json").write_text('{"scores": [1, 2')
    with pytest.raises(UserError, match=r"score\.json cannot be read"):
        read_json(tmp_path / "score.json")


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    others = [{"a": 1, "b": [2, 1]}, {"a": 2, "b": [1, 2]}, {"a": 1}, {"a": "1", "b": [1, 2]}, {}, None]
    assert len({fingerprint(value) for value in [{"a": 1, "b": [1, 2]}, *others]}) == len(others) + 1


def test_fingerprint_stands_from_one_version_to_the_next() -> None:
    """A changed hash would refuse every run folder that exists."""
    assert fingerprint(INPUTS) == "280358ac4b37c18b"


def test_the_fingerprint_of_a_step_depends_on_inputs_and_on_what_is_before(tmp_path: Path) -> None:
    step = make(tmp_path, after={"swap": "1234"})
    assert step.fingerprint == make(tmp_path, after={"swap": "1234"}).fingerprint
    changed = {
        make(tmp_path, {**INPUTS, "seed": 1}, {"swap": "1234"}).fingerprint,
        make(tmp_path, {**INPUTS, "train": {"steps": 11, "learning_rate": 1e-3}}, {"swap": "1234"}).fingerprint,
        make(tmp_path, after={"swap": "1235"}).fingerprint,
        make(tmp_path, after={"place": "1234"}).fingerprint,
        make(tmp_path).fingerprint,
    }
    assert len(changed | {step.fingerprint}) == 6
    elsewhere = Step("another name", tmp_path / "b", INPUTS, {"swap": "1234"})
    assert elsewhere.fingerprint == step.fingerprint, "a run folder can be moved"


def test_differences_name_the_leaf() -> None:
    old = {"seed": 0, "train": {"steps": 10, "loss": "jsd"}, "gone": 1}
    new = {"seed": 0, "train": {"steps": 20, "loss": "jsd"}, "come": [2]}
    assert differences(old, new) == ["train.steps: 10 -> 20", "gone: 1 -> (absent)", "come: (absent) -> [2]"]
    assert differences(old, old) == []
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a: {'b': 1} -> 3"]


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.dictionaries(st.text(max_size=2), st.integers())))
def test_differences_with_itself_are_none(value: dict[str, Any]) -> None:
    assert differences(value, json.loads(json.dumps(value))) == []


def test_a_step_is_done_once(tmp_path: Path) -> None:
    step, calls = make(tmp_path), []

    def count(folder: Path) -> None:
        calls.append(folder)
        work(folder)

    assert not step.done
    assert step.perform(count)
    assert step.done
    assert calls == [step.partial]
    assert sorted(path.name for path in step.folder.iterdir()) == ["result.txt", "step.json"]
    assert not step.partial.exists()
    assert not make(tmp_path).perform(count)
    assert len(calls) == 1


def test_what_a_step_writes_about_itself(tmp_path: Path) -> None:
    step = make(tmp_path, after={"swap": "1234"})
    step.perform(work)
    record = read_json(step.folder / "step.json")
    assert (record["step"], record["inputs"], record["after"]) == (step.name, INPUTS, {"swap": "1234"})
    assert record["fingerprint"] == step.fingerprint
    assert record["seconds"] >= 0
    assert record["provenance"]["packages"].keys() == set(records.PACKAGES)


def test_provenance_is_json() -> None:
    assert json.loads(json.dumps(provenance()))["python"].startswith("3.")


def test_a_done_step_with_other_inputs_is_refused_and_left_alone(tmp_path: Path) -> None:
    make(tmp_path).perform(work)
    other = make(tmp_path, {"seed": 0, "train": {"steps": 20, "learning_rate": 1e-3}})
    for attempt in (other.check, lambda: other.perform(lambda _: pytest.fail("the work was begun"))):
        with pytest.raises(UserError) as caught:
            attempt()
        assert "train.steps: 10 -> 20" in str(caught.value)
        assert "learning_rate" not in str(caught.value), "only what differs is named"
        assert "--force" in str(caught.value)
    assert (tmp_path / "train" / "result.txt").read_text() == "right"
    make(tmp_path).check()


def test_a_done_step_after_another_is_refused(tmp_path: Path) -> None:
    make(tmp_path, after={"swap": "1234"}).perform(work)
    with pytest.raises(UserError, match=r"swap: 1234 -> 9999 \(a step before it\)"):
        make(tmp_path, after={"swap": "9999"}).check()


def test_a_partial_step_is_not_done(tmp_path: Path) -> None:
    step = make(tmp_path)
    cut_short(step)
    assert not step.done
    assert not step.folder.exists()
    assert (step.partial / "half.txt").exists()
    step.check()


def test_a_partial_step_is_resumed(tmp_path: Path) -> None:
    step = make(tmp_path)
    cut_short(step)
    seen: list[list[str]] = []

    def resume(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        work(folder)

    assert step.perform(resume, resumable=True)
    assert seen == [["half.txt", "inputs.json"]]
    assert step.done
    assert not (step.folder / "inputs.json").exists()


@pytest.mark.parametrize("why", ["not resumable", "other inputs", "other step before", "no mark"])
def test_a_partial_step_is_begun_anew(tmp_path: Path, why: str) -> None:
    cut_short(make(tmp_path))
    step = make(
        tmp_path,
        {**INPUTS, "seed": 1} if why == "other inputs" else None,
        {"swap": "1"} if why == "other step before" else None,
    )
    if why == "no mark":
        (step.partial / "inputs.json").unlink()

    def anew(folder: Path) -> None:
        assert not (folder / "half.txt").exists()
        work(folder)

    assert step.perform(anew, resumable=why != "not resumable")
    assert sorted(path.name for path in step.folder.iterdir()) == ["result.txt", "step.json"]
    assert read_json(step.folder / "step.json")["fingerprint"] == step.fingerprint


def test_a_training_under_way_with_other_inputs_is_refused(tmp_path: Path) -> None:
    """Its checkpoints may be days of work: they go only where that is asked for."""
    step, other = make(tmp_path), make(tmp_path, {**INPUTS, "seed": 1})
    cut_short(step)
    checkpoint = step.partial / "checkpoints/checkpoint-2"
    checkpoint.mkdir(parents=True)
    for refused in (other.check, lambda: other.perform(work, resumable=True)):
        with pytest.raises(UserError, match=r"train.partial was begun with other inputs:\n  seed: 0 -> 1"):
            refused()
    assert checkpoint.is_dir()
    step.check()
    other.forget()
    assert other.perform(work, resumable=True)


def test_a_crash_before_the_rename_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written, ``step.json`` too, but the folder still has its partial name."""
    step, rename = make(tmp_path), os.replace

    def crash(source: Any, target: Any) -> None:
        if Path(target) == step.folder:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            step.perform(work, resumable=True)
    assert (step.partial / "step.json").exists()
    assert not step.done
    assert step.perform(work, resumable=True)
    assert step.done


def test_a_folder_without_its_record_is_not_done(tmp_path: Path) -> None:
    step = make(tmp_path)
    step.folder.mkdir()
    (step.folder / "result.txt").write_text("whose?")
    assert not step.done
    assert step.perform(work)
    assert (step.folder / "result.txt").read_text() == "right"


def test_a_forgotten_step_is_done_again(tmp_path: Path) -> None:
    make(tmp_path).perform(work)
    other = make(tmp_path, {**INPUTS, "seed": 1})
    other.partial.mkdir()
    other.forget()
    assert not other.folder.exists()
    assert not other.partial.exists()
    other.forget()
    assert other.perform(work)


def two_steps(run: Path) -> tuple[Step, Step]:
    """A swap that is done, and a training that reads its result."""
    stage = run / "stages" / "01-H1-5"
    swap = Step("01-H1-5/swap", stage / "swap", INPUTS, {})

    def swap_work(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        work(folder / "checkpoint")

    swap.perform(swap_work)
    return swap, Step("01-H1-5/train", stage / "train", INPUTS, {swap.name: swap.fingerprint}, (swap.folder,))


def test_a_step_notes_the_checksums_of_its_files(tmp_path: Path) -> None:
    swap, _ = two_steps(tmp_path)
    digest = hashlib.sha256(b"right").hexdigest()
    assert read_json(swap.folder / "step.json")["files"] == {"checkpoint/result.txt": {"size": 5, "sha256": digest}}


@pytest.mark.parametrize("part", ["", "checkpoint", "checkpoint/result.txt", "other.txt"])
def test_a_damaged_file_stops_the_step_that_reads_it(tmp_path: Path, part: str) -> None:
    swap, step = two_steps(tmp_path)
    step = Step(step.name, step.folder, step.inputs, step.after, (swap.folder / part,))
    file = swap.folder / "checkpoint" / "result.txt"
    file.write_text("wrong")
    os.utime(file, (1, 1))
    if part == "other.txt":
        assert step.perform(work), "only what it reads is looked at"
        return
    with pytest.raises(UserError) as caught:
        step.perform(lambda _: pytest.fail("the work was begun"))
    message = str(caught.value)
    assert f"{file} is damaged: its checksum is another; step 01-H1-5/swap wrote it" in message
    assert f"distill swap {tmp_path} --stage 1 --force" in message
    assert message.count("\n") <= 4
    assert not step.partial.exists()
    swap.check()


def test_a_step_from_before_there_were_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    swap, step = two_steps(tmp_path)
    record = read_json(swap.folder / "step.json")
    del record["files"]
    write_json(swap.folder / "step.json", record)
    assert step.perform(work)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, resumable: bool) -> None:
    """But for what a resumable step goes on from."""
    swap, step = two_steps(tmp_path)

    def full(folder: Path) -> None:
        work(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match="No space left"):
        step.perform(full, resumable=resumable)
    assert step.partial.exists() == resumable and not step.done
    assert swap.done
    assert step.perform(work, resumable=resumable)


def test_what_only_a_resumption_needs_goes_once_all_else_is_known_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the checksums are taken, a training still has its checkpoints."""
    step, calls = make(tmp_path), []

    def train(folder: Path) -> None:
        calls.append((folder / "checkpoints").exists())
        (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        write_text(folder / "start.json", "1")
        work(folder)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"resumable": True, "scratch": ("checkpoints", "start.json")}
    with monkeypatch.context() as patch:
        patch.setattr(records, "checksums", killed)
        with pytest.raises(KeyboardInterrupt):
            step.perform(train, **options)
    with monkeypatch.context() as patch:
        patch.setattr(records.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            step.perform(train, **options)
    step.perform(train, **options)
    assert calls == [False, True], "the third time, all but the removal is done"
    assert sorted(path.name for path in step.folder.iterdir()) == ["result.txt", "step.json"]
    assert read_json(step.folder / "step.json")["files"].keys() == {"result.txt"}


def test_what_is_half_forgotten_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap, step = two_steps(tmp_path)
    step.perform(work)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            records.forget([swap, step], {swap.name})
    assert not step.done, "what depends on another goes first"
    assert swap.done
