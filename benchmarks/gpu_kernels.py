"""Our operators on a GPU beside the packages' own calls, at the 15B shape: what the layer between them costs.

    python benchmarks/gpu_kernels.py                       # needs CUDA, mamba-ssm and causal-conv1d; fla where it is
    python benchmarks/gpu_kernels.py --batches 1 --lengths 2048

mamba1: 4096 channels, 16 states, 256 groups; mamba2: 32 heads of 128, 128 states; activations bfloat16. *own*: the
package's call on operands that lie as its kernel wants them. *ours*: our operator on what a projection gives,
``[B, T, D]`` contiguous, which the scan of mamba1 has to copy; *no copy*: on views of the same memory as *own*;
*documents*: as *ours*, a new one every 1,000 tokens (where they begin is read before the clock starts, as it is for all
but the first layer of a model). Milliseconds are the median of several runs; ratio = own / ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from distill.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from distill.ops.kernels import DEVICES, candidates, check_kernel
from distill.ops.selective_scan import selective_scan, selective_scan_update
from distill.ops.ssd import KERNELS as SSD_KERNELS
from distill.ops.ssd import ssd, ssd_update

CHUNK = 256  # of mamba-ssm's SSD, as in our operator
DOCUMENT = 1000
WANTED = 0.9


@dataclass(frozen=True)
class Shape:
    """Channels, states and groups of mamba1; heads, their width and states of mamba2."""

    channels: int = 4096
    states: int = 16
    groups: int = 256
    heads: int = 32
    width: int = 128


@dataclass(frozen=True)
class Row:
    """One measurement; ``ratio`` is the package's own time over ours (None where the package has no such call)."""

    operator: str
    kernel: str
    what: str
    batch: int
    length: int
    own_ms: float | None
    ours_ms: float
    no_copy_ms: float | None = None
    documents_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.own_ms is None else self.own_ms / self.ours_ms


def clock(run: Callable[[], object], device: str, repeats: int = 15) -> float:
    """Milliseconds of the median run."""
    for _ in range(3):  # Triton tunes itself in the first
        run()
    times = []
    for _ in range(repeats):
        if device == "cpu":
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
            continue
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def passes(call: Callable[..., Any], operands: list[Tensor], **fixed: Any) -> dict[str, Callable[[], object]]:
    """``call(*operands, **fixed)`` forward alone, and forward and backward to every operand."""
    leaves = [operand.detach().requires_grad_() for operand in operands]

    def forward() -> None:
        with torch.no_grad():
            call(*operands, **fixed)

    def both() -> None:
        out = call(*leaves, **fixed)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {"forward": forward, "forward + backward": both}


def by_channel(tensor: Tensor) -> Tensor:
    """The same values and shape ``[B, T, ...]``, with neighbouring tokens side by side in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def starts(batch: int, length: int, device: str) -> Tensor:
    return (torch.arange(length, device=device) % DOCUMENT == 0).expand(batch, -1).contiguous()


def mamba1(shape: Shape, batch: int, length: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    D, N, G = shape.channels, shape.states, shape.groups
    make = lambda *size: torch.randn(size, device=device, dtype=dtype)  # noqa: E731
    x, B, C = make(batch, length, D), make(batch, length, G, N), make(batch, length, G, N)
    dt = torch.nn.functional.softplus(make(batch, length, D) - 4)
    A, skip = decays(shape, device)
    tokens = [x, dt, A, B, C, skip]
    views = [by_channel(x), by_channel(dt), A, by_channel(B), by_channel(C), skip]
    own = [views[0].mT, views[1].mT, A, views[3].movedim(1, -1), views[4].movedim(1, -1), skip]
    runs = [
        passes(selective_scan_fn, own),
        passes(selective_scan, tokens, kernel="mamba_ssm"),
        passes(selective_scan, views, kernel="mamba_ssm"),
        passes(selective_scan, tokens, kernel="mamba_ssm", reset=starts(batch, length, device)),
    ]
    for what in runs[0]:
        yield Row("selective_scan", "mamba_ssm", what, batch, length, *(clock(run[what], device) for run in runs))


def mamba1_step(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    heads = (shape.groups, shape.channels // shape.groups)
    make = lambda *size: torch.randn(batch, *size, device=device, dtype=dtype)  # noqa: E731
    x, dt = make(shape.channels), torch.nn.functional.softplus(make(shape.channels) - 4)
    B, C = make(shape.groups, shape.states), make(shape.groups, shape.states)
    A, skip = decays(shape, device)
    state, bias = torch.zeros(batch, *A.shape, device=device), torch.zeros(heads, device=device)
    own = [tensor.unflatten(1, heads) for tensor in (state, x, dt)]
    own += [A.unflatten(0, heads), B, C, skip.unflatten(0, heads)]
    first = clock(lambda: selective_state_update(*own, dt_bias=bias), device)
    second = clock(lambda: selective_scan_update(state, x, dt, A, B, C, skip, kernel="mamba_ssm"), device)
    yield Row("selective_scan", "mamba_ssm", "one token", batch, 1, first, second)


def decays(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """A ``[D, N]`` and D ``[D]`` as a mamba1 mixer starts."""
    A = -torch.arange(1.0, shape.states + 1, device=device).repeat(shape.channels, 1)
    return A, torch.ones(shape.channels, device=device)


def mamba2(shape: Shape, batch: int, length: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    H, P = shape.heads, shape.width
    x, B, C = (torch.randn(batch, length, H, P, device=device, dtype=dtype) for _ in range(3))
    dt = torch.nn.functional.softplus(torch.randn(batch, length, H, device=device) - 4)
    operands = [x, dt, -torch.linspace(1, 16, H, device=device), B, C, torch.ones(H, device=device)]

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Any:
        return mamba_chunk_scan_combined(x, dt, A, B, C, CHUNK, D=D)

    own, reset = passes(call, operands), starts(batch, length, device)
    for kernel in ssd_kernels():
        ours = passes(ssd, operands, kernel=kernel)
        packed = passes(ssd, operands, kernel=kernel, reset=reset)
        for what in ours:
            first = clock(own[what], device) if kernel == "mamba_ssm" else None
            times = (clock(ours[what], device), None, clock(packed[what], device))
            yield Row("ssd", kernel, what, batch, length, first, *times)


def mamba2_step(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    H, P = shape.heads, shape.width
    x, B, C = (torch.randn(batch, H, P, device=device, dtype=dtype) for _ in range(3))
    dt = torch.nn.functional.softplus(torch.randn(batch, H, device=device) - 4)
    A, skip, bias = (
        -torch.linspace(1, 16, H, device=device),
        torch.ones(H, device=device),
        torch.zeros(H, device=device),
    )
    state = torch.zeros(batch, H, P, P, device=device)
    own = [state, x, dt[..., None].expand(x.shape), A[:, None, None].expand(H, P, P), B, C, skip[:, None].expand(H, P)]
    bias = torch.zeros(H, 1, device=device).expand(H, P)
    for kernel in ssd_kernels():
        ours = partial(ssd_update, state, x, dt, A, B, C, skip, kernel=kernel)
        first = clock(lambda: selective_state_update(*own, dt_bias=bias), device) if kernel == "mamba_ssm" else None
        yield Row("ssd", kernel, "one token", batch, 1, first, clock(ours, device))


def ssd_kernels() -> list[str]:
    """The packages that are installed for mamba2."""
    installed = candidates("ssd", SSD_KERNELS, "auto", DEVICES["mamba_ssm"])
    return [name for name in ("mamba_ssm", "fla") if name in installed]


def convolution(shape: Shape, batch: int, length: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from causal_conv1d import causal_conv1d_fn

    x = torch.randn(batch, length, shape.channels, device=device, dtype=dtype)
    weight, bias = taps(shape, dtype, device)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x.mT, weight, bias, activation="silu")

    own, ours = passes(call, [x, weight, bias]), passes(causal_conv1d, [x, weight, bias], kernel="mamba_ssm")
    reset = starts(batch, length, device)
    packed = passes(causal_conv1d, [x, weight, bias], kernel="mamba_ssm", reset=reset)
    for what in own:
        times = (clock(own[what], device), clock(ours[what], device), None, clock(packed[what], device))
        yield Row("causal_conv1d", "mamba_ssm", what, batch, length, *times)


def convolution_step(shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    from causal_conv1d import causal_conv1d_update as causal_conv1d_step

    x = torch.randn(batch, shape.channels, device=device, dtype=dtype)
    weight, bias = taps(shape, dtype, device)
    state = torch.zeros(batch, *weight[:, 1:].shape, device=device, dtype=dtype)
    first = clock(lambda: causal_conv1d_step(x, state, weight, bias, "silu"), device)
    second = clock(lambda: causal_conv1d_update(state, x, weight, bias, kernel="mamba_ssm"), device)
    yield Row("causal_conv1d", "mamba_ssm", "one token", batch, 1, first, second)


def taps(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Weights ``[D, 4]`` and bias ``[D]`` of a convolution."""
    make = lambda *size: torch.randn(size, device=device, dtype=dtype)  # noqa: E731
    return make(shape.channels, 4), make(shape.channels)


OPERATORS = {
    "selective_scan": (mamba1, mamba1_step),
    "ssd": (mamba2, mamba2_step),
    "causal_conv1d": (convolution, convolution_step),
}
HEAD = f"{'operator':15s}{'kernel':10s}{'pass':19s}{'B':>3s}{'T':>7s}{'own':>9s}{'ours':>9s}{'ratio':>7s}"
HEAD += f"{'no copy':>10s}{'documents':>10s}   (ms)"


def line(row: Row) -> str:
    """A row of the table."""
    number = lambda value, width, digits: f"{'-' if value is None else f'{value:.{digits}f}':>{width}s}"  # noqa: E731
    figures = number(row.own_ms, 9, 3) + number(row.ours_ms, 9, 3) + number(row.ratio, 7, 2)
    figures += number(row.no_copy_ms, 10, 3) + number(row.documents_ms, 10, 3)
    return f"{row.operator:15s}{row.kernel:10s}{row.what:19s}{row.batch:3d}{row.length:7d}{figures}"


def measure(
    operators: list[str], batches: list[int], lengths: list[int], shape: Shape, dtype: torch.dtype, device: str
) -> Iterator[Row]:
    """Every row of the table, in its order."""
    for name in operators:
        scan, step = OPERATORS[name]
        for batch in batches:
            for length in lengths:
                yield from scan(shape, batch, length, dtype, device)
            yield from step(shape, batch, dtype, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: benchmarks/gpu_kernels.py needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    try:
        for operator in ("selective_scan", "ssd", "causal_conv1d"):
            check_kernel(operator, "mamba_ssm")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    print(HEAD)
    for row in measure(args.operators, args.batches, args.lengths, Shape(), torch.bfloat16, "cuda"):
        rows.append(row)
        print(line(row), flush=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "least_ratio": min(row.ratio for row in rows if row.ratio is not None),
        "wanted_ratio": WANTED,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
