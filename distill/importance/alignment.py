"""Aligned mixers: those of many blocks regressed, all at once, to the outputs of the attention that they replace.

Each is fed what the current model feeds that attention (behind the input norm) and learns to give what it gives:
sum_t |m_l(x_t) - attention_l(x_t)|^2 / sum_t |attention_l(x_t)|^2 is made small for every block l, over the tokens of
documents, with one frozen forward pass a batch for all of them. What a mixer becomes does not depend on which others
are trained beside it. This is attention output alignment, the first step of RADLADS (arXiv:2505.03005) and of KL-guided
layer selection (arXiv:2512.20569).

Legend: B = rows, T = tokens a row, E = hidden size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import AlignedConfig, MixerConfig
from distill.data.pack import IGNORE, collate
from distill.errors import UserError
from distill.hybrid.documents import packed_starts
from distill.hybrid.reading import documents_marked
from distill.hybrid.surgery import keep_fp32, new_mixer
from distill.importance.mixer_store import MixerStore
from distill.mixers import set_kernels

BETAS = (0.9, 0.95)
LEAST_POWER = 1e-8  # mean square of an attention's output below which its errors are taken as if it were this
Marks = Mapping[str, Any]
"""What a mixer is told beside its input: where documents begin, and in which order to read."""
Visit = Callable[[int, Tensor, Tensor, Marks], None]
"""``visit(block, input [B, T, E], output [B, T, E], marks)`` of an attention as it is run."""


@dataclass(frozen=True)
class Aligned:
    """Mixers with float32 weights, and the relative error of each in the first step and over the last tenth of them."""

    mixers: dict[int, nn.Module]
    errors: dict[int, tuple[float, float]]


@contextmanager
def swapped(model: Any, mixers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within, these blocks of ``model`` (a transformer or a hybrid) compute with ``mixers`` in place of what they have;
    nothing is copied, and afterwards the model is as it was. For whole rows, packed or padded, without a cache."""
    layers = model.model.layers
    before = {block: layers[block].self_attn for block in mixers}
    with documents_marked(model):
        try:
            for block, mixer in mixers.items():
                layers[block].self_attn = mixer
            yield
        finally:
            for block, attention in before.items():
                layers[block].self_attn = attention


@contextmanager
def observed(model: Any, blocks: Sequence[int], visit: Visit) -> Iterator[None]:
    """Within, ``visit`` is told what the attention of each of ``blocks`` is given and gives."""

    def hook(block: int) -> Any:
        def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            marks = {key: kwargs.get(key) for key in ("document_starts", "order")}
            visit(block, args[0] if args else kwargs["hidden_states"], output[0], marks)

        return tell

    with documents_marked(model):
        handles = [
            model.model.layers[block].self_attn.register_forward_hook(hook(block), with_kwargs=True) for block in blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def document_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool [B, T]: the tokens of documents. Padding is what the mask says, and in packed rows, which have none, a
    document of its own of which nothing is learned."""
    labels, mask, positions = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        return mask != 0
    starts = None if positions is None else packed_starts(positions, tuple(labels.shape))  # type: ignore[arg-type]
    if starts is None:
        return torch.ones_like(labels, dtype=torch.bool)
    document = starts.cumsum(-1)
    learned = torch.zeros(len(labels), int(document.max()) + 1, dtype=torch.int64, device=labels.device)
    learned.scatter_add_(1, document, (labels != IGNORE).long())
    return learned.gather(1, document) > 0


def relative_error(output: Tensor, wanted: Tensor, keep: Tensor) -> Tensor:
    """sum |output - wanted|^2 / sum |wanted|^2 over the tokens ``keep`` [B, T], a scalar; tensors [B, T, E]."""
    wanted, mask = wanted.float(), keep.unsqueeze(-1)
    power = (wanted.square() * mask).sum().clamp(min=LEAST_POWER)
    return ((output.float() - wanted).square() * mask).sum() / power


def align(
    model: Any,
    blocks: Sequence[int],
    rows: Any,
    mixer: MixerConfig,
    options: AlignedConfig,
    *,
    batch_size: int,
    seed: int,
    kernels: str = "auto",
    dtype: str = "float32",
    store: MixerStore | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Aligned:
    """The mixers that ``mixer`` gives ``blocks`` of ``model``, aligned for ``options.steps`` steps on ``rows``.

    They start as ``hybridize`` would start them; those that ``store`` has already are taken from it, and it is given
    the others. The model is left as it is. ``dtype`` is what is computed in.

    Raises UserError where an error is not finite.
    """
    size = options.batch_size or batch_size
    found = Aligned({}, {})
    for block in blocks:
        if store is not None and (kept := store.read(block)) is not None:
            found.mixers[block] = new_mixer(model, block, mixer, seed).float()
            found.mixers[block].load_state_dict(kept[0])
            found.errors[block] = kept[1]
    left = [block for block in blocks if block not in found.mixers]
    if found.mixers:
        say(f"{len(found.mixers)} of {len(blocks)} mixers are aligned already")
    together = options.at_once or max(len(left), 1)
    for first in range(0, len(left), together):
        part = left[first : first + together]
        mixers = {block: new_mixer(model, block, mixer, seed).float().requires_grad_(True) for block in part}
        for each in mixers.values():
            set_kernels(each, kernels)
        found.errors.update(_train(model, mixers, rows, options, size, dtype, say))
        found.mixers.update(mixers)
        if store is not None:
            for block in part:
                store.write(block, mixers[block], found.errors[block])
    for each in found.mixers.values():
        set_kernels(each.requires_grad_(False), kernels)
    order = sorted(found.mixers)
    return Aligned({block: found.mixers[block] for block in order}, {block: found.errors[block] for block in order})


def _train(
    model: Any,
    mixers: dict[int, nn.Module],
    rows: Any,
    options: AlignedConfig,
    size: int,
    dtype: str,
    say: Callable[[str], None],
) -> dict[int, tuple[float, float]]:
    """Regress ``mixers`` in place; the relative error of each at first and at last."""
    assert len(rows) >= options.steps * size, "too few rows"
    parameters = [parameter for mixer in mixers.values() for parameter in mixer.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0, fused=True)
    history: list[dict[int, Tensor]] = []
    warmup = max(options.steps // 10, 1)
    told = time.monotonic()
    for step in range(options.steps):
        batch = batch_of(rows, step * size, size, model.device)
        keep = document_tokens(batch)
        history.append({})

        def learn(block: int, given: Tensor, wanted: Tensor, marks: Marks, keep: Tensor = keep) -> None:
            with torch.enable_grad():
                output, _ = mixers[block](given, **marks)
                error = relative_error(output, wanted, keep)
            error.backward()  # here, so that the activations of one mixer are held at a time
            history[-1][block] = error.detach()

        share = min((step + 1) / warmup, (options.steps - step) / max(options.steps - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        computed = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.no_grad(), observed(model, list(mixers), learn), computed:
            model.model(**{key: tensor for key, tensor in batch.items() if key != "labels"}, use_cache=False)
        errors = {block: float(error) for block, error in history[-1].items()}
        for block, error in errors.items():
            if not math.isfinite(error):
                raise UserError(
                    f"the mixer of block {block} is no longer finite after {step} steps of alignment: lower "
                    f"score.aligned.learning_rate={options.learning_rate:g}"
                )
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == options.steps or time.monotonic() - told > 10:
            told = time.monotonic()
            mean = sum(errors.values()) / len(errors)
            say(f"alignment of {len(mixers)} mixers: {step + 1}/{options.steps}  relative error {mean:.4f}")
    last = history[-max(options.steps // 10, 1) :]
    mean_of = lambda block: sum(float(errors[block]) for errors in last) / len(last)  # noqa: E731
    return {block: (float(history[0][block]), mean_of(block)) for block in mixers}


def batch_of(rows: Any, start: int, count: int, device: Any) -> dict[str, Tensor]:
    """Rows ``start`` to ``start + count`` (or the last) as a batch on ``device``."""
    batch = collate([rows[i] for i in range(start, min(start + count, len(rows)))])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def in_dtype(mixers: Mapping[int, nn.Module], dtype: torch.dtype) -> dict[int, nn.Module]:
    """The mixers as a model of ``dtype`` holds them: A_log and D stay in float32."""
    if dtype == torch.float32:
        return dict(mixers)
    cast = {block: copy.deepcopy(mixer).to(dtype) for block, mixer in mixers.items()}
    for block, mixer in cast.items():
        keep_fp32(mixer)
        mixer.load_state_dict(mixers[block].state_dict())
    return cast
