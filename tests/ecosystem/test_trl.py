"""TRL's own trainers on hybrids, given what any user would give them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from distill.data.families import draw
from distill.hybrid.targets import lora_targets

COMMON: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "max_length": 96,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "packing_strategy": "bfd"},
}
"""How TRL can put several documents in a batch."""


@pytest.fixture(scope="module")
def talks() -> Dataset:
    """Questions with worked answers, as chats of various lengths."""
    rng = random.Random(0)
    return Dataset.from_list([{"messages": draw("mod", rng, held_out=False).messages} for _ in range(96)])


@pytest.fixture(scope="module")
def preferences() -> Dataset:
    """A question, the answer to it, and the answer to another."""
    rng = random.Random(0)
    drawn = [draw("mod", rng, held_out=False).messages for _ in range(96)]
    return Dataset.from_list(
        [
            {"prompt": ours[:1], "chosen": ours[1:], "rejected": [{"role": "assistant", "content": "no"}]}
            for ours in drawn
        ]
    )


def losses(trainer: Any) -> list[float]:
    """What each step of a training logged."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_sft_learns_and_is_loaded_again(swapped: Any, way: str, talks: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    swapped.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    arguments = SFTConfig(output_dir=str(tmp_path / "out"), assistant_only_loss=True, **COMMON | WAYS[way])
    trainer = SFTTrainer(model=str(tmp_path / "hybrid"), args=arguments, train_dataset=talks)
    assert type(trainer.model) is type(swapped)
    trainer.train()
    seen = losses(trainer)
    assert len(seen) == 8 and seen[-1] < 0.7 * seen[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
        assert not torch.equal(tensor, swapped.state_dict()[name]), f"{name} did not move"


@torch.no_grad()
@pytest.mark.parametrize("way", ["padding_free", "packed"])
def test_sft_keeps_documents_apart(swapped: Any, way: str, talks: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    """The loss of TRL's batch is the mean over the targets of its documents, each alone."""
    plain = copy.deepcopy(swapped)  # TRL gives the model a forward with its own head
    arguments = SFTConfig(output_dir=str(tmp_path), shuffle_dataset=False, **COMMON | WAYS[way])
    trainer = SFTTrainer(model=swapped, args=arguments, train_dataset=talks, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    documents = batch["input_ids"][0].tensor_split((batch["position_ids"][0] == 0).nonzero()[1:, 0])
    assert len(documents) > 2
    total = sum(plain(ids[None], labels=ids[None]).loss * (len(ids) - 1) for ids in documents)
    expected = total / sum(len(ids) - 1 for ids in documents)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected, atol=1e-5, rtol=1e-5)
    as_one = plain(batch["input_ids"], labels=batch["labels"]).loss
    assert (as_one - expected).abs() > 1e-3, "states that run on are seen"


@pytest.mark.parametrize(
    ("mixer", "reference"),
    [
        ("mamba1", "given"),
        ("mamba2", "given"),
        ("mamba1", "adapter_off"),
        ("mamba2", "adapter_off"),
        ("mamba2", "loaded"),
    ],
)
def test_dpo_learns_to_prefer(
    make_hybrid: Callable[[str], Any], mixer: str, reference: str, preferences: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """The reference: a model given, the model without its adapters, or what TRL loads itself."""
    swapped = make_hybrid(mixer)
    swapped.save_pretrained(tmp_path / "hybrid")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    options = {
        "given": {"ref_model": copy.deepcopy(model)},
        "adapter_off": {"peft_config": LoraConfig(r=4, target_modules=lora_targets(model))},
        "loaded": {},
    }[reference]
    arguments = DPOConfig(output_dir=str(tmp_path / "out"), **{**COMMON, "per_device_train_batch_size": 4})
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=preferences, processing_class=tokenizer, **options)
    trainer.train()
    seen = losses(trainer)
    assert seen[0] == pytest.approx(0.6931, abs=1e-3), "model and reference start as one"
    assert seen[-1] < 0.5 * seen[0]
    if trainer.ref_model is not None:
        for name, tensor in trainer.ref_model.state_dict().items():
            assert torch.equal(tensor, swapped.state_dict()[name]), name
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    ids = torch.arange(10, 34)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert torch.equal(tuned(ids).logits, expected) and not torch.equal(swapped(ids).logits, expected)
