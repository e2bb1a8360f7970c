"""Accelerate on hybrids: prepared, trained in mixed precision, saved and loaded, and brought in from a folder."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments


@pytest.fixture
def accelerator_for() -> Iterator[Callable[..., Accelerator]]:
    """``accelerator_for(**keys)``: an Accelerator on the CPU; Accelerate's state is as before afterwards."""

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def make(**keys: Any) -> Accelerator:
        forget()
        return Accelerator(cpu=True, **keys)

    yield make
    forget()


def steps(accelerator: Accelerator, model: Any, optimizer: Any, ids: Tensor, number: int) -> list[float]:
    """Losses of a few training steps on one batch."""
    losses = []
    for _ in range(number):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def prepared(accelerator: Accelerator, model: Any) -> tuple[Any, Any]:
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_state_is_saved_and_loaded(
    swapped: Any, chain: Tensor, precision: str, accelerator_for: Callable[..., Accelerator], tmp_path: Path
) -> None:
    """Training goes on from a saved state as if it had never stopped, to the same bits."""
    again = copy.deepcopy(swapped)
    accelerator = accelerator_for(mixed_precision=precision)
    model, optimizer = prepared(accelerator, swapped.train())
    losses = steps(accelerator, model, optimizer, chain, 15)
    assert losses[-1] < 0.7 * losses[0]
    accelerator.save_state(str(tmp_path / "state"))
    expected = steps(accelerator, model, optimizer, chain, 3)

    accelerator = accelerator_for(mixed_precision=precision)
    resumed, optimizer = prepared(accelerator, again.train())
    accelerator.load_state(str(tmp_path / "state"))
    assert steps(accelerator, resumed, optimizer, chain, 3) == expected
    for name, parameter in resumed.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_scans_stay_exact_under_autocast(
    swapped: Any, chain: Tensor, accelerator_for: Callable[..., Accelerator]
) -> None:
    """bf16 mixed precision reaches the projections and not what the states decay by; the gradients are fp32."""
    exact = swapped(input_ids=chain, labels=chain).loss
    accelerator = accelerator_for(mixed_precision="bf16")
    model, _ = prepared(accelerator, swapped.train())
    seen: dict[str, torch.dtype] = {}
    mixer = swapped.model.layers[0].self_attn
    mixer.in_proj.register_forward_hook(lambda _, __, output: seen.update(projected=output.dtype))
    loss = model(input_ids=chain, labels=chain).loss
    assert seen["projected"] == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)
    accelerator.backward(loss)
    for name, parameter in swapped.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all() and bool(parameter.grad.any()), name


def test_the_plain_trainer_learns(swapped: Any, chain: Tensor, tmp_path: Path) -> None:
    """transformers' Trainer, which stands on Accelerate: its columns reach the model, its checkpoint is loaded."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row, "no_column_of_ours": 1} for row in chain] * 8
    trainer = Trainer(model=swapped, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, swapped.get_parameter(name)) for name, p in loaded.named_parameters())


@torch.no_grad()
def test_unwrapped_and_saved_it_is_a_checkpoint(
    swapped: Any, chain: Tensor, accelerator_for: Callable[..., Accelerator], tmp_path: Path
) -> None:
    accelerator = accelerator_for(mixed_precision="bf16")
    model, _ = prepared(accelerator, swapped)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert type(unwrapped) is type(swapped)
    unwrapped.save_pretrained(
        tmp_path, save_function=accelerator.save, state_dict=accelerator.get_state_dict(model), max_shard_size="100KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(chain).logits, unwrapped.eval()(chain).logits)


PLACES = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
PLACES |= {f"model.layers.{block}": "disk" if block < 2 else "cpu" for block in range(4)}
"""A mixer and an attention block are left on disk until they are used, a mixer and an attention block are not."""


def dispatched(folder: Path, places: dict[str, str]) -> Any:
    """Empty weights, filled from a folder."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, folder, device_map=places, offload_folder=str(folder / "disk"))


BROUGHT: dict[str, Callable[[Path], Any]] = {
    "dispatched": lambda folder: dispatched(folder, {"": "cpu"}),
    "dispatched_disk": lambda folder: dispatched(folder, PLACES),
    "from_pretrained_disk": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, device_map=PLACES, offload_folder=folder / "disk"
    ),
    "offloaded": lambda folder: cpu_offload(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu")),
}


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Accelerate collects garbage at every tensor: what was there before is left out of it."""
    gc.freeze()
    yield
    gc.unfreeze()


@torch.no_grad()
@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize("way", BROUGHT)
def test_brought_in_from_a_folder(swapped: Any, chain: Tensor, way: str, tmp_path: Path) -> None:
    """Also where weights come only when they are used; they go again afterwards."""
    swapped.save_pretrained(tmp_path, max_shard_size="100KB")
    model = BROUGHT[way](tmp_path).eval()
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert bool(away) == (way != "dispatched")
    assert torch.equal(model(chain).logits, swapped(chain).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(chain, **options), swapped.generate(chain, **options))
    assert [name for name, parameter in model.named_parameters() if parameter.is_meta] == away
    if "disk" in way:
        blocks = {".".join(name.split(".")[:3]) for name in away}
        assert blocks == {"model.layers.0", "model.layers.1"}
