"""Stages that start from a chosen checkpoint: what they start from, what is counted, what is done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import stages.train
from eval.frames import stage_frame
from eval.runs import read_run
from stages.cli import main

STEP = 4 * 64  # tokens a step
CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [1, 3]
run_dir: {folder}/run
threads: 1
data: {{sequence_length: 64, mix: {{mod: 1.0, add: 1.0}}}}
score:
  loo: {{questions: 4}}
  mmr: {{steps: 1, heldout_tokens: 64}}
train: {{steps: 4, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4, save_steps: 2,
  keep_steps: [1, 2, 3]}}
measure:
  generative: []
  multiple_choice: [embedded_choice]
  limit: 1
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 8}}
"""
BRANCH = ["schedule=[1,3,2]", "start_from.H1-2=H1-1@2"]


@pytest.fixture(scope="module")
def made(make_llama: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, tiny.yaml, and its run of H1-1 and H1-3, trained and not measured."""
    folder = tmp_path_factory.mktemp("made")
    make_llama().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    for stage in ("H1-1", "H1-3"):
        chain(folder / "tiny.yaml", stage)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kept_weights(swapped: Path, start: Path) -> bool:
    """Whether all that a swap carried over is what the start has (the new mixers aside)."""
    a, b = weights(swapped), weights(start)
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name in ("step.json", "model.safetensors")}


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def chain(target: Path, stage: str, *overrides: str) -> None:
    for verb in ("score", "place", "swap", "train"):
        assert main([verb, str(target), *overrides, "--stage", stage]) == 0


def test_extension_by_a_branch_from_a_kept_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(run)
    capsys.readouterr()
    assert main(["run", str(run), *BRANCH]) == 0
    assert capsys.readouterr().out.count("is done already") == 2 * 4
    assert before.items() <= times(run).items(), "what was finished is not touched"
    first, last, branch = (run / "stages" / name for name in ("01-H1-1", "02-H1-3", "03-H1-2"))
    kept = first / "train/steps/000002"
    assert not same(kept, first / "train/checkpoint"), "or nothing would show which was taken"
    assert kept_weights(branch / "swap/checkpoint", kept)
    assert not kept_weights(branch / "swap/checkpoint", first / "train/checkpoint")
    placement = read(branch / "place/placement.json")
    start = read(first / "place/placement.json")["mixers"]
    assert len(placement["added"]) == 1
    assert [m for block, m in enumerate(placement["mixers"]) if block not in placement["added"]] == [
        m for block, m in enumerate(start) if block not in placement["added"]
    ]
    assert read(branch / "train/train.json")["start"] == "H1-1/4@2"
    assert read(last / "train/train.json")["start"] == "H1-1/4"
    assert read(first / "train/train.json")["start"] == "teacher"
    assert [read(s / "measure/measure.json")["tokens"] for s in (first, last, branch)] == [4 * STEP, 8 * STEP, 6 * STEP]
    assert list(stage_frame(read_run(run))["tokens"]) == [0, 4 * STEP, 8 * STEP, 6 * STEP]
    entry = {"data": "embedded", "loss": "reverse_kl", "run": "tiny"}
    assert read(branch / "train/checkpoint/lineage.json") == [
        {"name": "H1-1/4", "steps": 2, "tokens": 2 * STEP, **entry},
        {"name": "H1-2/4", "steps": 4, "tokens": 4 * STEP, **entry},
    ]
    assert read(kept / "lineage.json") == [{"name": "H1-1/4", "steps": 2, "tokens": 2 * STEP, **entry}]
    assert AutoModelForCausalLM.from_pretrained(kept).config.mixers == start
    assert AutoModelForCausalLM.from_pretrained(kept).config.use_cache

    # nor is anything redone for other kept steps, or with the last stage dropped
    after = times(run)
    for changes in (["train.keep_steps=[]"], ["schedule=[1,3]", "start_from={}"]):
        assert main(["measure", str(run), *changes]) == 0
        assert "measure is done in every stage" in capsys.readouterr().out
    assert after == times(run)
    # another start redoes that stage alone, and only by --force
    capsys.readouterr()
    other = [str(run), "schedule=[1,3,2]", "start_from.H1-2=teacher"]
    assert main(["score", *other, "--stage", "H1-2"]) == 2
    assert "start: H1-1/4@2 -> teacher" in capsys.readouterr().err
    assert after == times(run)
    assert main(["score", *other, "--stage", "H1-2", "--force"]) == 0
    assert read(branch / "score/scores.json")["scorer"] == "loo", "from the teacher: the first score"
    assert before.items() <= times(run).items()
    assert not (branch / "train").exists()


def test_a_stage_may_start_from_the_end_of_any_earlier_one(run: Path) -> None:
    for verb in ("score", "place", "swap"):
        assert main([verb, str(run), "schedule=[1,3,2]", "start_from.H1-2/4=H1-1@4", "--stage", "3"]) == 0
    first = run / "stages/01-H1-1/train/checkpoint"
    assert kept_weights(run / "stages/03-H1-2/swap/checkpoint", first), "the last step is the end"


def test_another_run_starts_from_a_folder(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = Path(shutil.copytree(made / "run/stages/01-H1-1/train/steps/000003", tmp_path / "start"))
    command = [str(made / "tiny.yaml"), "name=other", f"run_dir={tmp_path}/other", "schedule=[3]"]
    command += [f"start_from.H1-3={start}"]
    chain(Path(command[0]), "1", *command[1:])
    stage = tmp_path / "other/stages/01-H1-3"
    assert kept_weights(stage / "swap/checkpoint", start)
    assert len(read(stage / "place/placement.json")["added"]) == 2
    assert len(read(stage / "score/scores.json")["blocks"]) == 3
    assert read(stage / "score/scores.json")["scorer"] == "mmr", "a hybrid is scored as one"
    found = [(e["name"], e["run"], e["tokens"]) for e in read(stage / "train/checkpoint/lineage.json")]
    assert found == [("H1-1/4", "tiny", 3 * STEP), ("H1-3/4", "other", 4 * STEP)]

    # moved, it is the same; with other contents, or none of the tokens told, it is not
    capsys.readouterr()
    moved = [*command[:-1], f"start_from.H1-3={start.rename(tmp_path / 'moved')}"]
    assert main(["train", *moved]) == 0
    assert "train is done in every stage" in capsys.readouterr().out
    (tmp_path / "moved/lineage.json").unlink()
    assert main(["train", *moved]) == 2
    assert "start: hybrid " in capsys.readouterr().err
    assert main(["plan", *moved, "plan.device_tflops=1"]) == 0
    text = capsys.readouterr().out
    assert f"warning: H1-3/4 starts from {tmp_path}/moved, which has no lineage.json" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("H1-3/4"))
    assert row[6:8] == ["1.02k", "1.02k"] and row[9] == f"{tmp_path}/moved"


class Cut(BaseException):
    """What a kill would be."""


class CutAfter3(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise Cut


def cut(run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    """Train H1-1 of ``run`` anew up to step 3, with a checkpoint of step 2; its partial folder."""
    shutil.rmtree(run / "stages/01-H1-1/train")
    shutil.rmtree(run / "stages/02-H1-3")
    fit = stages.train.fit
    with monkeypatch.context() as patch:
        patch.setattr(stages.train, "fit", lambda *a, callbacks, **k: fit(*a, callbacks=[*callbacks, CutAfter3()], **k))
        with pytest.raises(Cut):
            main(["train", str(run), *overrides])
    partial = run / "stages/01-H1-1/train.partial"
    assert [path.name for path in partial.glob("checkpoints/*")] == ["checkpoint-2"]
    return partial


def test_resumed_equals_uninterrupted_kept_steps_included(
    run: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = cut(run, monkeypatch)
    shutil.rmtree(partial / "steps/000003")
    lines = (partial / "log.jsonl").read_text().splitlines()
    (partial / "log.jsonl").write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), "minutes": 5.0})]))
    assert main(["train", str(run)]) == 0
    train, whole = run / "stages/01-H1-1/train", made / "run/stages/01-H1-1/train"
    for name in ("steps/000001", "steps/000002", "steps/000003", "checkpoint"):
        assert same(train / name, whole / name), name
        assert read(train / name / "lineage.json") == read(whole / name / "lineage.json")
    assert sorted(path.name for path in (train / "steps").iterdir()) == ["000001", "000002", "000003"]
    assert 5 < read(train / "train.json")["minutes"] < 6, "minutes add up over sessions"
    assert read(whole / "train.json")["minutes"] < 5
    logged = [json.loads(line) for line in (train / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]


def test_a_step_named_after_it_has_passed_is_trained_again(
    run: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(run, monkeypatch, "train.keep_steps=[]")
    assert main(["train", str(run), "train.keep_steps=[]", "start_from.H1-3=H1-1@1"]) == 0
    assert "step 1 is to be kept and was not" in capsys.readouterr().out
    train, whole = run / "stages/01-H1-1/train", made / "run/stages/01-H1-1/train"
    assert [path.name for path in (train / "steps").iterdir()] == ["000001"], "kept without being listed"
    assert same(train / "steps/000001", whole / "steps/000001")
    assert same(train / "checkpoint", whole / "checkpoint")


def test_a_step_that_a_finished_training_did_not_keep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = run / "stages/01-H1-1/train"
    shutil.rmtree(train / "steps/000002")
    before = times(run)
    assert main(["run", str(run), *BRANCH]) == 2
    error = capsys.readouterr().err
    assert "step 2 was not kept (kept: 1, 3)" in error and "--force" in error
    assert times(run) == before
    assert main(["train", str(run), *BRANCH, "--stage", "H1-1", "--force"]) == 0
    assert (train / "steps/000002/config.json").is_file()
    assert not (run / "stages/02-H1-3/score").exists(), "what depends on it is to be redone"


def test_a_stage_keeps_its_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder and its seed hold the number, so a stage put in front of it is refused, or (forced) moves it."""
    inserted = [str(run), "schedule=[1,2,3]", "start_from.H1-3=H1-1"]
    before = times(run)
    for command in (["run", *inserted], ["run", str(run), "schedule=[3]"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "02-H1-3 was made as stage 2" in error and "put new stages at the end" in error
        assert times(run) == before
    assert main(["score", *inserted, "--stage", "H1-3", "--force"]) == 0
    assert [path.name for path in sorted((run / "stages").iterdir())] == ["01-H1-1", "03-H1-3"]
    assert times(run).items() >= {path: t for path, t in before.items() if "02-H1-3" not in str(path)}.items()


TO_3 = "start_from.H1-3="
MISTAKES = [
    (["start_from.H1-9=teacher"], "no stage 'H1-9'"),
    (["start_from.H1-3/5=teacher"], "no stage 'H1-3/5'"),
    (["start_from.three=teacher"], "'three' is no hybrid name"),
    (["start_from={H1-3: H1-1, H1-3/4: H1-1}"], "start_from names H1-3 twice"),
    (["start_from=[H1-1]"], "start_from"),
    (["start_from.H1-1=H1-3"], "no such stage before it (earlier stages: none)"),
    (["start_from.H1-1=H1-1"], "no such stage before it (earlier stages: none)"),
    ([TO_3 + "H1-2"], "(earlier stages: H1-1); allowed: teacher, H1-h or H1-h@STEP"),
    ([TO_3 + "H1-1/5"], "no such stage before it"),
    ([TO_3 + "H1-1@5"], "H1-1 is trained for 4 steps; give a step in [1, 4]"),
    ([TO_3 + "H1-1@0"], "give a step in [1, 4]"),
    ([TO_3 + "H1-1@end"], "no folder with config.json; allowed: teacher, H1-h or H1-h@STEP"),
    ([TO_3 + "{tmp}/nowhere"], "no folder with config.json"),
    ([TO_3 + "{made}/teacher"], "its config.json names no mixers"),
    (["schedule=[1,3,2]", "start_from.H1-2=H1-3"], "3 blocks are replaced there already; H1-2 needs"),
    (["schedule=[1,3,1]", "start_from.H1-1=teacher"], "1 stands there twice"),
    (["schedule=[1,3,2]"], "must increase from at least 1; 2 follows 3"),
    ([TO_3 + "{made}/run/stages/02-H1-3/train/checkpoint"], "3 blocks are replaced there already"),
    ([TO_3 + "{tmp}/start", "run_dir={tmp}"], "lies in this run"),
    ([TO_3 + "{tmp}/start", "mixer.d_state=8"], "mixers already there have d_state=16"),
    ([TO_3 + "{tmp}/start/mixers"], "a hybrid of 3 blocks; the teacher has 4"),
    ([TO_3 + "{tmp}/start/other"], "unknown mixer in {tmp}/start/other/config.json: 'mamba9' (did you mean 'mamba2'?)"),
    ([TO_3 + "{tmp}/start/wide"], "its hidden_size is 96; the teacher's is 48"),
    ([TO_3 + "{tmp}/start/family"], "a hybrid_mistral; the teacher is a llama"),
    ([TO_3 + "{tmp}/start/empty"], "holds no weights"),
    ([TO_3 + "{tmp}/start/torn"], "config.json cannot be read"),
    ([TO_3 + "{tmp}/start/told"], "lineage.json is broken"),
    (["train.keep_steps=[0]"], "train.keep_steps[0]=0 must be above 0"),
    (["train.keep_steps=[2,5]"], "no stage is trained for more than 4 steps"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[" ".join(given)[:60] for given, _ in MISTAKES])
@pytest.mark.parametrize("verb", ["plan", "score"])
def test_a_start_that_cannot_be_is_refused_before_work(
    verb: str, given: list[str], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made / "run/stages/01-H1-1/train/checkpoint"
    shutil.copytree(source, tmp_path / "start")
    config = read(source / "config.json")
    changes: dict[str, dict[str, Any]] = {
        "mixers": {"mixers": config["mixers"][1:]},
        "other": {"mixers": ["mamba9", *["attention"] * 3]},
        "wide": {"hidden_size": 96},
        "family": {"model_type": "hybrid_mistral", "sliding_window": None},
        "empty": {},
        "told": {},
    }
    for name, change in changes.items():
        folder = tmp_path / "start" / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        if name != "empty":
            shutil.copy(source / "model.safetensors", folder)
    (tmp_path / "start/told/lineage.json").write_text('[{"name": "H1-1/4"}]')
    (tmp_path / "start/torn").mkdir()
    (tmp_path / "start/torn/config.json").write_text('{"mixers": [')
    places = {"tmp": str(tmp_path), "made": str(made)}

    def fill(text: str) -> str:
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", path)
        return text

    command = [verb, str(made / "tiny.yaml"), f"run_dir={tmp_path}/new", *map(fill, given)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert fill(message) in error
    assert "Traceback" not in error and error.count("\n") <= 2
    assert not (tmp_path / "new").exists() and not (tmp_path / "stages").exists()
