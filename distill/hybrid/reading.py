"""What comes in to a hybrid's backbone, read for its mixers: documents marked, padding put in order, caches checked.

A hook before the backbone's forward, and not before the whole model's, because a trainer with a fused LM head (TRL's)
calls the backbone directly: without the marks, states would run from one packed document into the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.masking_utils import create_causal_mask

from distill.hybrid.documents import check_positions, check_shapes, packed_starts, read_padding
from distill.mixers import ATTENTION
from distill.ops.compiled import untraced

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")

PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
"""Other ways of saying where documents of a row begin, which attention kernels read."""


class Read(NamedTuple):
    """What a cache went through, kept on it as ``hybrid_read``, so that decoding steps need not look again."""

    layout: tuple[Any, ...]
    begun: bool  # every row has had its first token
    held: int = 0  # columns of the mask in which padding behind a text left the states alone


class Reader:
    """The hook. Adds ``document_starts`` [B, T] and ``order`` [B, T] (see ``distill.ops.padding``), each or None.

    A step of one token with a cache that was looked at before costs no look at any tensor, and traces without a break.
    """

    def __init__(self, config: Any) -> None:
        mixers = config.mixers
        shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.layout = (tuple(mixers), shape, tuple(sorted(config.mixer_config.items())))
        self.linear = [name != ATTENTION for name in mixers]
        self.first = self.linear.index(True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return (), kwargs  # the backbone says so itself
        shape, cache, mask = tokens.shape, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(mask, dict):  # as ``create_masks_for_generate`` makes it
            kwargs["attention_mask"], mask = mask["full_attention"], mask["linear_attention"]
        if self.decodes(cache, mask, shape):
            kwargs["document_starts"] = None
        else:
            kwargs |= self.read(module, kwargs, mask, shape[0], shape[1])
        if hasattr(module, "has_sliding_layers"):
            kwargs["attention_mask"] = self.named_masks(module, tokens, kwargs)
        return (), kwargs

    def decodes(self, cache: Any, mask: Any, shape: torch.Size) -> bool:
        """Whether this is one more token for rows that have all begun, with a cache that this model filled.

        What is said by shapes alone is looked at: rows, and the mask's columns where the cache counts in Python.
        """
        read = getattr(cache, "hybrid_read", None)
        if shape[1] != 1 or read is None or read.layout != self.layout or not read.begun:
            return False
        layer = cache.layers[self.first]
        if not layer.has_previous_state[0] or layer.recurrent_states[0].shape[0] != shape[0]:
            return False
        past = None if mask is None or mask.ndim != 2 else cache.get_seq_length()
        return not isinstance(past, int) or mask.shape == (shape[0], past + 1)

    @untraced
    def read(self, module: Any, kwargs: dict[str, Any], mask: Any, batch: int, length: int) -> dict[str, Any]:
        """The keys to add or change, for any step; ValueError where cache, mask and positions contradict each other.

        ``mask`` is the padding mask [B, S + T], or None; a ready one [B, 1, T, S + T] says nothing of padding.
        """
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
        mask = mask if getattr(mask, "ndim", 0) == 2 else None
        ready = mask is None and kwargs.get("attention_mask") is not None
        read, past = self.looked_at(cache, batch)
        check_shapes(positions, mask, (batch, length), past)
        if positions is None and (packing := [key for key in PACKING if kwargs.get(key) is not None]):
            raise ValueError(
                f"{packing[0]} tells where packed documents begin, but states begin anew by position_ids alone: give "
                "position_ids that begin at 0 in every document"
            )
        added: dict[str, Any] = {"document_starts": None}
        padding = None if mask is None else read_padding(mask, length, read.held)
        if padding is not None:
            if not past or length > 1 or bool(padding.starts.any()):
                added["document_starts"] = padding.starts
            wanted = kwargs.get("use_cache")
            wanted = module.config.use_cache if wanted is None else wanted
            if padding.behind and cache is None and module.training and not kwargs.get("use_cache"):
                added["use_cache"] = False  # a training step asks for none, and its states would have read padding
            elif padding.behind and (cache is not None or wanted):
                added["order"] = padding.order
                if cache is None:  # made here, so that what it went through can be noted
                    cache = added["past_key_values"] = DynamicCache(config=module.config)
        if positions is not None and length > 1:
            if cache is not None or mask is not None or (kwargs.get("use_cache") and not ready):
                check_positions(positions, mask, length, past > 0)
            elif (starts := packed_starts(positions, (batch, length))) is not None:
                added["document_starts"] = starts
                if not ready:  # with a cache, attention would not keep the documents apart
                    added["use_cache"] = False
        if cache is not None:
            begun = padding is None or padding.begun
            cache.hybrid_read = Read(self.layout, begun, past + length if "order" in added else read.held)
        return added

    def looked_at(self, cache: Any, batch: int) -> tuple[Read, int]:
        """What a cache went through and how many tokens it holds; ValueError for one that is not this model's."""
        nothing = Read(self.layout, False)
        if cache is None:
            return nothing, 0
        make = "make it for this model, e.g. DynamicCache(config=model.config)"
        if not isinstance(cache, Cache):
            raise ValueError(f"past_key_values must be a Cache of transformers, got {type(cache).__name__}: {make}")
        linear = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers]
        read = getattr(cache, "hybrid_read", nothing)
        if linear != self.linear or read.layout != self.layout:
            kinds = ", ".join("state" if kind else "keys and values" for kind in linear) or "no blocks at all"
            differs = "of other mixers or shapes" if linear == self.linear else f"for {kinds}"
            wanted = ", ".join(self.layout[0])
            raise ValueError(f"past_key_values is {differs}, but this model's blocks are {wanted}: {make}")
        layer, past = cache.layers[self.first], int(cache.get_seq_length())
        if not layer.has_previous_state[0]:
            if past:
                raise ValueError(f"past_key_values holds keys of {past} tokens but no state of theirs: {make}")
            return nothing, 0
        if (rows := layer.recurrent_states[0].shape[0]) != batch:
            raise ValueError(f"past_key_values holds {rows} rows, but {batch} are given")
        return read, past

    def named_masks(self, module: Any, tokens: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For families whose blocks look their mask up by layer type: they would make none for ``linear_attention``.

        The mask of the attention blocks is the one that the family itself would make.
        """
        sizes = torch.empty((*tokens.shape[:2], 0), dtype=module.dtype, device=tokens.device)
        given = {key: kwargs.get(key) for key in ("attention_mask", "past_key_values", "position_ids")}
        mask = create_causal_mask(config=module.config, inputs_embeds=sizes, **given)
        return {"full_attention": mask, "linear_attention": None}


@contextmanager
def documents_marked(model: Any) -> Iterator[None]:
    """Within, a plain transformer tells its blocks where documents begin, as a hybrid does anyway: for mixers that are
    put into it for a while, without a cache."""
    backbone, config = model.model, model.config
    if any(isinstance(hook, Reader) for hook in backbone._forward_pre_hooks.values()):
        yield
        return
    heads = config.num_attention_heads
    seen = SimpleNamespace(  # what a Reader asks of a hybrid's config; the mixers are told apart only by a cache
        mixers=["mixer"] * config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mixer_config={},
    )
    handle = backbone.register_forward_pre_hook(Reader(seen), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
