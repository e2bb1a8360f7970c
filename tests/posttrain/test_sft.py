"""Fine-tuning through TRL: it learns, on our masks and documents, and resumes to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from distill.config import MixerConfig, TrainConfig
from distill.data.pack import IGNORE, collate
from distill.hybrid.surgery import hybridize
from distill.posttrain import sft
from distill.posttrain.sft import PackedDataset, TraceTrainer, fine_tune, sft_arguments
from distill.trainer import LanguageTrainer, heldout_loss, training_arguments

Traces = Callable[..., Any]
PLACEMENT = ["mamba1", "attention", "attention", "mamba1"]


def tune(model: Any, tokenizer: Any, rows: Any, output: Path, *, steps: int, **changes: Any) -> TraceTrainer:
    log = changes.pop("log", None)
    options = TrainConfig(**{"batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, **changes})
    return fine_tune(model, tokenizer, rows, options, steps, output, seed=0, log=log)


@pytest.fixture
def trainer(hybrid: Any, tokenizer: Any, traces: Traces, tmp_path: Path) -> TraceTrainer:
    """A trainer of H1-2/4, nothing trained yet."""
    arguments = sft_arguments(TrainConfig(batch_size=4), 2, tmp_path / "trainer", 0)
    rows = PackedDataset(traces(8))
    return TraceTrainer(
        model=hybrid.train(), args=arguments, train_dataset=rows, data_collator=collate, processing_class=tokenizer
    )


def test_it_lowers_the_heldout_loss(hybrid: Any, tokenizer: Any, traces: Traces, tmp_path: Path) -> None:
    heldout = traces(8, seed=9, held_out=True)
    before = {name: tensor.clone() for name, tensor in hybrid.named_parameters()}
    start = heldout_loss(hybrid, None, heldout, 4, "cross_entropy")
    tune(hybrid, tokenizer, traces(80), tmp_path / "out", steps=20, log=tmp_path / "log.jsonl")
    end = heldout_loss(hybrid, None, heldout, 4, "cross_entropy")
    assert 0 < end < 0.8 * start
    for name, parameter in hybrid.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in log] == [4 * 64 * step for step in range(1, 21)]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in log)
    assert not list((tmp_path / "out").glob("*")), "no checkpoint was asked for"


@pytest.mark.parametrize("hybrid", ["llama", "granite"], indirect=True)
def test_heldout_cross_entropy_is_the_models_own_loss(hybrid: Any, traces: Traces) -> None:
    batch = collate([traces(4)[i] for i in range(4)])
    with torch.no_grad():
        expected = hybrid(**batch, use_cache=False).loss.item()
    assert heldout_loss(hybrid, None, traces(4), 4, "cross_entropy") == pytest.approx(expected, rel=1e-5)


def test_rows_reach_the_model_as_they_are(trainer: TraceTrainer, traces: Traces) -> None:
    """TRL neither tokenises nor packs nor shuffles."""
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    for name, tensor in batch.items():
        assert torch.equal(tensor.cpu(), torch.stack([traces(8)[i][name] for i in range(4)]))
    assert not trainer.args.gradient_checkpointing and not trainer.args.bf16, "TRL's defaults are on"


def test_loss_and_gradients_equal_those_of_our_own_trainer(
    trainer: TraceTrainer, hybrid: Any, traces: Traces, tmp_path: Path
) -> None:
    rows = traces(8)
    plain = hybridize(hybrid, PLACEMENT, MixerConfig()).train()
    plain.load_state_dict(hybrid.state_dict())
    ours = LanguageTrainer(
        model=plain, args=training_arguments(TrainConfig(batch_size=4), 2, tmp_path, 0), train_dataset=rows
    )
    batch = collate([rows[i] for i in range(4)])
    losses = [t.compute_loss(model, dict(batch)) for t, model in ((trainer, hybrid), (ours, plain))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in hybrid.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6), name


def two_documents(labelled: slice, first: int = 1, second: int = 2) -> dict[str, torch.Tensor]:
    """A row of two documents of 10 and 14 tokens (by seed), whose targets are in ``labelled``."""

    def document(length: int, seed: int) -> torch.Tensor:
        return torch.randint(5, 56, (length,), generator=torch.Generator().manual_seed(seed))

    ids = torch.cat([document(10, first), document(14, second)])
    labels = torch.full_like(ids, IGNORE)
    labels[labelled] = ids[labelled]
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(10), torch.arange(14)])}


def gradient(trainer: TraceTrainer, model: Any, row: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The loss of one row and the gradient of the first mixer, which every later token reads."""
    model.zero_grad()
    loss = trainer.compute_loss(model, collate([row]))
    loss.backward()
    return loss.item(), model.model.layers[0].self_attn.in_proj.weight.grad.clone()


def test_documents_do_not_leak(trainer: TraceTrainer, hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither through attention nor through a mixer's state, though TRL calls the backbone past our forward."""
    hybrid.config.use_cache = True
    (one, one_gradient), (other, other_gradient) = (
        gradient(trainer, hybrid, two_documents(slice(14, 24), first=seed)) for seed in (1, 3)
    )
    assert one == other > 0
    assert torch.equal(one_gradient, other_gradient)
    assert gradient(trainer, hybrid, two_documents(slice(14, 24), second=3))[0] != one
    monkeypatch.setattr(hybrid.model, "_forward_pre_hooks", {})
    without = [gradient(trainer, hybrid, two_documents(slice(14, 24), first=seed))[0] for seed in (1, 3)]
    assert without[0] != without[1], "the trap is gone: the test shows nothing"


@pytest.mark.parametrize("hybrid", ["llama", "granite"], indirect=True)
def test_only_targets_are_learned(trainer: TraceTrainer, hybrid: Any) -> None:
    """No gradient comes from what is predicted at a token without a label: changing only such tokens' labels, or
    leaving a document without targets, is as if they were not there."""
    completion = slice(18, 24)
    row = two_documents(completion)
    hybrid.zero_grad()
    trainer.compute_loss(hybrid, collate([row])).backward()
    learned = {name: parameter.grad.clone() for name, parameter in hybrid.named_parameters()}
    hybrid.zero_grad()
    logits = hybrid(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False).logits
    by_hand = torch.nn.functional.cross_entropy(logits[0, 17:23].float(), row["input_ids"][completion])
    by_hand.backward()
    for name, parameter in hybrid.named_parameters():
        assert torch.allclose(learned[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    everything = gradient(trainer, hybrid, two_documents(slice(1, 24)))
    assert everything[0] != pytest.approx(by_hand.item(), rel=1e-3), "the mask makes a difference here"


def test_micro_batches_make_no_difference(hybrid: Any, tokenizer: Any, traces: Traces, tmp_path: Path) -> None:
    rows = traces(12)
    counts = [int((rows[i]["labels"] != IGNORE).sum()) for i in range(4)]
    assert len(set(counts)) > 1, "equal counts would hide a wrong mean"
    start = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    results, losses = [], []
    for accumulation in (1, 4):
        hybrid.load_state_dict(start)
        log = tmp_path / f"{accumulation}.jsonl"
        tune(hybrid, tokenizer, rows, tmp_path / "out", steps=3, gradient_accumulation=accumulation, log=log)
        results.append({name: tensor.clone() for name, tensor in hybrid.state_dict().items()})
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    moved = torch.cat([(results[0][name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(results[0][name] - results[1][name]).flatten() for name in start]).norm()
    assert apart < 1e-2 * moved


class Cut(Exception):
    """What a kill would be."""


class CutAtStep(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise Cut


def test_resumed_equals_uninterrupted(
    llama: Any, tokenizer: Any, traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 8, "save_steps": 2, "gradient_accumulation": 2, "weight_decay": 0.1}

    def student() -> Any:
        return hybridize(llama, PLACEMENT, MixerConfig(), seed=0)

    class CutTrainer(TraceTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(CutAtStep())

    whole, resumed = student(), student()
    tune(whole, tokenizer, traces(32), tmp_path / "whole", log=tmp_path / "whole.jsonl", **options)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(sft, "TraceTrainer", CutTrainer)
        tune(student(), tokenizer, traces(32), tmp_path / "cut", log=tmp_path / "cut.jsonl", **options)
    assert (tmp_path / "cut" / "checkpoint-4").is_dir() and not (tmp_path / "cut" / "checkpoint-6").exists()
    assert not list((tmp_path / "cut").rglob("README.md")), "no model card"
    torch.manual_seed(99)  # a new process draws its own numbers first
    trainer = tune(resumed, tokenizer, traces(32), tmp_path / "cut", log=tmp_path / "cut.jsonl", **options)
    assert trainer.state.global_step == 8
    weights = whole.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.state_dict().items())
    logs = [
        [
            {**json.loads(line), "tokens_per_second": 0, "minutes": 0}
            for line in (tmp_path / name).read_text().splitlines()
        ]
        for name in ("whole.jsonl", "cut.jsonl")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_a_loss_that_is_not_finite_names_the_keys_of_sft(
    hybrid: Any, tokenizer: Any, traces: Traces, tmp_path: Path
) -> None:
    with torch.no_grad():
        hybrid.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Exception, match=r"lower sft\.learning_rate or raise sft\.warmup_steps"):
        tune(hybrid, tokenizer, traces(8), tmp_path / "out", steps=2)
