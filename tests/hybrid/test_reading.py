"""What a hybrid reads of masks, positions and caches: padding behind a text is harmless, contradictions are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.surgery import hybridize

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (9, 4, 1, 6)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(seed))


def ragged(side: str) -> tuple[Tensor, Tensor]:
    """Ids [4, 9] and mask of four texts, padded on one side with a token that is none for the embedding."""
    ids = tokens(4, 9)
    places = torch.arange(9) if side == "right" else torch.arange(8, -1, -1)
    mask = (places < torch.tensor(LENGTHS)[:, None]).long()
    return ids.masked_fill(mask == 0, 7), mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_read_and_continued_as_each_text_alone(hybrid_family: Any, side: str, static: bool) -> None:
    """The texts, then three single tokens, then four at once, whose mask has the first call's padding within."""
    (ids, mask), config = ragged(side), hybrid_family.config
    more = tokens(4, 7, seed=1)
    cache = StaticCache(config=config, max_cache_len=16) if static else DynamicCache(config=config)
    text, every, parts = ids, mask, []
    for part in (ids, *more.split([1, 1, 1, 4], dim=1)):
        if parts:
            text, every = torch.cat([text, part], 1), torch.cat([every, torch.ones_like(part)], 1)
        where = positions(every)[:, -part.shape[1] :]
        given = {"attention_mask": every, "position_ids": where, "past_key_values": cache}
        parts.append(hybrid_family(part, **given).logits)
    batch = torch.cat(parts, 1)
    for row, seen in enumerate(every.bool()):
        alone = hybrid_family(text[row : row + 1, seen], use_cache=False).logits[0]
        torch.testing.assert_close(batch[row, seen], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_behind_a_text_without_a_cache_of_ones_own(hybrid: Any) -> None:
    """The cache that forward makes by itself knows of the padding too; without one, nothing has to be moved."""
    ids, mask = ragged("right")
    first = hybrid(ids, attention_mask=mask)
    torch.testing.assert_close(
        first.logits[mask.bool()], hybrid(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], **CLOSE
    )
    every = torch.cat([mask, mask.new_ones(4, 2)], 1)
    given = {"attention_mask": every, "position_ids": positions(every)[:, -2:]}
    after = hybrid(tokens(4, 2, seed=1), past_key_values=first.past_key_values, **given).logits
    for row, length in enumerate(LENGTHS):
        text = torch.cat([ids[row, :length], tokens(4, 2, seed=1)[row]])[None]
        torch.testing.assert_close(after[row], hybrid(text, use_cache=False).logits[0, -2:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("asked", ["nothing", "use_cache", "cache"])
def test_padding_behind_a_text_in_training_mode(hybrid: Any, asked: str) -> None:
    """A cache that is asked for knows of the padding as in evaluation; one that nobody asked for is not made."""
    hybrid.train()
    ids, mask = ragged("right")
    cache = {"cache": {"past_key_values": DynamicCache(config=hybrid.config)}, "use_cache": {"use_cache": True}}
    first = hybrid(ids, attention_mask=mask, **cache.get(asked, {}))
    if asked == "nothing":
        assert first.past_key_values is None
        return
    every = torch.cat([mask, mask.new_ones(4, 1)], 1)
    given = {"attention_mask": every, "position_ids": positions(every)[:, -1:]}
    after = hybrid(tokens(4, 1, seed=1), past_key_values=first.past_key_values, **given).logits
    for row, length in enumerate(LENGTHS):
        text = torch.cat([ids[row, :length], tokens(4, 1, seed=1)[row]])[None]
        torch.testing.assert_close(after[row, -1], hybrid(text, use_cache=False).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_gradients_do_not_see_the_padding(hybrid_family: Any) -> None:
    ids, mask, gradients = tokens(2, 6), torch.ones(2, 6, dtype=torch.long), []
    pad = torch.nn.functional.pad
    for behind in (0, 3):
        given, seen = pad(ids, (0, behind), value=7), pad(mask, (0, behind))
        hybrid_family.zero_grad()
        hybrid_family(given, attention_mask=seen, labels=given.masked_fill(seen == 0, -100)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid_family.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1.0), name


@torch.no_grad()
def test_packed_rows_need_no_use_cache_false(hybrid_family: Any) -> None:
    """Attention keeps documents apart only where there is no cache, so a packed row makes none; also one that begins
    within a document."""
    ids = tokens(2, 12)
    for where in ([*range(7), *range(5)], [*range(3, 10), *range(5)], [*range(7), *range(2, 7)]):
        output = hybrid_family(ids, position_ids=torch.tensor([where]))
        assert output.past_key_values is None
        for part in (ids[:, :7], ids[:, 7:]):
            alone = hybrid_family(part, use_cache=False).logits
            place = 0 if part.shape[1] == 7 else 7
            torch.testing.assert_close(output.logits[:, place : place + part.shape[1]], alone, **CLOSE)


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]])
HOLE = torch.tensor([[1, 1, 0, 1, 1, 1]])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a hole": (
        {"attention_mask": HOLE},
        r"no padding mask: row 0 has padding \(0\) right before token 3, .* put padding before a text or behind it",
    ),
    "a short mask": ({"attention_mask": HOLE[:, :5]}, r"attention_mask must be \[1, 6\], .* got \[1, 5\]"),
    "a long mask": ({"attention_mask": torch.ones(1, 7)}, r"attention_mask must be \[1, 6\], .* got \[1, 7\]"),
    "a mask of other rows": ({"attention_mask": torch.ones(2, 6)}, r"must be \[1, 6\], .* got \[2, 6\]"),
    "short positions": ({"position_ids": torch.arange(5)[None]}, r"position_ids must be \[1, 6\] .* got \[1, 5\]"),
    "positions of one axis": ({"position_ids": torch.arange(6)}, r"position_ids must be \[1, 6\] .* got \[6\]"),
    "packed and masked": (
        {"position_ids": PACKED, "attention_mask": torch.ones(1, 6)},
        "position_ids of row 0 restart at token 3, .* with an attention_mask attention does not keep documents apart",
    ),
    "packed and cached": ({"position_ids": PACKED, "use_cache": True}, "restart at token 3, .* with a cache attention"),
    "a tuple": ({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "must be a Cache of transformers, got tuple"),
    "a bare cache": (
        {"past_key_values": DynamicCache()},
        r"is for no blocks at all, but .* mamba1, attention, .* make it for this model, e.g. DynamicCache\(config=",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_positions_and_caches(hybrid: Any, name: str) -> None:
    given, message = WRONG[name]
    hybrid.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        hybrid(tokens(1, 6), **given)


@torch.no_grad()
def test_what_contradicts_an_earlier_call(hybrid: Any) -> None:
    ids, filled = tokens(2, 6), DynamicCache(config=hybrid.config)
    hybrid(ids, past_key_values=filled)

    def refused(message: str, count: int = 3, rows: int = 2, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            hybrid(ids[:1].expand(rows, -1)[:, :count], past_key_values=copy.deepcopy(filled), **given)

    ones = torch.ones(2, 9)
    refused(
        r"must be \[2, 9\], a column for each token \(6 of them in the cache\), got \[2, 3\]",
        attention_mask=ones[:, :3],
    )
    refused(r"must be \[2, 7\], .* got \[2, 1\]", count=1, attention_mask=ones[:, :1])
    refused("begin at 0 while the cache holds earlier tokens", position_ids=torch.arange(3)[None])
    refused("restart at token 2", position_ids=torch.tensor([[6, 7, 0]]))
    refused("holds 2 rows, but 3 are given", rows=3)
    refused("holds 2 rows, but 1 are given", rows=1, count=1)
    hole = ones.clone()
    hole[1, 4] = 0  # that call took this token in
    refused("no padding mask: row 1 has padding", attention_mask=hole)
    behind = ones.clone()
    behind[0, 8] = 0
    refused("padding behind the new tokens of a text that the cache began", attention_mask=behind)


@torch.no_grad()
def test_a_cache_of_another_model(hybrid: Any, llama: Any, make_model: Callable[..., Any]) -> None:
    ids, placement = tokens(1, 5), ["mamba1", "attention", "attention", "mamba1"]
    others = {
        "is for keys and values, keys and values": llama,
        "is for state, state, keys": hybridize(llama, ["mamba1", "mamba1", *placement[2:]], MixerConfig()),
        "is for state, keys and values, but": hybridize(
            make_model("llama", num_hidden_layers=2), placement[:2], MixerConfig()
        ),
        "of other mixers or shapes": hybridize(llama, ["mamba2", *placement[1:]], MixerConfig()),
        "of other mixers or shapes, but": hybridize(make_model("llama", head_dim=16), placement, MixerConfig()),
    }
    for message, other in others.items():
        cache = DynamicCache(config=other.config)
        other(ids, past_key_values=cache)
        for count in (1, 3):
            with pytest.raises(
                ValueError, match=f"{message}.* this model's blocks are mamba1, .*make it for this model"
            ):
                hybrid(ids[:, :count], past_key_values=cache)


def test_a_placement_of_wrong_length(hybrid: Any, llama: Any) -> None:
    with pytest.raises(UserError, match="placement has 3 mixers for 4 blocks"):
        hybridize(llama, ["mamba1", "attention", "attention"], MixerConfig())
    config = copy.deepcopy(hybrid.config)
    config.mixers = [*config.mixers, "attention"]
    with pytest.raises(UserError, match="placement has 5 mixers for 4 blocks"):
        type(hybrid)(config)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_decoding_step_looks_at_no_tensor(hybrid: Any, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every look (a tensor as a Python value) would wait for the device."""
    ids, mask = ragged("left")
    cache = DynamicCache(config=hybrid.config)
    hybrid(ids, attention_mask=mask, past_key_values=cache)
    where = mask.sum(-1, keepdim=True)
    every = torch.cat([mask, mask.new_ones(4, 1)], 1)
    looks: list[str] = []
    for name in ("__bool__", "item", "tolist", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: looks.append(name))
    (reader,) = (hook for hook in hybrid.model._forward_pre_hooks.values() if hasattr(hook, "layout"))
    given = {"input_ids": ids[:, :1], "past_key_values": cache, "position_ids": where}
    given |= {"attention_mask": every} if masked else {}
    _, added = reader(hybrid.model, (), given)
    assert added["document_starts"] is None and not looks


@pytest.mark.parametrize("key", ["seq_idx", "cu_seq_lens_q"])
def test_documents_are_told_by_positions_alone(hybrid: Any, key: str) -> None:
    ids = torch.randint(5, 50, (1, 8))
    with pytest.raises(ValueError, match=f"{key} tells where packed documents begin.*position_ids"):
        hybrid(ids, use_cache=False, **{key: torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])})
