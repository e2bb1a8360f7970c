"""Aligned mixers: what they learn from, which bits they have, and a model that computes with them for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import AlignedConfig, MixerConfig
from distill.data.pack import IGNORE, collate
from distill.errors import UserError
from distill.hybrid.surgery import hybridize, new_mixer
from distill.importance.alignment import align, document_tokens, observed, relative_error, swapped
from distill.importance.mixer_store import MixerStore
from distill.placement import replace

STEPS = 8
OPTIONS = AlignedConfig(steps=STEPS, learning_rate=3e-3)


def aligned(model: Any, blocks: list[int], rows: Any, **keys: Any) -> Any:
    options = keys.pop("options", OPTIONS)
    return align(model, blocks, rows, keys.pop("mixer", MixerConfig()), options, batch_size=4, seed=3, **keys)


def same(one: Any, other: Any) -> bool:
    old, new = one.state_dict(), other.state_dict()
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def batch(rows: Any, count: int = 3) -> dict[str, torch.Tensor]:
    found = collate([rows[i] for i in range(count)])
    found.pop("labels")
    return found


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_every_mixer_comes_closer_to_its_attention(llama: Any, traces: Callable[..., Any], mixer: str) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    found = aligned(llama, [0, 2, 3], traces(STEPS * 4), mixer=MixerConfig(name=mixer))
    assert sorted(found.mixers) == [0, 2, 3]
    fresh = batch(traces(3, seed=9, held_out=True))
    for block, after in found.mixers.items():
        start, end = found.errors[block]
        assert end < start
        errors: list[float] = []
        for each in (new_mixer(llama, block, MixerConfig(name=mixer), seed=3), after):

            def visit(_: int, given: Any, wanted: Any, marks: Any, each: Any = each, errors: Any = errors) -> None:
                errors.append(float(relative_error(each(given, **marks)[0], wanted, torch.ones(wanted.shape[:2]))))

            with torch.no_grad(), observed(llama, [block], visit):
                llama.model(**fresh, use_cache=False)
        assert errors[1] < 0.9 * errors[0], "on rows that it was not trained on, too"
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert not llama.model._forward_pre_hooks and not llama.model.layers[0].self_attn._forward_hooks


def test_a_mixer_has_the_same_bits_whichever_are_aligned_beside_it(llama: Any, traces: Callable[..., Any]) -> None:
    rows = traces(STEPS * 4)
    together = aligned(llama, [0, 1, 3], rows)
    torch.manual_seed(5)
    alone = aligned(llama, [1], rows)
    parts = aligned(llama, [0, 1, 3], rows, options=AlignedConfig(steps=STEPS, learning_rate=3e-3, at_once=2))
    assert same(alone.mixers[1], together.mixers[1]) and alone.errors[1] == together.errors[1]
    assert parts.errors == together.errors
    assert all(same(parts.mixers[block], together.mixers[block]) for block in (0, 1, 3))


def test_kept_mixers_are_read_again_and_torn_or_foreign_ones_are_not(
    llama: Any, traces: Callable[..., Any], tmp_path: Path
) -> None:
    rows, store = traces(STEPS * 4), MixerStore(tmp_path / "kept", "of these inputs")
    whole = aligned(llama, [0, 1, 2], rows)
    aligned(llama, [0, 2], rows, store=store)
    store.path(2).write_bytes(store.path(2).read_bytes()[:100])
    said: list[str] = []
    again = aligned(llama, [0, 1, 2], rows, store=store, say=said.append)
    assert said[0] == "1 of 3 mixers are aligned already"
    assert list(again.mixers) == [0, 1, 2] and again.errors == whole.errors
    assert all(same(again.mixers[block], whole.mixers[block]) for block in (0, 1, 2))
    assert MixerStore(tmp_path / "kept", "of others").read(0) is None
    assert sorted(path.name for path in store.path(0).parent.iterdir()) == [
        f"block-00{i}.safetensors" for i in range(3)
    ]


def test_a_rate_that_is_too_high_is_named(llama: Any, traces: Callable[..., Any]) -> None:
    with pytest.raises(
        UserError, match=r"mixer of block \d is no longer finite .*lower score.aligned.learning_rate=1e\+30"
    ):
        aligned(llama, [1], traces(STEPS * 4), options=AlignedConfig(steps=STEPS, learning_rate=1e30))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@torch.no_grad()
def test_swapped_computes_as_the_hybrid_and_is_undone(family: Any, traces: Callable[..., Any], mixer: str) -> None:
    """For every family, on packed rows and on padded ones."""
    model, config = family, MixerConfig(name=mixer)
    packed = batch(traces(3))
    padded = {"input_ids": packed["input_ids"], "attention_mask": torch.ones_like(packed["input_ids"])}
    padded["attention_mask"][0, :9] = 0
    padded["attention_mask"][1, 50:] = 0
    before = [model(**inputs, use_cache=False).logits for inputs in (packed, padded)]
    mixers = {block: new_mixer(model, block, config, seed=1) for block in (1, 3)}
    hybrid = hybridize(model, replace(["attention"] * 4, [1, 3], mixer), config, seed=1)
    with swapped(model, mixers):
        for inputs in (packed, padded):
            keep = inputs.get("attention_mask", torch.ones_like(packed["input_ids"])) != 0
            one, other = (each(**inputs, use_cache=False).logits[keep] for each in (model, hybrid))
            assert torch.equal(one, other)
    for inputs, wanted in zip((packed, padded), before, strict=True):
        assert torch.equal(model(**inputs, use_cache=False).logits, wanted)
    assert not model.model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="inside"), swapped(model, mixers):
        raise RuntimeError("inside")
    assert torch.equal(model(**packed, use_cache=False).logits, before[0])


@torch.no_grad()
def test_swapped_in_a_hybrid(hybrid_family: Any, traces: Callable[..., Any]) -> None:
    inputs, config = batch(traces(3)), MixerConfig()
    before = hybrid_family(**inputs, use_cache=False).logits
    wanted = hybridize(hybrid_family, replace(hybrid_family.config.mixers, [2], "mamba1"), config, seed=1)
    with swapped(hybrid_family, {2: new_mixer(hybrid_family, 2, config, seed=1)}):
        assert torch.equal(hybrid_family(**inputs, use_cache=False).logits, wanted(**inputs, use_cache=False).logits)
    assert torch.equal(hybrid_family(**inputs, use_cache=False).logits, before)


def test_padding_is_not_learned_from(llama: Any, traces: Callable[..., Any]) -> None:
    """Whatever stands in the padding of packed rows, the aligned mixers are the same."""
    packed = traces(STEPS * 4)
    rows = [dict(packed[i]) for i in range(STEPS * 4)]
    padded = [int(document_tokens(collate([row])).logical_not().sum()) for row in rows]
    assert sum(padded) > 0
    other = []
    for row in rows:
        ids = row["input_ids"].clone()
        ids[~document_tokens(collate([row]))[0]] = 7
        other.append({**row, "input_ids": ids})
    one, two = (aligned(llama, [1, 2], each) for each in (rows, other))
    assert all(same(one.mixers[block], two.mixers[block]) for block in (1, 2))


def test_document_tokens() -> None:
    labels = torch.tensor([[IGNORE, 5, 5, IGNORE, 5, IGNORE, IGNORE], [IGNORE, IGNORE, 5, IGNORE, IGNORE, IGNORE, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]])
    wanted = [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert document_tokens({"labels": labels, "position_ids": positions}).int().tolist() == wanted
    assert document_tokens({"labels": labels}).all()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2)
    assert torch.equal(document_tokens({"labels": labels, "attention_mask": mask}), mask == 1)
