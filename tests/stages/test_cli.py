"""The command line: help, and a user's mistakes, each with exit code 2, one clear message and no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.cli import VERBS, main

RUN = ["run", "demo", "run_dir={tmp}/run"]
MISTAKES = [
    (["run", "dmeo"], "did you mean 'demo'"),
    (["run", "{tmp}/missing.yaml"], "no config"),
    (["run", "{tmp}/empty.yaml"], "found nothing"),
    (["run", "{tmp}/list.yaml"], "found a list"),
    (["run", "{tmp}/broken.yaml"], "is not YAML"),
    (["run", "{tmp}"], "is no run folder"),
    ([*RUN, "schedul=[5]"], "did you mean 'schedule'"),
    ([*RUN, "schedule=[1,"], "cannot be read"),
    ([*RUN, "name=${foo}"], "foo"),
    ([*RUN, "data.mix=[1]"], "'data.mix=[1]'"),
    ([*RUN, "seed=-1"], "seed=-1 must be at least 0"),
    ([*RUN, "schedule=5"], "expected a list, such as [5]"),
    (["plan", "demo", "plan.utilisation=0"], "plan.utilisation=0.0 must be above 0"),
    (["plan", "demo", "teacher_config={head_dim: abc}"], "teacher_config is no model config"),
    (["run", "demo", "--force", "train.stesp=5"], "did you mean 'steps'"),
    ([*RUN, "threads=-1"], "threads=-1 must be at least 0"),
    ([*RUN, "train.learning_rate=nan"], "train.learning_rate=nan must be above 0"),
    ([*RUN, "train.beta2=2"], "must be in [0, 1)"),
    ([*RUN, "train.stesp=5"], "did you mean 'steps'"),
    ([*RUN, "train.steps=many"], "train.steps"),
    ([*RUN, "train.steps=0"], "must be above 0"),
    ([*RUN, "train.steps"], "expected key=value"),
    ([*RUN, "schedule=[5,5]"], "must increase"),
    ([*RUN, "schedule=[7,5]"], "must increase"),
    ([*RUN, "schedule=[5,10]"], "is not below the teacher's 10 blocks"),
    ([*RUN, "schedule=[0]"], "must increase from at least 1"),
    ([*RUN, "train.steps_by_stage=[1]"], "1 entries for 4 stages"),
    ([*RUN, "train.gradient_accumulation=3"], "not divisible"),
    ([*RUN, "train.loss=reverse_lk"], "did you mean 'reverse_kl'"),
    ([*RUN, "mixer.name=mamba3"], "did you mean 'mamba1'"),
    ([*RUN, "mixer.init=mli"], "did you mean 'mil'"),
    ([*RUN, "mixer.mil_layout=alined"], "did you mean 'aligned'"),
    ([*RUN, "mixer.d_state=24"], "must divide head_dim=32"),
    ([*RUN, "score.first=lo"], "did you mean 'loo'"),
    ([*RUN, "score.mmr.trainable=some"], "allowed: all, mixer"),
    ([*RUN, "dtype=float16"], "allowed: bfloat16, float32"),
    ([*RUN, "kernels=cuda"], "allowed: auto, cpu, reference"),
    ([*RUN, "data.source={tmp}/none.jsonl"], "no such file"),
    ([*RUN, "data.mixture=[{source:embedded},{source:{tmp}/none.jsonl}]"], "data.mixture[1].source: no such file"),
    ([*RUN, "data.mixture=[{source:embedded,weight:-1}]"], "data.mixture[0].weight=-1.0 must be at least 0"),
    ([*RUN, "data.mixture=[{source:embedded,wieght:1}]"], "did you mean 'weight'"),
    ([*RUN, "data.mixture=[{weight:1}]"], "data.mixture[0].source is missing"),
    ([*RUN, "data.mixture=[embedded]"], "expected {source, split, subset, revision, columns, weight}"),
    ([*RUN, "data.mix.adds=1"], "did you mean 'add'"),
    ([*RUN, "data.mask=prompt"], "allowed: all, assistant, completion"),
    ([*RUN, "measure.generative=[embedded_genertive]"], "did you mean 'embedded_generative'"),
    ([*RUN, "measure.throughput.batches=[0]"], "must be above 0"),
    ([*RUN, "teacher={tmp}/nowhere"], "no model"),
    ([*RUN, "teacher={tmp}"], "has no config.json"),
    ([*RUN, "teacher={tmp}/bert"], "cannot be converted"),
    ([*RUN, "teacher={tmp}/sliding"], "sliding-window"),
    (["run", "demo", "run_dir={tmp}/list.yaml/x"], "cannot write to run_dir"),
    (["train", "demo", "run_dir={tmp}/run", "--stage", "H1-4"], "no stage 'H1-4'"),
    (["train", "demo", "run_dir={tmp}/run", "--stage", "six"], "is no hybrid name"),
    (["train", "demo", "run_dir={tmp}/run"], "run 'distill swap'"),
    (["report", "{tmp}/run-without"], "no config"),
    (["submit", "demo"], "--dry-run"),
    (["pretrain", "demo"], "unknown key"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[" ".join(c[1:])[:60] for c, _ in MISTAKES])
def test_a_mistake_is_one_clear_message(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n b: }")
    for name, config in (("bert", {"model_type": "bert"}), ("sliding", {"model_type": "mistral", "sliding_window": 8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert main([part.replace("{tmp}", str(tmp_path)) for part in command]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"distill {command[0]}: ")
    assert "Traceback" not in error
    assert error.count("\n") <= 5
    assert not list(tmp_path.glob("run/stages")), "nothing is begun before the mistake is found"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"distill {verb}" in text, "a command to paste"
    assert ("CHECKPOINT" if verb == "merge" else "CONFIG") in text
    assert ("key=value" in text) != (verb == "merge")


def test_unknown_verb_and_missing_target() -> None:
    for command in (["scor", "demo"], ["run"], []):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
