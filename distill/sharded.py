"""A teacher whose weights lie in parts on the processes of a job: ZeRO-3 without an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill.hybrid.model import head_input
from distill.teacher import Teacher


class Backbone(nn.Module):
    """A causal LM without its head: what DeepSpeed gathers, block by block, for one forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, T, E]."""
        return self.model(**inputs, use_cache=False).last_hidden_state


class ShardedTeacher(Teacher):
    """A frozen model that was loaded in parts, beside a student that DeepSpeed trains in parts.

    The LM head is brought together around whatever uses it (``gathered``): it is [V, E], of a model's size a few parts
    in a hundred.
    """

    def __init__(self, model: Any) -> None:
        import deepspeed

        super().__init__(model)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        if model.dtype == torch.bfloat16:
            settings["bf16"] = {"enabled": True}
        self.engine, *_ = deepspeed.initialize(model=Backbone(model), config=settings)
        self.engine.eval()

    @torch.no_grad()
    def hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states [B, T, E] of packed rows."""
        return head_input(self.model, self.engine(**inputs))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, the head has its weights."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.head.parameters())):
            yield
