"""The importance matrix of a hybrid: how large each input of each linear layer is, on the run's own data.

The quantiser weighs the error of a column by the mean square of what it is multiplied with. It is measured here, on the
checkpoint, in the columns that the GGUF has: heads of zeros put in, and the SSM's heads as often as they stand there.
Files are those of llama.cpp's ``llama-imatrix``, and its ``llama-quantize`` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data.pack import collate
from distill.errors import UserError, brief
from distill.export.gguf_weights import twice
from distill.export.granite import HeadPadding, padding
from distill.export.quantize import library
from distill.mixers import ATTENTION
from distill.storage import fresh_file

__all__ = ["Matrix", "measure", "read_matrix", "write_matrix"]

MIXERS = {
    ATTENTION: {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    "mamba2": {"in_proj": "ssm_in", "out_proj": "ssm_out"},
}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Matrix:
    """Importance by the GGUF's tensor names, float32 [columns]; of how many tokens, of which data."""

    columns: dict[str, np.ndarray]
    tokens: int
    source: str
    length: int
    """Tokens a row of the data."""


@torch.no_grad()
def measure(model: Any, rows: Any, source: str, *, batch_size: int, pad: int) -> Matrix:
    """The mean square of each linear layer's inputs in the blocks of a hybrid, over packed ``rows``.

    ``pad`` is the token that fills a row up, which is not counted. Raises UserError where an input is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = length = 0
    with squares_summed(model, sums) as count:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
            ids = batch["input_ids"]
            real = (ids != pad).flip(1).cummax(1).values.flip(1)  # up to the last token that is not padding
            count(real.to(model.device))
            inputs = {"input_ids": ids, "position_ids": batch["position_ids"]}
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            model(**inputs, use_cache=False, logits_to_keep=1)  # the head is not quantised by it
            tokens, length = tokens + int(real.sum()), ids.shape[1]
    heads = padding(model.config)
    columns = {}
    for name, total in sums.items():
        mean = (total / max(tokens, 1)).float()
        if not mean.isfinite().all():
            raise UserError(f"the inputs of {name} are not finite on {source}: these weights cannot be quantised by it")
        columns[name] = as_exported(name, mean, heads).cpu().numpy()
    return Matrix(columns, tokens, source, length)


@contextmanager
def squares_summed(model: Any, sums: dict[str, torch.Tensor]) -> Iterator[Callable[[torch.Tensor], None]]:
    """Add to ``sums`` the squares of what each linear layer is given, in float64 [columns]; yields a function that is
    told before each pass which tokens [B, T] count."""
    counted = torch.empty(0)

    def count(real: torch.Tensor) -> None:
        nonlocal counted
        counted = real

    def hook(name: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            norms = torch.linalg.vector_norm(inputs[0][counted], dim=0, dtype=torch.float32)
            squares = norms.double().square()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linear_layers(model)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def linear_layers(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name in the GGUF, layer) of every matrix in the blocks of a hybrid."""
    for block, (layer, mixer) in enumerate(zip(model.model.layers, model.config.mixers, strict=True)):
        for part, names in ((layer.self_attn, MIXERS[mixer]), (layer.mlp, MLP)):
            for ours, theirs in names.items():
                yield f"blk.{block}.{theirs}.weight", getattr(part, ours)


def as_exported(name: str, columns: torch.Tensor, heads: HeadPadding) -> torch.Tensor:
    """Importance [columns] in the columns that the GGUF has. One of zeros, which the model has not, weighs as much as
    the mean of the others: attention puts out something there, and it must stay multiplied by nothing."""
    if name.endswith(("attn_output.weight", "ssm_out.weight")):
        there = heads.pad(torch.ones_like(columns)).bool()
        columns = torch.where(there, heads.pad(columns), columns.mean())
    if name.endswith("ssm_out.weight"):
        columns = twice(columns, heads.width)
    return columns


def write_matrix(matrix: Matrix, path: Path) -> None:
    """Write a matrix as ``llama-imatrix`` does. Raises UserError for a file that exists or cannot be written."""
    library()
    from gguf import GGUFWriter

    with fresh_file(path) as partial:
        writer = GGUFWriter(partial, arch="imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [matrix.source])
        writer.add_uint32("imatrix.chunk_count", -(-matrix.tokens // matrix.length))
        writer.add_uint32("imatrix.chunk_size", matrix.length)
        for name, columns in matrix.columns.items():
            writer.add_tensor(name + SUMS, columns * np.float32(matrix.tokens))
            writer.add_tensor(name + COUNTS, np.array([matrix.tokens], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_matrix(path: Path) -> Matrix:
    """A matrix from a file that `write_matrix` or ``llama-imatrix`` wrote; UserError for another kind of file."""
    library()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise UserError(f"cannot read --imatrix {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever numpy says of a file that is too short or holds something else
        raise UserError(f"--imatrix {path} is no GGUF, or is cut short: {brief(error)}") from error
    found = {tensor.name: np.asarray(tensor.data, np.float32).reshape(-1) for tensor in reader.tensors}
    names = [name.removesuffix(SUMS) for name in found if name.endswith(SUMS)]
    if not names or any(name + COUNTS not in found for name in names):
        raise UserError(
            f"--imatrix {path} holds no importance matrix (such as 'distill quantize' and llama-imatrix write)"
        )
    counts = {name: float(found[name + COUNTS].max()) for name in names}
    columns = {name: found[name + SUMS] / max(counts[name], 1.0) for name in names}
    if bad := [name for name, values in columns.items() if not np.isfinite(values).all()]:
        raise UserError(f"--imatrix {path} holds values that are not finite, such as in {bad[0]}")
    fields = reader.fields
    source = fields["imatrix.datasets"].contents() if "imatrix.datasets" in fields else [path.name]
    length = int(fields["imatrix.chunk_size"].contents()) if "imatrix.chunk_size" in fields else 0
    return Matrix(columns, int(max(counts.values())), ", ".join(source), length)
