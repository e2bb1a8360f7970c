"""The selective scan: every kernel and gradient against the float64 oracle, and what decoding relies on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.ops import cpu as tools
from distill.ops import openmp
from distill.ops import selective_scan_cpu as cpu
from distill.ops.kernels import kernel_of
from distill.ops.selective_scan import selective_scan, selective_scan_update

STATES = 16
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operators: on a busy machine each would wait for a second thread to be scheduled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    batch: int,
    steps: int,
    groups: int,
    channels: int = 8,
    states: int = STATES,
    *,
    resets: bool = False,
    state: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Random float64 operands; resets are dense enough that some are neighbours."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return {
        "x": normal(batch, steps, channels),
        "dt": torch.nn.functional.softplus(normal(batch, steps, channels) - 2),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, steps, groups, states),
        "C": normal(batch, steps, groups, states),
        "D": normal(channels),
        "reset": torch.rand(batch, steps, generator=rng) < 0.1 if resets else None,
        "initial_state": normal(batch, channels, states) if state else None,
    }


def run(operands: dict[str, Any], dtype: torch.dtype, kernel: str) -> dict[str, Tensor]:
    """Outputs and, under the names of the operands, gradients of a fixed random projection of y."""
    leaves = {
        name: value if value is None or name == "reset" else value.to(dtype).clone().requires_grad_()
        for name, value in operands.items()
    }
    y, final_state = selective_scan(**leaves, kernel=kernel)
    rng = torch.Generator().manual_seed(1)
    (y * torch.randn(y.shape, generator=rng, dtype=torch.float64).to(dtype)).sum().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and name != "reset"}
    return {"y": y.detach(), "final_state": final_state, **grads}


def assert_near(got: Tensor, want: Tensor, name: str, tolerance: float = 1e-4) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (3, 8)])
@pytest.mark.parametrize("steps", [1, 2, 63, 1000])
def test_cpu_kernel_matches_the_oracle(steps: int, batch: int, groups: int, resets: bool, state: bool) -> None:
    operands = make(batch, steps, groups, resets=resets, state=state)
    want = run(operands, torch.float64, "reference")
    got = run(operands, torch.float32, "cpu")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert_near(got[name], value, name)


def test_oracle_matches_the_closed_form() -> None:
    operands = make(2, 9, 2)
    x, dt, A, B, C, D = (operands[name] for name in NAMES[:6])
    y, _ = selective_scan(x, dt, A, B, C, D, kernel="reference")
    total = dt.cumsum(1)
    for d in range(x.shape[2]):
        group = d // (x.shape[2] // B.shape[2])
        for t in range(x.shape[1]):
            want = D[d] * x[:, t, d]
            for s in range(t + 1):
                decay = torch.exp((total[:, t, d] - total[:, s, d])[:, None] * A[d])
                inflow = (dt[:, s, d] * x[:, s, d])[:, None] * B[:, s, group]
                want = want + (C[:, t, group] * decay * inflow).sum(-1)
            torch.testing.assert_close(y[:, t, d], want)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHECKPOINT_EVERY", 2)  # chunk edges on, beside and away from a reset
    operands = make(2, 5, 2, channels=4, states=4, state=True)
    reset = torch.tensor([[False, False, True, False, False], [True, True, False, False, True]])
    leaves = [operands[name].requires_grad_() for name in NAMES]

    def scan(*values: Tensor) -> Tensor:
        return selective_scan(*values[:6], reset=reset, initial_state=values[6], kernel="cpu")[0]

    assert torch.autograd.gradcheck(scan, leaves)


def test_only_the_gradients_asked_for() -> None:
    operands = make(1, 5, 2, state=True)
    x = operands["x"].float().requires_grad_()
    rest = {name: value.float() for name, value in operands.items() if name not in ("x", "reset")}
    before = rest["initial_state"].clone()
    y, final_state = selective_scan(x, **rest)
    y.sum().backward()
    assert x.grad is not None and all(value.grad is None for value in rest.values())
    assert not final_state.requires_grad
    assert torch.equal(rest["initial_state"], before)
    with torch.no_grad():
        assert not selective_scan(x, **rest)[0].requires_grad


def test_exponential_is_accurate_over_its_range() -> None:
    """With h = 1, x = 0 and C = (1, 0, ...), y is exp(dt A) itself."""
    exponent = torch.cat([-torch.linspace(0, 87.3, 4001), -torch.logspace(-30, 0, 500)])
    edges = torch.tensor([-87.4, -90, -104, -1e4, -1e30, -3e38, torch.nan])

    def exponential(values: Tensor) -> Tensor:
        channels = len(values)
        C = torch.zeros(1, 1, STATES)
        C[..., 0] = 1
        state, zero = torch.ones(1, channels, STATES), torch.zeros(1, channels)
        A = -torch.ones(channels, STATES)
        skip = torch.ones(channels)
        return selective_scan_update(state, zero, -values[None], A, C, C, skip, kernel="cpu")[0]

    want = exponent.double().exp()
    assert ((exponential(exponent) - want).abs() / want).max() < 2e-7
    got = exponential(edges)
    assert torch.equal(got[:-1], torch.zeros(6)) and got[-1].isnan()


@pytest.mark.parametrize("largest", [1e4, 1e30])
def test_extreme_steps_and_decays(largest: float) -> None:
    steps, channels = 12, 8
    operands = make(1, steps, 2, state=True)
    operands["dt"] = torch.tensor([0, 1e-30, 1, largest]).double().repeat(channels * steps // 4).reshape(1, steps, -1)
    operands["A"] = -torch.tensor([1e-30, 1, 1e4, 1e30]).double().repeat(channels * STATES // 4).reshape(channels, -1)
    want, got = (run(operands, dtype, name) for dtype, name in ((torch.float64, "reference"), (torch.float32, "cpu")))
    finite = ("y", "final_state") if largest > 1e4 else tuple(want)  # dA ~ dt^2 leaves float32 at 1e30
    for name in finite:
        assert got[name].isfinite().all(), name
        assert_near(got[name], want[name], name)


@pytest.mark.parametrize("threads_are", ["PyTorch's", "ours"])
def test_same_bits_on_repeat_and_for_any_thread_count(threads_are: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teams: list[int] = []
    real_team, real_pool = cpu._forward_team, tools._pool
    if openmp.team() is None and threads_are == "PyTorch's":
        pytest.skip("PyTorch has another OpenMP than GNU's here")

    def team(address: int, threads: int, *rest: Any) -> None:
        if address:
            teams.append(threads)
        real_team(address, threads, *rest)

    def pool(threads: int) -> ThreadPoolExecutor:
        teams.append(threads + 1)  # and the thread that calls
        return real_pool(threads)

    monkeypatch.setattr(cpu, "_forward_team", team)
    if threads_are == "ours":
        monkeypatch.setattr(openmp, "team", lambda: None)
    monkeypatch.setattr(tools, "_pool", pool)
    monkeypatch.setattr(tools, "SERIAL_WORK", 0)
    operands = make(3, 100, 2, resets=True, state=True)
    torch.set_num_threads(1)
    want = run(operands, torch.float32, "cpu")
    assert not teams
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        got = run(operands, torch.float32, "cpu")
        assert all(torch.equal(got[name], value) for name, value in want.items()), threads
    assert set(teams) == {2, 3}


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [7.0, torch.inf])
@pytest.mark.parametrize("changed", [1, 2])
def test_documents_do_not_reach_each_other(changed: int, kernel: str, poison: float) -> None:
    start = 37
    operands = make(2, 70, 2, state=True)
    operands["reset"] = torch.zeros(2, 70, dtype=torch.bool)
    operands["reset"][:, start] = True
    want = run(operands, torch.float32, kernel)
    one, two = slice(0, start), slice(start, 70)
    touched, untouched = (one, two) if changed == 1 else (two, one)
    for name in ("x", "dt", "B", "C"):
        operands[name] = operands[name].clone()
        operands[name][:, touched] = poison
    if changed == 1:
        operands["initial_state"] = torch.full_like(operands["initial_state"], poison)
    got = run(operands, torch.float32, kernel)
    for name in ("y", "x", "dt", "B", "C"):
        assert torch.equal(got[name][:, untouched], want[name][:, untouched]), name
        assert not torch.equal(got[name][:, touched], want[name][:, touched]), name
    alone = "final_state" if changed == 1 else "initial_state"
    assert torch.equal(got[alone], want[alone])


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_prefill_equals_chunks_equals_tokens(kernel: str) -> None:
    operands = make(2, 70, 2, resets=True, state=True)
    reset = operands.pop("reset")
    state = operands.pop("initial_state").float()
    x, dt, A, B, C, D = (operands[name].float() for name in NAMES[:6])
    want, want_state = selective_scan(x, dt, A, B, C, D, reset=reset, initial_state=state, kernel=kernel)

    pieces, carried = [], state
    for part in (slice(0, 1), slice(1, 33), slice(33, 40), slice(40, 70)):
        y, carried = selective_scan(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], D,
            reset=reset[:, part], initial_state=carried, kernel=kernel,
        )  # fmt: skip
        pieces.append(y)
    assert_near(torch.cat(pieces, 1), want, "chunks", 1e-6)
    assert_near(carried, want_state, "state after chunks", 1e-6)

    tokens, carried = [], state.clone()
    for t in range(70):
        carried[reset[:, t]] = 0
        tokens.append(selective_scan_update(carried, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, kernel=kernel))
    assert_near(torch.stack(tokens, 1), want, "tokens", 1e-6)
    assert_near(carried, want_state, "state after tokens", 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    operands = {
        name: value if value is None or name == "reset" else value.to(dtype)
        for name, value in make(2, 40, 2, resets=True).items()
    }
    got = run(operands, dtype, "cpu")
    y, state = selective_scan(**{k: v.float() if k in NAMES and v is not None else v for k, v in operands.items()})
    assert got["y"].dtype == dtype and torch.equal(got["y"], y.to(dtype))
    assert got["final_state"].dtype == torch.float32 and torch.equal(got["final_state"], state)
    for name, value in run(operands, torch.float32, "reference").items():
        assert name == "final_state" or got[name].dtype == dtype
        assert_near(got[name], value, name, 2e-2)

    carried = torch.zeros_like(state)
    x, dt, A, B, C, D = (operands[name] for name in NAMES[:6])
    y = selective_scan_update(carried, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    assert y.dtype == dtype and carried.abs().sum() > 0


def test_strided_inputs_and_expanded_gradients() -> None:
    operands = make(2, 20, 2)
    plain = {name: value.float() for name, value in operands.items() if value is not None}
    wide = torch.cat([plain["x"], plain["dt"]], dim=-1)
    x = wide[..., :8].requires_grad_()
    strided = {
        **plain,
        "x": x,
        "dt": wide[..., 8:].detach(),
        "C": plain["C"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    y, _ = selective_scan(**strided, kernel="cpu")
    y.sum().backward()  # the gradient of a sum is an expanded, stride-0 tensor
    leaf = plain["x"].clone().requires_grad_()
    want, _ = selective_scan(**{**plain, "x": leaf}, kernel="cpu")
    want.backward(torch.ones_like(want))
    assert torch.equal(y, want)
    assert x.grad is not None and leaf.grad is not None and torch.equal(x.grad, leaf.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": (1, 5, 7)}, r"dt must have shape \[1, 5, 8\], got \[1, 5, 7\]"),
        ({"A": (7, 16)}, r"A must have shape \[8, 16\], got \[7, 16\]"),
        ({"B": (1, 5, 16)}, r"B \[B, T, G, N\], got .*\[1, 5, 16\]"),
        ({"C": (1, 5, 2, 15)}, r"C must have shape \[1, 5, 2, 16\], got \[1, 5, 2, 15\]"),
        ({"D": (9,)}, r"D must have shape \[8\], got \[9\]"),
        ({"B": (1, 5, 3, 16), "C": (1, 5, 3, 16)}, "D=8 must be a multiple of the groups G=3"),
        ({"initial_state": (2, 8, 16)}, r"initial_state must have shape \[1, 8, 16\]"),
        ({"reset": (1, 4)}, r"reset must have shape \[1, 5\], got \[1, 4\]"),
        ({"reset": (1, 5)}, "reset must be bool, got torch.float32"),
        ({"x": (1, 0, 8)}, "at least one token"),
    ],
)
def test_wrong_shapes_name_the_numbers(change: dict[str, tuple[int, ...]], message: str) -> None:
    operands = {name: value for name, value in make(1, 5, 2).items() if value is not None}
    operands |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**operands)


def test_wrong_updates_leave_the_state_alone() -> None:
    x, B = torch.ones(1, 8), torch.ones(1, 2, 16)
    rest = (x, x, -torch.ones(8, 16), B, B, torch.ones(8))
    state = torch.zeros(1, 8, 16)
    with pytest.raises(ValueError, match=r"D must have shape \[8\], got \[7\]"):
        selective_scan_update(state, *rest[:5], torch.ones(7))
    with pytest.raises(ValueError, match="contiguous float32 or float64"):
        selective_scan_update(torch.zeros(1, 16, 8).transpose(1, 2), *rest)
    with pytest.raises(ValueError, match="bfloat16"):
        selective_scan_update(state.bfloat16(), *rest)
    assert not state.any()


def test_kernel_is_chosen_checked_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    operands = {name: value for name, value in make(1, 2, 2).items() if value is not None}
    with pytest.raises(ValueError, match=r"unknown kernel 'referense' \(did you mean 'reference'\?\); allowed: auto"):
        selective_scan(**operands, kernel="referense")
    on_meta = {name: value.to("meta") for name, value in operands.items()}
    with pytest.raises(ValueError, match="got device 'meta'"):
        selective_scan(**on_meta, kernel="cpu")
    kernel_of.cache_clear()
    with caplog.at_level(logging.INFO, logger="distill.ops.kernels"):
        for _ in range(2):
            selective_scan(**operands)
            selective_scan(**on_meta)
    assert [record.getMessage() for record in caplog.records] == [
        "selective scan on cpu: kernel 'cpu' (asked for 'auto')",
        "selective scan on meta: kernel 'reference' (asked for 'auto')",
    ]
