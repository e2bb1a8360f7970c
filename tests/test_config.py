"""Configs: defaults < file < overrides, errors that say what is allowed, and the configs that we ship."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import PretrainConfig, RunConfig, SourceConfig
from distill.config_merge import dump_config, load_config, merge_config
from distill.data.families import FAMILIES
from distill.errors import UserError
from distill.losses import LOSSES
from distill.schedule import PAPER_BLOCKS, PAPER_SCHEDULE, build_schedule, scaled
from stages.targets import check, config_path, shipped_configs


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\ntrain: {steps: 7, batch_size: 6}\nschedule: [1, 2]\ndata: {mix: {add: 9}}\n")
    config = load_config(RunConfig, path, ["train.steps=9", "data.mix.mod=0.5", "schedule=[3]", "score.mmr.steps=4"])
    assert config.name == "mine"
    assert (config.train.steps, config.train.batch_size) == (9, 6)
    assert config.train.learning_rate == RunConfig().train.learning_rate
    assert config.schedule == [3]
    assert (config.data.mix["add"], config.data.mix["mod"]) == (9.0, 0.5)
    assert config.score.mmr.steps == 4
    assert load_config(RunConfig, path).train.steps == 7


def test_the_last_override_wins() -> None:
    assert merge_config(RunConfig, [], ["seed=1", "seed=2"]).seed == 2


def test_values_are_typed() -> None:
    config = merge_config(RunConfig, [], ["train.learning_rate=1", "name=5", "train.gradient_checkpointing=true"])
    assert isinstance(config.train.learning_rate, float)
    assert config.name == "5"
    assert config.train.gradient_checkpointing is True
    assert type(config.train).__name__ == "TrainConfig"


def test_an_override_may_hold_an_equals_sign() -> None:
    assert merge_config(RunConfig, [], ["slurm.setup=['export A=b']"]).slurm.setup == ["export A=b"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stesp=5", ["train.stesp", "did you mean 'steps'?", "learning_rate"]),
        ("mixr.name=mamba1", ["'mixr'", "did you mean 'mixer'?"]),
        ("score.mmr.heldout_token=5", ["score.mmr.heldout_token", "did you mean 'heldout_tokens'?"]),
        ("zzzzzzzz=5", ["unknown key 'zzzzzzzz'", "allowed: name, teacher"]),
        ("cluster=h100", ["unknown key 'cluster' (did you mean 'slurm.cluster'?)"]),
        ("heldout_tokens=5", ["'score.mmr.heldout_tokens' or 'score.aligned.heldout_tokens'?"]),
        ("steps=5", ["'train.steps' or 'sft.steps' or 'score.mmr.steps'"]),
        ("=5", ["unknown key ''"]),
        ("train.steps=many", ["train.steps", "many", "Integer"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("train.steps=true", ["train.steps", "True"]),
        ("train.learning_rate=fast", ["train.learning_rate", "fast"]),
        ("seed=null", ["seed", "None"]),
        ("schedule=5", ["schedule"]),
        ("schedule=[a]", ["schedule[0]", "'a'"]),
        ("data.mix.add=lots", ["data.mix.add", "lots"]),
        ("train=3", ["train=3", "TrainConfig"]),
        ("train.steps.more=3", ["train.steps"]),
        ("steps", ["expected key=value, got 'steps'"]),
    ],
)
def test_a_bad_override_is_refused_and_named(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, write(tmp_path, "name: mine\n"), ["seed=1", override])
    assert all(part in str(caught.value) for part in [override, *parts]), caught.value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trian: {steps: 5}", ["unknown key 'trian'", "did you mean 'train'?"]),
        ("train: {stesp: 5}", ["unknown key 'train.stesp'", "did you mean 'steps'?"]),
        ("train: {steps: many}", ["train.steps", "many"]),
        ("train: 5", ["TrainConfig"]),
        ("data: null", ["data"]),
        ("1: 2", ["unknown key '1'"]),
        ("", ["found nothing"]),
        ("# a comment\n", ["found nothing"]),
        ("- a\n- b\n", ["found a list"]),
        ("a: [", ["is not YAML"]),
        ("name: a\nname: b\n", ["is not YAML", "duplicate"]),
        ("seed: 1\n---\nseed: 2\n", ["is not YAML"]),
        ("name: !!python/object/apply:os.getcwd []", ["is not YAML"]),
    ],
)
def test_a_bad_file_is_refused_and_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, path)
    assert all(part in str(caught.value) for part in [str(path), *parts]), caught.value


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"my\.yaml is not YAML"):
        load_config(RunConfig, tmp_path / "my.yaml")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read config .*none\.yaml: No such file"):
        load_config(RunConfig, tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read config .*: Is a directory"):
        load_config(RunConfig, tmp_path)
    path = write(tmp_path, "name: mine\n")
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        with pytest.raises(UserError, match=r"cannot read config .*Permission denied"):
            load_config(RunConfig, path)


@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig])
def test_the_defaults_survive_a_round_trip(kind: Any, tmp_path: Path) -> None:
    assert load_config(kind, write(tmp_path, dump_config(kind()))) == kind()


def test_the_resolved_config_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(RunConfig, config_path("apriel_h1_15b"), ["train.steps=3", "data.mix.add=0.1"])
    assert load_config(RunConfig, write(tmp_path, dump_config(config))) == config


def test_defaults_are_not_shared() -> None:
    RunConfig().data.mix["add"] = 77.0
    assert RunConfig().data.mix["add"] == 1.0
    assert merge_config(RunConfig, []).data.mix["add"] == 1.0


def test_the_defaults_mix_every_family_and_pass_the_check() -> None:
    assert set(RunConfig().data.mix) == set(FAMILIES)
    check(RunConfig())


def test_what_is_shipped() -> None:
    assert {"demo", "smoke", "teacher", "apriel_h1_15b"} <= shipped_configs().keys()


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_config(name: str) -> None:
    path = shipped_configs()[name]
    text = path.read_text()
    if "\noutput:" in text:
        pretrain = load_config(PretrainConfig, path)
        assert pretrain.train.loss == "cross_entropy"
        families = {"add", "recall", "sort"} if name == "teacher_small" else set(FAMILIES)
        assert set(pretrain.data.mix) == families
        if not pretrain.start:
            assert pretrain.model["num_attention_heads"] % pretrain.model["num_key_value_heads"] == 0
        assert pretrain.name == name
        return
    config = load_config(RunConfig, path)
    check(config)
    assert config.name == name
    assert config.train.loss in LOSSES
    blocks = int(config.teacher_config.get("num_hidden_layers", 10))  # 10: the embedded teacher
    wanted = config.schedule or scaled(PAPER_SCHEDULE, PAPER_BLOCKS, blocks)
    assert [stage.replaced for stage in build_schedule(config, blocks)] == wanted


@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig])
def test_every_value_of_a_config_has_a_default_of_its_own_type(kind: Any) -> None:
    """``???`` or None in a default would only show when it is read."""

    def leaves(value: Any) -> list[Any]:
        return (
            [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name))] if is_dataclass(value) else [value]
        )

    assert all(leaf is not None and leaf != "???" for leaf in leaves(kind()))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("dtype=float64", "dtype 'float64'"),
        ("kernels=gpu", "kernels 'gpu'"),
        ("mixer.name=mamba", "did you mean 'mamba2'?"),
        ("mixer.init=mill", "did you mean 'mil'?"),
        ("train.loss=reverse-kl", "did you mean 'reverse_kl'?"),
        ("data.mask=completions", "did you mean 'completion'?"),
        ("score.first=lo", "did you mean 'loo'?"),
        ("score.later=mrm", "did you mean 'mmr'?"),
        ("train.steps=0", "train.steps"),
        ("train.steps_by_stage=[5,-1]", "must be above 0"),
        ("train.batch_size=0", "train.batch_size=0"),
        ("train.learning_rate=-1", "train.learning_rate=-1"),
        ("train.temperature=0", "train.temperature=0"),
        ("train.gradient_accumulation=3", "not divisible"),
        ("data.sequence_length=0", "data.sequence_length=0"),
        ("measure.throughput.batches=[]", "at least one batch"),
        ("measure.throughput.batches=[0,4]", "measure.throughput.batches"),
        ("measure.throughput.contexts=[-4,64]", "measure.throughput.contexts"),
    ],
)
def test_a_value_that_no_step_could_work_with_is_refused(override: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        check(merge_config(RunConfig, [], [override]))
    assert part in str(caught.value)


def test_a_free_mapping_is_replaced_by_a_file_and_changed_by_a_dotted_key(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("data: {mix: {add: 2.0}}\n")
    assert load_config(RunConfig, path).data.mix == {"add": 2.0}
    assert load_config(RunConfig, path, ["data.mix.mod=1"]).data.mix == {"add": 2.0, "mod": 1.0}
    assert load_config(RunConfig, path, ["data.mix={sort: 3}"]).data.mix == {"sort": 3.0}


def test_a_mixture_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {mixture: [{source: embedded, weight: 1}, {source: a.jsonl, weight: 3}]}\n")
    config = load_config(RunConfig, path)
    assert config.data.mixture == [SourceConfig("embedded", 1.0), SourceConfig("a.jsonl", 3.0)]
    assert merge_config(RunConfig, [("file", yaml.safe_load(dump_config(config)))]) == config
    for text in (
        "[{source:b.c.jsonl,weight:2},{source:embedded}]",
        "[{source: b.c.jsonl, weight: 2}, {source: embedded}]",
    ):
        changed = load_config(PretrainConfig, path, [f"data.mixture={text}"])
        assert changed.data.mixture == [SourceConfig("b.c.jsonl", 2.0), SourceConfig("embedded", 1.0)]


def test_colons_need_no_space_on_the_command_line() -> None:
    config = merge_config(RunConfig, [], ["data.mix={add:3,sort: 1}", "slurm.setup=['a:b']"])
    assert config.data.mix == {"add": 3.0, "sort": 1.0}
    assert config.slurm.setup == ["a:b"]


def test_one_source_of_a_mixture_can_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {mixture: [{source: embedded}, {source: a.jsonl, weight: 3}]}\nschedule: [3, 4]\n")
    texts = ["data.mixture.1.weight=2", "data.mixture.0.columns.text=body", "schedule.1=5"]
    config = load_config(RunConfig, path, texts)
    assert config.data.mixture == [SourceConfig("embedded", columns={"text": "body"}), SourceConfig("a.jsonl", 2.0)]
    assert config.schedule == [3, 5]
    for text, message in {
        "data.mixture.2.weight=1": r"data\.mixture has 2 items",
        "data.mixture.0.wieght=1": r"unknown key 'data\.mixture\[0\]\.wieght' \(did you mean 'weight'\?\)",
        "data.mixture.0.weight=heavy": "heavy",
        "data.mixture.0=5": r"data\.mixture\[0\]: expected \{source",
        "schedule.0.x=1": "expected a whole number",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(RunConfig, path, [text])
