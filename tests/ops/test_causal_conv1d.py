"""The causal convolution against one `conv1d` call per document, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill.ops import causal_conv1d_cpu as cpu
from distill.ops import cpu as tools
from distill.ops.causal_conv1d import causal_conv1d, causal_conv1d_update

KERNELS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operators: on a busy machine each would wait for a second thread to be scheduled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(batch: int, steps: int, taps: int, *, resets: bool, state: bool, channels: int = 5) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return {
        "x": normal(batch, steps, channels),
        "weight": normal(channels, taps),
        "bias": normal(channels),
        "reset": torch.rand(batch, steps, generator=rng) < 0.3 if resets else None,  # some closer than K taps
        "initial_state": normal(batch, channels, taps - 1) if state else None,
    }


def oracle(
    x: Tensor, weight: Tensor, bias: Tensor, reset: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cut every row into documents and convolve each on its own."""
    (batch, steps, channels), taps = x.shape, weight.shape[1]
    rows, states = [], []
    for b in range(batch):
        starts = [] if reset is None else [t for t in range(1, steps) if reset[b, t]]
        history = x.new_zeros(channels, taps - 1)
        if initial_state is not None and not (reset is not None and reset[b, 0]):
            history = initial_state[b]
        pieces = []
        for first, last in zip([0, *starts], [*starts, steps], strict=True):
            seen = torch.cat([history, x[b, first:last].T], dim=1)
            pieces.append(functional.conv1d(seen[None], weight[:, None], bias, groups=channels)[0].T)
            final = seen[:, seen.shape[1] - (taps - 1) :]
            history = x.new_zeros(channels, taps - 1)
        rows.append(functional.silu(torch.cat(pieces)))
        states.append(final)
    return torch.stack(rows), torch.stack(states)


def run(
    operands: dict[str, Any], dtype: torch.dtype, function: Callable[..., tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    leaves = {
        name: value if value is None or name == "reset" else value.to(dtype).clone().requires_grad_()
        for name, value in operands.items()
    }
    y, final_state = function(**leaves)
    rng = torch.Generator().manual_seed(1)
    (y * torch.randn(y.shape, generator=rng, dtype=torch.float64).to(dtype)).sum().backward()
    grads = {
        # The oracle never touches an initial state that every row drops: no gradient there means zero.
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if leaf is not None and name != "reset"
    }
    return {"y": y.detach(), "final_state": final_state.detach(), **grads}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize(("batch", "steps"), [(3, 1), (1, 2), (3, 63), (1, 1000)])
def test_matches_one_convolution_per_document(
    batch: int, steps: int, taps: int, resets: bool, state: bool, kernel: str
) -> None:
    operands = make(batch, steps, taps, resets=resets, state=state)
    want = run(operands, torch.float64, oracle)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        got = run(operands, dtype, partial(causal_conv1d, kernel=kernel))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name].dtype == dtype
            scale = float(value.abs().max()) if value.numel() else 0.0
            torch.testing.assert_close(got[name].double(), value, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("steps", [127, 128, 129, 131, 256, 258])
def test_documents_at_the_edges_of_a_task(steps: int) -> None:
    """Tasks are 128 tokens: what reaches over an edge, and what a document's start there cuts off."""
    operands = make(2, steps, 4, resets=False, state=True, channels=3)
    for start in (125, 126, 127, 128, 129, 130):
        reset = torch.zeros(2, steps, dtype=torch.bool)
        reset[0, min(start, steps - 1)] = True
        reset[1, 0] = True
        operands["reset"] = reset
        want, got = run(operands, torch.float64, oracle), run(operands, torch.float64, causal_conv1d)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12 * float(value.abs().max()), msg=name)


def test_same_bits_on_repeat_and_for_any_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "SERIAL_WORK", 0)
    operands = make(2, 300, 4, resets=True, state=True)
    want = run(operands, torch.float32, causal_conv1d)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = run(operands, torch.float32, causal_conv1d)
        assert all(torch.equal(got[name], value) for name, value in want.items()), threads


def test_auto_takes_the_compiled_kernel_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = cpu.conv
    monkeypatch.setattr(cpu, "conv", lambda *operands: called.append(1) or real(*operands))
    operands = make(1, 3, 4, resets=False, state=False)
    causal_conv1d(**operands)
    causal_conv1d(**operands, kernel="reference")
    assert called == [1]
    with pytest.raises(ValueError, match="unknown kernel 'referense' .did you mean 'reference'"):
        causal_conv1d(**operands, kernel="referense")


def test_only_the_gradients_asked_for() -> None:
    operands = {name: value for name, value in make(2, 7, 4, resets=True, state=True).items() if value is not None}
    operands["weight"].requires_grad_()
    before = operands["initial_state"].clone()
    y, final = causal_conv1d(**operands)
    y.sum().backward()
    assert operands["weight"].grad is not None and operands["x"].grad is None and operands["bias"].grad is None
    assert not final.requires_grad and torch.equal(operands["initial_state"], before)


def test_gradcheck() -> None:
    operands = make(2, 6, 4, resets=True, state=True, channels=2)
    reset = operands.pop("reset")
    leaves = [value.requires_grad_() for value in operands.values() if value is not None]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, reset=reset, initial_state=initial_state)[0]

    assert torch.autograd.gradcheck(conv, leaves)


def test_final_state_of_a_short_document() -> None:
    x = torch.arange(1.0, 7)[None, :, None]
    reset = torch.tensor([[False, False, True, True, False, True]])
    state = torch.full((1, 1, 3), 9.0)
    weight, bias = torch.ones(1, 4), torch.zeros(1)

    def final(steps: int) -> list[float]:
        _, carried = causal_conv1d(x[:, :steps], weight, bias, reset=reset[:, :steps], initial_state=state)
        assert not carried.requires_grad
        return carried[0, 0].tolist()

    want = [[9, 9, 1], [9, 1, 2], [0, 0, 3], [0, 0, 4], [0, 4, 5], [0, 0, 6]]
    assert [final(steps) for steps in range(1, 7)] == want


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("poison", [7.0, torch.nan])
@pytest.mark.parametrize("changed", [1, 2])
def test_documents_do_not_reach_each_other(changed: int, poison: float, kernel: str) -> None:
    start = 11
    operands = make(2, 20, 4, resets=False, state=True)
    operands["reset"] = torch.zeros(2, 20, dtype=torch.bool)
    operands["reset"][:, start] = True
    want = run(operands, torch.float32, partial(causal_conv1d, kernel=kernel))
    one, two = slice(0, start), slice(start, 20)
    touched, untouched = (one, two) if changed == 1 else (two, one)
    operands["x"] = operands["x"].clone()
    operands["x"][:, touched] = poison
    if changed == 1:
        operands["initial_state"] = torch.full_like(operands["initial_state"], poison)
    got = run(operands, torch.float32, partial(causal_conv1d, kernel=kernel))
    for name in ("y", "x"):
        assert torch.equal(got[name][:, untouched], want[name][:, untouched]), name
        assert not torch.equal(got[name][:, touched], want[name][:, touched]), name
    alone = "final_state" if changed == 1 else "initial_state"
    assert torch.equal(got[alone], want[alone])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prefill_equals_chunks_equals_tokens(dtype: torch.dtype, taps: int, kernel: str) -> None:
    operands = make(2, 40, taps, resets=True, state=True)
    reset = operands.pop("reset")
    x, weight, bias, state = (value.to(dtype) for value in operands.values() if value is not None)
    want, want_state = causal_conv1d(x, weight, bias, reset=reset, initial_state=state, kernel=kernel)
    assert want.dtype == want_state.dtype == dtype

    pieces, carried = [], state
    for part in (slice(0, 1), slice(1, 3), slice(3, 30), slice(30, 40)):
        y, carried = causal_conv1d(x[:, part], weight, bias, reset=reset[:, part], initial_state=carried, kernel=kernel)
        pieces.append(y)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(carried, want_state)

    tokens, carried = [], state.clone()
    for t in range(40):
        carried[reset[:, t]] = 0
        tokens.append(causal_conv1d_update(carried, x[:, t], weight, bias, kernel=kernel))
    torch.testing.assert_close(torch.stack(tokens, 1), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(carried, want_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (1, 6)}, r"x must be \[B, T, D\] and weight \[D, K\], got \[1, 6\]"),
        ({"x": (1, 0, 5)}, "T=0"),
        ({"weight": (6, 4)}, r"weight must have shape \[5, 4\], got \[6, 4\]"),
        ({"bias": (4,)}, r"bias must have shape \[5\], got \[4\]"),
        ({"initial_state": (1, 5, 4)}, r"initial_state must have shape \[1, 5, 3\], got \[1, 5, 4\]"),
        ({"reset": (1, 5)}, r"reset must have shape \[1, 6\], got \[1, 5\]"),
        ({"reset": (1, 6)}, "reset must be bool, got torch.float32"),
    ],
)
def test_wrong_shapes_name_the_numbers(change: dict[str, tuple[int, ...]], message: str) -> None:
    operands = make(1, 6, 4, resets=False, state=True)
    operands |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**operands)


def test_wrong_update_leaves_the_state_alone() -> None:
    state = torch.zeros(1, 5, 3)
    with pytest.raises(ValueError, match=r"state must have shape \[1, 5, 4\], got \[1, 5, 3\]"):
        causal_conv1d_update(state, torch.ones(1, 5), torch.ones(5, 5), torch.zeros(5))
    assert not state.any()
