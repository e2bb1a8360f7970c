"""The operator roofline of a decoder: the least time of a step, sum over operators of max(bytes / copy bandwidth,
flops / product peak), and the bytes that it holds. From shapes alone: a model on the meta device will do.

Counted are every projection (weights, inputs, outputs), attention over its keys and values, the mixers' states read and
written, norms and gates. Nothing is counted twice, and operators do not overlap: a program that fuses some of them or
keeps activations in a cache can be faster than its roofline at very small shapes.

    B = batch, T = tokens, E = hidden size, D = query heads * head_dim, X = key/value heads * head_dim, K = taps
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.config import MixerConfig
from distill.errors import choose
from distill.hybrid.config import head_dim
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import check_convertible, hybrid_config
from distill.mixers import ATTENTION
from distill.placement import replace
from eval.machine import Machine

LONGEST = 1 << 20  # tokens within which a mixer has to pay
FLOAT = 4  # bytes of what is held in float32 whatever the model is in: the states of scans


def _mamba1(config: Any) -> tuple[int, int]:
    inner = config.num_attention_heads * head_dim(config)
    options = config.mixer_config
    return inner * min(options["d_state"], head_dim(config)), inner * (options["d_conv"] - 1)


def _mamba2(config: Any) -> tuple[int, int]:
    inner = config.num_attention_heads * head_dim(config)
    return inner * head_dim(config), 3 * inner * (config.mixer_config["d_conv"] - 1)


STATES: dict[str, Callable[[Any], tuple[int, int]]] = {"mamba1": _mamba1, "mamba2": _mamba2}
"""Mixer -> numbers that it holds for a sequence: of its scan (float32), of its convolution (in the model's type)."""


@dataclass(frozen=True)
class Shape:
    """What the time and the memory of a decoder depend on."""

    parameters: int
    width: int
    """Bytes of a weight, a key or a value."""
    linears: tuple[tuple[int, int, int], ...]
    """(in, out, how many) of every projection but the LM head."""
    head: tuple[int, int]
    """The LM head: in, out."""
    norms: int
    hidden: int
    inner: int
    key_value: int
    intermediate: int
    attention: int
    """Blocks with attention; those of a mixer are in ``states``."""
    states: tuple[tuple[int, int], ...]
    """Of each replaced block: numbers of its scan and of its convolution."""

    @classmethod
    def of(cls, model: nn.Module, width: int | None = None) -> Shape:
        """The shape of a teacher or a hybrid; ``width``: bytes of a weight, if it is to be served in another type.

        Raises UserError for a mixer whose states are not known here.
        """
        config: Any = model.config
        head: Any = model.lm_head
        linears: Counter[tuple[int, int]] = Counter()
        norms = 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                linears[module.in_features, module.out_features] += 1
            norms += "RMSNorm" in type(module).__name__
        mixers = getattr(config, "mixers", None) or [ATTENTION] * config.num_hidden_layers
        replaced = [name for name in mixers if name != ATTENTION]
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            width=width or next(model.parameters()).element_size(),
            linears=tuple((*size, count) for size, count in sorted(linears.items())),
            head=(head.in_features, head.out_features),
            norms=norms,
            hidden=config.hidden_size,
            inner=config.num_attention_heads * head_dim(config),
            key_value=config.num_key_value_heads * head_dim(config),
            intermediate=config.intermediate_size,
            attention=len(mixers) - len(replaced),
            states=tuple(STATES[choose("mixer of a roofline", name, STATES)](config) for name in replaced),
        )

    @property
    def blocks(self) -> int:
        return self.attention + len(self.states)

    @property
    def weight_bytes(self) -> int:
        """All parameters, whether a step reads them or not (an embedding's rows)."""
        return self.parameters * self.width

    def kv_bytes(self, batch: int, context: int) -> int:
        """Keys and values of ``context`` tokens of every sequence."""
        return 2 * self.attention * batch * context * self.key_value * self.width

    def state_bytes(self, batch: int) -> int:
        """States of scans and convolutions, which do not grow."""
        return batch * sum(scan * FLOAT + conv * self.width for scan, conv in self.states)

    def held_bytes(self, batch: int, context: int) -> int:
        """Weights, keys, values and states."""
        return self.weight_bytes + self.kv_bytes(batch, context) + self.state_bytes(batch)

    def step(self, batch: int, context: int, machine: Machine) -> float:
        """Least seconds of one decoding step [B, 1] that leaves ``context`` tokens in the cache."""
        total = self._products(batch, batch, machine)
        flops = 4 * batch * context * self.inner
        total += self.attention * machine.seconds(flops=flops, nbytes=2 * self.width * batch * context * self.key_value)
        for scan, conv in self.states:
            nbytes = 2 * batch * (scan * FLOAT + conv * self.width)
            total += machine.seconds(flops=6 * batch * scan, nbytes=nbytes)
        return total

    def prefill(self, batch: int, tokens: int, machine: Machine) -> float:
        """Least seconds from a prompt [B, T] to the logits of its last tokens."""
        rows = batch * tokens
        total = self._products(rows, batch, machine)
        operands = self.width * rows * 2 * (self.inner + self.key_value)
        total += self.attention * machine.seconds(flops=2 * rows * (tokens + 1) * self.inner, nbytes=operands)
        for scan, _ in self.states:
            total += machine.seconds(flops=6 * rows * scan, nbytes=4 * self.width * rows * self.inner)
        return total

    def _products(self, rows: int, last: int, machine: Machine) -> float:
        """Projections, norms and gates of ``rows`` tokens, and the head for the ``last`` of them."""

        def product(inputs: int, outputs: int, rows: int) -> float:
            nbytes = self.width * (inputs * outputs + rows * (inputs + outputs))
            return machine.seconds(flops=2 * rows * inputs * outputs, nbytes=nbytes)

        total = sum(count * product(inputs, outputs, rows) for inputs, outputs, count in self.linears)
        total += product(*self.head, last)
        total += self.norms * machine.seconds(nbytes=2 * self.width * rows * self.hidden)
        return total + self.blocks * machine.seconds(nbytes=3 * self.width * rows * self.intermediate)

    def largest_batch(self, tokens: int, memory: float, overhead: float = 0.0) -> int:
        """Sequences of ``tokens`` for which weights, cache and ``overhead`` bytes a sequence fit in ``memory``."""
        each = self.kv_bytes(1, tokens) + self.state_bytes(1) + overhead
        fitting = (memory - self.weight_bytes) / each
        return max(int(fitting * (1 + 1e-9)), 0)  # what fits to the byte is not rounded down to one less


def shapes_of(
    teacher: Any, blocks: Iterable[int], mixers: Iterable[str], options: MixerConfig, width: int
) -> dict[str, Shape]:
    """Name -> shape of the teacher (a config) and of H1-h/L for each number of blocks and each mixer; the last h blocks
    are replaced, for which ones they are makes no difference here. No weight is allocated."""
    family, layers = check_convertible(teacher), teacher.num_hidden_layers
    made: dict[str, Shape] = {}
    for mixer in mixers:
        for h in blocks:
            name = f"H1-{h}/{layers} {mixer}" if h else "teacher"
            if name not in made:
                placement = replace([ATTENTION] * layers, range(layers - h, layers), mixer)
                with torch.device("meta"):
                    made[name] = Shape.of(FAMILIES[family][1](hybrid_config(teacher, placement, options)), width)
    return made


def pays_from(
    teacher: Any, mixer: str, options: MixerConfig, machine: Machine, batches: Iterable[int], width: int
) -> dict[str, int | None]:
    """Batch (as text) -> the context from which a block is faster with ``mixer`` than with attention, on the roofline.

    A mixer reads its state and (mamba2) twice the weights of attention, which reads more keys and values with every
    token. None where it does not pay within a million tokens.
    """
    attention, mixed = shapes_of(teacher, (0, 1), (mixer,), options, width).values()

    def crossing(batch: int) -> int | None:
        def slower(context: int) -> bool:
            return mixed.step(batch, context, machine) >= attention.step(batch, context, machine)

        if not slower(1):
            return 1
        low, high = 1, LONGEST  # slower at the one, faster at the other
        if slower(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if slower(middle) else (low, middle)
        return high

    return {str(batch): crossing(batch) for batch in batches}
