"""The public interface: each form of a placement, scores that choose blocks, a training, errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import distill
from distill.api import Loaded
from distill.config import MixerConfig
from distill.data import suite
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.likelihood import requests_of
from distill.scoring import Scores
from eval.loglikelihood import prepare

IDS = torch.randint(5, 56, (2, 12), generator=torch.Generator().manual_seed(0))
QUESTIONS = [
    {"prompt": "add 1+1", "choices": ["<think>1+1=2</think>2", "<think>1+1=3</think>2"], "gold": 0},
    {"prompt": "add 2+2", "choices": ["5", "4", "3"], "gold": 1},
]
SCORES = Scores("loo", [2, 0, 3, 1], {"blocks": [{"block": block, "score": 0.0} for block in range(4)]})
SMALL = {"steps": 2, "batch_size": 2, "sequence_length": 64, "heldout_tokens": 64, "warmup_steps": 0}


def test_importing_the_package_stays_light_and_names_what_it_has() -> None:
    text = (
        "import sys, distill\n"
        "heavy = [name for name in ('distill.api', 'trl', 'datasets', 'omegaconf', 'lm_eval') if name in sys.modules]\n"
        "listed = set(dir(distill)) >= {*distill.__all__, '__version__'}\n"
        "from transformers import AutoConfig\n"
        "known = AutoConfig.for_model('hybrid_llama', mixers=['attention'], num_hidden_layers=1).model_type\n"
        "print(heavy, listed, known, callable(distill.load), distill.Scores.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['omegaconf'] True hybrid_llama True Scores"  # MixerConfig's defaults need omegaconf
    with pytest.raises(AttributeError, match="no attribute 'hybridise'"):
        distill.hybridise  # noqa: B018


def test_every_form_of_a_placement_gives_the_same_hybrid(llama: Any) -> None:
    mixers = ["mamba2", "attention", "mamba2", "attention"]
    wanted = hybridize(llama, mixers, MixerConfig(name="mamba2"), seed=3)(IDS).logits
    for placement in ([0, 2], (2, 0), {0, 2}, {2: "mamba2", 0: "mamba2"}, mixers, torch.tensor([0, 2])):
        assert torch.equal(distill.hybridize(llama, placement, "mamba2", seed=3)(IDS).logits, wanted), placement
    for name in ("H1-2", "H1-2/4"):
        assert torch.equal(distill.hybridize(llama, name, "mamba2", scores=SCORES, seed=3)(IDS).logits, wanted)


def test_options_reach_the_mixer(llama: Any) -> None:
    hybrid = distill.hybridize(llama, {1: "mamba1"}, d_state=8, mil_layout="faithful", init="fresh")
    assert hybrid.config.mixer_config["d_state"] == 8 and hybrid.config.mixer_config["mil_layout"] == "faithful"
    fresh, mil = hybrid, distill.hybridize(llama, [1], d_state=8, mil_layout="faithful")
    assert not torch.equal(fresh(IDS).logits, mil(IDS).logits)


def test_a_hybrid_grows_with_the_options_that_it_has(llama: Any) -> None:
    hybrid = distill.hybridize(llama, [1], d_state=8, bc_norm="always", mil_layout="faithful")
    more = distill.hybridize(hybrid, [2])
    assert more.config.mixer_config == hybrid.config.mixer_config
    with pytest.raises(UserError, match="d_state=16, but the mixers already there have d_state=8"):
        distill.hybridize(hybrid, [2], d_state=16)


def test_a_hybrid_grows(llama: Any) -> None:
    first = distill.hybridize(llama, [2], "mamba2")
    second = distill.hybridize(first, "H1-3", "mamba1", scores=Scores("mmr", [0, 3, 1], {}))
    assert second.config.mixers == ["mamba1", "attention", "mamba2", "mamba1"]
    assert first.config.mixers == ["attention", "attention", "mamba2", "attention"]


@pytest.mark.parametrize(
    ("placement", "options", "message"),
    [
        ([4], {}, r"block 4 is out of range; expected a value in \[0, 4\)"),
        ([-1], {}, "block -1 is out of range"),
        ([1, 1], {}, "block 1 already has mixer 'mamba1'"),
        (3, {}, r"placement=3: give a list of blocks, such as \[3, 6, 7\]"),
        (None, {}, "placement=None: give a list"),
        (torch.tensor([1.7]), {}, "which is no block"),
        ("H1-2/4", {"scores": [1, 2]}, "scores is a list: give what distill.score gave"),
        ([1.5], {}, "placement has 1.5, which is no block"),
        ([True], {}, "placement has True"),
        ([1, "mamba1"], {}, "placement has 'mamba1', which is no block"),
        ([0, 1, 2, 3], {}, "at least one block must keep attention"),
        (["mamba1", "attention"], {}, "placement has 2 mixers for 4 blocks"),
        (
            ["mamba1", "attenton", "attention", "attention"],
            {},
            r"mixer of block 1: 'attenton' \(did you mean 'attention'",
        ),
        ({1: "mamba3"}, {}, r"mixer of block 1: 'mamba3' \(did you mean 'mamba2'"),
        ({"1": "mamba1"}, {}, "placement has '1'"),
        ("H1-2/4", {}, "give scores=distill.score"),
        ("H1-2/10", {"scores": SCORES}, "a model with 10 blocks, this one has 4"),
        ("H1-9", {"scores": SCORES}, "cannot take 9 blocks: 4 were scored"),
        ("half", {}, "is no hybrid name"),
        ([1], {"mixer": "mamba3"}, "did you mean 'mamba2'"),
        ([1], {"init": "mli"}, "did you mean 'mil'"),
        ([1], {"dstate": 8}, r"unknown option 'dstate' \(did you mean 'd_state'\?\)"),
        ([1], {"d_state": "many"}, "d_state: .*expected a whole number"),
        ([1], {"d_state": 24}, "must divide head_dim=32"),
        ([1], {"mixer": "mamba2", "d_state": 8}, "mixer.d_state=8 does nothing with mamba2: its state is as wide"),
        ([1], {"seed": "a"}, "seed='a' must be a whole number"),
        ([1], {"name": "mamba1"}, "unknown option 'name'"),
        ([1], {"blocks": {2: "mamba2"}}, "unknown option 'blocks'"),
    ],
)
def test_a_placement_that_cannot_be(llama: Any, placement: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill.hybridize(llama, placement, **options)


def test_load_gives_model_and_tokenizer(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    hybrid = distill.hybridize(llama, [1])
    hybrid.save_pretrained(tmp_path / "train/checkpoint")
    tokenizer.save_pretrained(tmp_path / "train/checkpoint")
    for place in (tmp_path, tmp_path / "train", str(tmp_path / "train/checkpoint")):
        loaded = distill.load(place)
        model, found = loaded
        assert loaded.model is model and loaded.tokenizer is found and not model.training
        assert torch.equal(model(IDS).logits, hybrid(IDS).logits)
        assert found.encode("add 1+1") == tokenizer.encode("add 1+1")
    assert distill.load(tmp_path, dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("nowhere/at/all", {}, "no model 'nowhere/at/all'"),
        ("", {}, "give a folder with config.json"),
        (".", {}, "is no checkpoint"),
        ("embedded", {"dtype": "float16"}, "unknown dtype 'float16'.*; allowed: bfloat16, float32"),
    ],
)
def test_what_cannot_be_loaded(
    place: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        distill.load(place, **options)


def test_the_embedded_questions_are_those_of_the_lm_eval_task(llama: Any, tokenizer: Any) -> None:
    ours, theirs = requests_of(suite.choice()[:25], tokenizer), prepare("embedded_choice", tokenizer, llama, 25)
    assert ours.gold == theirs.gold
    assert sorted(ours.requests, key=repr) == sorted(theirs.requests, key=repr)


def test_loo_scores_every_block_and_leaves_the_model_alone(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    llama.train().requires_grad_(True)
    llama.lm_head.weight.requires_grad_(False)
    scores = distill.score(llama, tokenizer, questions=20)
    assert llama.training and not llama.lm_head.weight.requires_grad and llama.model.norm.weight.requires_grad
    assert sorted(scores.order) == [0, 1, 2, 3] and scores.least(2) == sorted(scores.order[:2])
    assert list(scores.table["block"]) == list(scores.order) and {"importance", "stderr"} <= set(scores.table.columns)
    assert scores.record["questions"] == 20 and "least important first" in str(scores)
    same = distill.score(llama, tokenizer, metric=prepare("embedded_choice", tokenizer, llama, 20).compare)
    assert same.record["blocks"] == scores.record["blocks"]
    hybrid = distill.hybridize(llama, [1])
    assert sorted(distill.score(hybrid, tokenizer, questions=2).order) == [0, 2, 3]


def test_questions_of_ones_own(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    rows = distill.score(llama, tokenizer, data=QUESTIONS)
    file = distill.score(llama, tokenizer, data=tmp_path / "questions.jsonl")
    assert rows.record["questions"] == 2 and rows.record["blocks"] == file.record["blocks"]
    assert distill.score(llama, tokenizer, data=QUESTIONS, questions=1).record["questions"] == 1


def test_mmr_scores_by_a_short_distillation(llama: Any, tokenizer: Any) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    seen: list[int] = []
    scores = distill.score(
        llama, tokenizer, method="mmr", mixer="mamba2", report=lambda block, row: seen.append(block), **SMALL
    )
    assert seen == [0, 1, 2, 3] and scores.record["steps"] == 2
    assert (scores.table["importance"].diff().dropna() >= 0).all() and "loss_start" in scores.table
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lo"}, "did you mean 'loo'"),
        ({"questions": 1.5}, "questions=1.5 must be a whole number"),
        ({"data": None}, "data is a NoneType"),
        ({"method": "mmr", "heldout_tokens": 0}, "held-out rows=0 must be above 0"),
        ({"questions": -1}, "questions=-1 must be a whole number, at least 0"),
        ({"steps": 3}, "loo takes no 'steps'"),
        ({"method": "mmr", "questions": 5}, "mmr takes no 'questions'"),
        ({"method": "mmr", "seed": "a"}, "seed='a' must be a whole number"),
        ({"data": []}, "no questions"),
        ({"data": [{"prompt": "a", "choices": ["b"], "gold": 0}]}, "at least two texts"),
        ({"data": [{"prompt": "a", "choices": ["b", "c"], "gold": 2}]}, "gold=2: expected which of the 2 choices"),
        ({"data": [{"choices": ["b", "c"], "gold": 0}]}, "a question has prompt"),
        ({"data": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"steps_per_block": 3}, "loo takes no option 'steps_per_block'"),
        ({"method": "mmr", "learning_rat": 3}, "did you mean 'learning_rate'"),
        ({"method": "mmr", "steps": 0}, "steps=0 must be above 0"),
        ({"method": "mmr", "trainable": "some"}, "allowed: all, block, mixer"),
        ({"method": "mmr", "data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"method": "mmr", "data": QUESTIONS}, "training wants"),
        ({"method": "mmr", "loss": "kl"}, "unknown loss"),
    ],
)
def test_scores_that_cannot_be(llama: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill.score(llama, tokenizer, **options)


def test_mmr_of_a_hybrid_needs_its_teacher(llama: Any, tokenizer: Any) -> None:
    hybrid = distill.hybridize(llama, [1])
    with pytest.raises(UserError, match="give teacher="):
        distill.score(hybrid, tokenizer, method="mmr", **SMALL)
    scores = distill.score(hybrid, tokenizer, method="mmr", teacher=llama, **{**SMALL, "steps": 1})
    assert sorted(scores.order) == [0, 2, 3]


def test_train_distils_in_place(llama: Any, tokenizer: Any) -> None:
    hybrid = distill.hybridize(llama, [0, 3], "mamba2")
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    record = distill.train(
        hybrid,
        llama,
        tokenizer,
        steps=6,
        batch_size=4,
        learning_rate=3e-3,
        warmup_steps=0,
        sequence_length=64,
        eval_rows=4,
    )
    assert record["eval_loss_end"] < record["eval_loss_start"] and record["tokens"] == 6 * 4 * 64
    assert not hybrid.training and hybrid.config.use_cache
    assert any(not torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"stepps": 3}, "unknown option 'stepps'"),
        ({"loss": "reverse_lk"}, "did you mean 'reverse_kl'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"batch_size": 3, "gradient_accumulation": 2}, "not divisible"),
        ({"mask": "prompt"}, "allowed: all, assistant, completion"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation=0 must be above 0"),
        ({"eval_rows": 0}, "held-out rows=0 must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"steps": 1.5}, "steps=1.5 must be a whole number"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"seed": -1}, "seed=-1 must be a whole number, at least 0"),
    ],
)
def test_a_training_that_cannot_be(llama: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill.train(distill.hybridize(llama, [1]), llama, tokenizer, **options)


def test_weights_that_are_not_float32_are_not_trained(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    teacher = make_llama()
    with pytest.raises(UserError, match="load it with dtype='float32'"):
        distill.train(distill.hybridize(teacher.bfloat16(), [1]), teacher, tokenizer)
    other = make_llama(vocab_size=80)
    with pytest.raises(UserError, match="vocabularies of 80 and"):
        distill.train(distill.hybridize(other, [1]), teacher, tokenizer)


def test_what_is_no_model_is_refused(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    """What people have at hand instead: what load gives, a backbone, a wrapper, weights elsewhere, the wrong order."""
    llama = make_llama()
    hybrid = distill.hybridize(llama, [1])
    for given in (Loaded(llama, tokenizer), llama.config, llama.model, torch.compile(llama), None):
        with pytest.raises(UserError, match=f"model is a {type(given).__name__}: give a transformers causal LM"):
            distill.hybridize(given, [1])
    with pytest.raises(UserError, match="model is a str"):
        distill.score("embedded", tokenizer)
    for given in (None, "embedded"):
        with pytest.raises(UserError, match=f"tokenizer is a {type(given).__name__}: give that of the model"):
            distill.score(llama, given)
        with pytest.raises(UserError, match=f"tokenizer is a {type(given).__name__}: give that of the model"):
            distill.train(hybrid, llama, given)
    with pytest.raises(UserError, match="teacher is a str"):
        distill.train(hybrid, "embedded", tokenizer)
    with pytest.raises(UserError, match="student is a llama, no hybrid"):
        distill.train(llama, hybrid, tokenizer)
    with pytest.raises(UserError, match="no weights at hand for model.embed_tokens.weight"):
        distill.hybridize(make_llama().to("meta"), [1])


def test_a_training_that_fails_leaves_a_model_to_generate_with(llama: Any, tokenizer: Any) -> None:
    hybrid = distill.hybridize(llama, [1])
    with pytest.raises(UserError, match="became"):
        distill.train(hybrid, llama, tokenizer, steps=2, batch_size=2, sequence_length=64, eval_rows=2,
                      learning_rate=1e30, warmup_steps=0)  # fmt: skip
    assert not hybrid.training and hybrid.config.use_cache


def test_a_device_that_is_not_there_is_named_before_weights_load() -> None:
    for device in ("cudaa", "cuda:77"):
        with pytest.raises(UserError, match=f"device='{device}' cannot be used here"):
            distill.load("embedded", device=device)
