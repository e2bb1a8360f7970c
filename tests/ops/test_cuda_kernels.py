"""The kernels on CUDA packages against the plain references: on CPU with stand-ins for the packages (layouts, groups,
documents, gradients and states are ours and are tested without a GPU), and on a GPU with the packages themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from distill.ops.selective_scan import selective_scan, selective_scan_update
from distill.ops.ssd import ssd, ssd_update

Operands = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """An operator with one of its kernels."""

    name: str
    kernel: str

    def run(self, operands: Operands, kernel: str = "") -> tuple[Tensor, Tensor]:
        """(y, final state) of this kernel, or of another."""
        operator: Callable[..., Any] = {"selective_scan": selective_scan, "ssd": ssd, "conv": causal_conv1d}[self.name]
        y, state = operator(**operands, kernel=kernel or self.kernel)
        return y, state

    def step(self, state: Tensor, operands: Operands, kernel: str = "") -> Tensor:
        """One token; overwrites ``state``."""
        update: Callable[..., Tensor] = {
            "selective_scan": selective_scan_update,
            "ssd": ssd_update,
            "conv": causal_conv1d_update,
        }[self.name]
        return update(**{"state": state, "kernel": kernel or self.kernel, **operands})

    def operands(self, batch: int, length: int, groups: int, *, resets: float, state: bool, seed: int = 0) -> Operands:
        """Random float64 operands; ``resets`` is the part of tokens that begin a document (none given at 0), among
        which is the first of every row but one."""
        rng = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
        reset = torch.rand(batch, length, generator=rng) < resets
        reset[1:, 0] = True
        both = {"reset": reset if resets else None}
        softplus = torch.nn.functional.softplus
        if self.name == "conv":
            both["initial_state"] = normal(batch, 16, 3) if state else None
            return {"x": normal(batch, length, 16), "weight": normal(16, 4), "bias": normal(16), **both}
        if self.name == "ssd":
            both["initial_state"] = normal(batch, 8, 4, 6) if state else None
            vectors = [normal(batch, length, groups, 6) for _ in "BC"]
            dt, A = softplus(normal(batch, length, 8) - 2), -torch.exp(normal(8))
            return {
                "x": normal(batch, length, 8, 4),
                "dt": dt,
                "A": A,
                "B": vectors[0],
                "C": vectors[1],
                "D": normal(8),
                **both,
            }
        both["initial_state"] = normal(batch, 8, 6) if state else None
        vectors = [normal(batch, length, groups, 6) for _ in "BC"]
        dt, A = softplus(normal(batch, length, 8) - 2), -torch.exp(normal(8, 6))
        return {
            "x": normal(batch, length, 8),
            "dt": dt,
            "A": A,
            "B": vectors[0],
            "C": vectors[1],
            "D": normal(8),
            **both,
        }


SCAN, SSD, FLA, CONV = (
    Case("selective_scan", "mamba_ssm"),
    Case("ssd", "mamba_ssm"),
    Case("ssd", "fla"),
    Case("conv", "mamba_ssm"),
)
every_case = pytest.mark.parametrize("case", [SCAN, SSD, FLA, CONV], ids=lambda case: f"{case.name}-{case.kernel}")
PARAMETERS = ("A", "D", "weight", "bias", "dt", "initial_state")  # stay in float32 beside half activations


def gradients(case: Case, operands: Operands, kernel: str = "") -> dict[str, Tensor]:
    """y, the final state, and the gradient of every operand under a fixed random weighting of y."""
    leaves = {
        name: value if value is None or name == "reset" else value.detach().requires_grad_()
        for name, value in operands.items()
    }
    y, state = case.run(leaves, kernel)
    assert not state.requires_grad, "a carried state is detached"
    rng = torch.Generator().manual_seed(1)
    (y.double() * torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.device)).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and name != "reset"}
    return {"y": y.detach(), "final_state": state, **found}


def moved(operands: Operands, device: str, dtype: torch.dtype = torch.float32) -> Operands:
    """The operands as a model on ``device`` holds them: activations in ``dtype``, parameters in float32."""
    placed = {}
    for name, value in operands.items():
        wanted = torch.float32 if name in PARAMETERS else torch.bool if name == "reset" else dtype
        placed[name] = None if value is None else value.to(device, wanted)
    return placed


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every entry within ``tolerance`` of the largest value of the one that is wanted."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        if value.numel():
            size = value.double().cpu().abs().max().clamp_min(1e-2)  # a gradient may be nothing but rounding
            error = (got[name].double().cpu() - value.double().cpu()).abs().max() / size
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("resets", [0, 0.15, 0.7, 1], ids=["", "documents", "short", "tokens"])
@pytest.mark.parametrize(("batch", "length", "groups"), [(1, 1, 1), (2, 2, 8), (3, 63, 4)])
@every_case
def test_fp32_outputs_and_gradients(
    case: Case, device: str, batch: int, length: int, groups: int, resets: float, state: bool
) -> None:
    operands = case.operands(batch, length, groups, resets=resets, state=state)
    want = gradients(case, operands, "reference")
    got = gradients(case, moved(operands, device))
    # Triton multiplies float32 matrices in TF32 on a GPU; the two CUDA kernels do not.
    assert_near(got, want, 5e-3 if device == "cuda" and case.name == "ssd" else 1e-4)
    assert got["y"].dtype == got["final_state"].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_case
def test_long_rows_on_a_gpu(case: Case) -> None:
    operands = case.operands(2, 5000, 2, resets=0.15, state=True)
    operands["reset"][:] = False
    operands["reset"][:, [7, 2047, 2048, 2049, 4100]] = True  # beside the edges of the kernels' chunks
    want = gradients(case, operands, "chunked" if case.name == "ssd" else "reference")
    assert_near(gradients(case, moved(operands, "cuda")), want, 5e-3)


@pytest.mark.parametrize("resets", [0, 0.15], ids=["", "documents"])
@every_case
def test_bf16_activations_with_an_fp32_state(case: Case, device: str, resets: float) -> None:
    operands = case.operands(2, 40, 2, resets=resets, state=True)
    half = moved(operands, device, torch.bfloat16)
    if case is SCAN:  # mamba1's steps come from a projection, mamba2's from float32 parameters
        half["dt"] = half["dt"].bfloat16()
    want = gradients(case, {k: v if v is None or k == "reset" else v.double().cpu() for k, v in half.items()} | {
        "reset": operands["reset"]
    }, "reference")  # fmt: skip
    got = gradients(case, half)
    assert_near(got, want, 3e-2)
    assert got["y"].dtype == got["x"].dtype == torch.bfloat16
    if case.name != "conv":
        assert got["final_state"].dtype == torch.float32


@pytest.mark.parametrize("case", [SCAN, SSD, FLA], ids=lambda case: f"{case.name}-{case.kernel}")
def test_a_state_passes_bf16_tokens_unrounded(case: Case, device: str) -> None:
    operands = case.operands(2, 5, 2, resets=0, state=True)
    operands["x"].zero_()
    half = moved(operands, device, torch.bfloat16)
    half["dt"] = half["dt"].to(torch.bfloat16 if case is SCAN else torch.float32)
    _, want = case.run(
        {name: None if value is None else value.double().cpu() for name, value in half.items()}, "reference"
    )
    _, got = case.run(half)
    assert_near({"state": got}, {"state": want}, 1e-5)


@pytest.fixture
def fixed_order() -> Iterator[None]:
    """Sums in the same order from run to run, where a package can; the stand-ins always do."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("poison", [3.0, float("inf"), float("nan")], ids=["other", "inf", "nan"])
@every_case
def test_a_document_does_not_know_the_others(case: Case, device: str, fixed_order: None, poison: float) -> None:
    """Three documents in each of two rows: the middle one's values, and then the first one's, are changed."""
    operands = moved(case.operands(2, 40, 2, resets=0, state=True), device)
    operands["reset"] = torch.zeros(2, 40, dtype=torch.bool, device=device)
    operands["reset"][:, [9, 17]] = operands["reset"][1:, 0] = True
    one = gradients(case, operands)
    for inside in (slice(9, 17), slice(0, 9)):
        outside = torch.ones(40, dtype=torch.bool)
        outside[inside] = False
        changed = {name: value.clone() for name, value in operands.items()}
        changed["x"][:, inside] *= poison
        for name in ("dt", "B", "C"):
            if name in changed:
                changed[name][:1, inside] *= 3
        if inside.start == 0:
            changed["initial_state"] *= poison
        other = gradients(case, changed)
        assert not torch.equal(one["y"][:, inside], other["y"][:, inside])
        for name in ("y", "x", "dt", "B", "C"):
            if name not in one:
                continue
            want, got = one[name][:, outside], other[name][:, outside]
            if device == "cuda" and case is SCAN and name in ("B", "C"):  # summed over channels in any order
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want), name
        assert torch.equal(one["final_state"], other["final_state"])
        assert torch.isfinite(one["initial_state"]).all() and one["initial_state"][0, :, 1:].abs().sum() > 0
        assert not other["initial_state"][1:].any(), "a row that begins with a start does not see the state"


@pytest.mark.parametrize("case", [SCAN, SSD, FLA], ids=lambda case: f"{case.name}-{case.kernel}")
def test_a_packed_document_is_the_document_alone(case: Case, device: str, fixed_order: None) -> None:
    operands = moved(case.operands(2, 29, 2, resets=0.15, state=False), device)
    starts = operands["reset"].clone()
    starts[:, 0] = True
    packed = gradients(case, operands)
    for row, begin in starts.nonzero().tolist():
        following = starts[row, begin + 1 :].nonzero().flatten().tolist()
        end = begin + 1 + following[0] if following else starts.shape[1]
        alone = {**operands, "reset": None}
        for name in ("x", "dt", "B", "C"):
            alone[name] = operands[name][row : row + 1, begin:end]
        y, state = case.run(alone)
        torch.testing.assert_close(packed["y"][row : row + 1, begin:end], y)
        if end == starts.shape[1]:
            torch.testing.assert_close(packed["final_state"][row : row + 1], state)


@every_case
def test_a_row_in_pieces_and_token_by_token(case: Case, device: str) -> None:
    operands = moved(case.operands(2, 9, 2, resets=0.15, state=False), device)
    sequence = [name for name in ("x", "dt", "B", "C") if name in operands]
    whole, final = case.run(operands)

    def piece(start: int, stop: int, state: Tensor | None) -> Operands:
        cut = {name: operands[name][:, start:stop] for name in sequence}
        return {**operands, **cut, "reset": operands["reset"][:, start:stop], "initial_state": state}

    outputs, state = [], None
    for start, stop in ((0, 1), (1, 3), (3, 7)):
        y, state = case.run(piece(start, stop, state))
        outputs.append(y)
    assert state is not None
    for t in (7, 8):
        state = torch.where(operands["reset"][:, t].view(-1, *[1] * (state.ndim - 1)), 0, state)
        kept = state
        constant = {name: value for name, value in operands.items() if name not in ("reset", "initial_state")}
        outputs.append(case.step(state, {**constant, **{name: operands[name][:, t] for name in sequence}})[:, None])
        assert state is kept, "the state is updated in place"
    tolerance = 5e-3 if device == "cuda" else 1e-5
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


@every_case
def test_any_layout_of_the_same_values(case: Case, device: str) -> None:
    """Slices of a wider projection, and tokens side by side, as the kernels of mamba-ssm have them."""
    for batch, length in ((1, 1), (2, 5)):
        operands = moved(case.operands(batch, length, 2, resets=0.15, state=True), device)
        want, state = case.run(operands)
        x = operands["x"].flatten(2)
        wide = torch.randn(batch, length, x.shape[2] + 5, device=device)
        wide[..., 3:-2] = x
        by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
        for layout in (wide[..., 3:-2], by_token, x.expand(batch, length, -1)):
            y, final = case.run({**operands, "x": layout.unflatten(2, operands["x"].shape[2:])})
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(final, state)


@every_case
def test_any_layout_of_the_gradient(case: Case, device: str) -> None:
    operands = moved(case.operands(1, 1, 2, resets=0, state=True), device)
    operands["x"].requires_grad_()
    y, _ = case.run(operands)
    weight = torch.randn(1, 1, y.flatten(2).shape[2] + 3, device=device)
    (want,) = torch.autograd.grad((y.flatten(2) * weight[..., 3:]).sum(), operands["x"], retain_graph=True)
    wide = torch.cat([torch.zeros(1, 1, 3, device=device), y.flatten(2)], 2)  # whose backward cuts a slice out
    (got,) = torch.autograd.grad((wide * weight).sum(), operands["x"])
    torch.testing.assert_close(got, want)


@every_case
def test_what_a_kernel_does_not_take_runs_in_plain_pytorch(case: Case, device: str) -> None:
    operands = case.operands(2, 5, 2, resets=0.15, state=True)
    on_device = {name: value.to(device) for name, value in operands.items()}
    assert_near(gradients(case, on_device), gradients(case, operands, "reference"), 1e-10)  # float64
    state = on_device["initial_state"].clone()
    before = state.clone()
    token = {name: value[:, 0] if name in ("x", "dt", "B", "C") else value for name, value in on_device.items()}
    case.step(state, {k: v for k, v in token.items() if k not in ("reset", "initial_state")})
    assert state.dtype == torch.float64 and not torch.equal(state, before)


def test_convolutions_that_do_not_fit_run_in_plain_pytorch(device: str) -> None:
    for channels, taps in ((12, 4), (16, 5), (16, 1)):
        x, weight, bias = torch.randn(2, 7, channels), torch.randn(channels, taps), torch.randn(channels)
        operands = {"x": x, "weight": weight, "bias": bias}
        want, _ = CONV.run(operands, "reference")
        got, state = CONV.run({name: value.to(device) for name, value in operands.items()})
        torch.testing.assert_close(got.cpu(), want)
        assert state.shape == (2, channels, taps - 1)
    state = torch.zeros(2, 16, 3, device=device)
    x = torch.randn(2, 16, device=device, dtype=torch.bfloat16)  # a state of another type
    CONV.step(state, {"x": x, "weight": torch.ones(16, 4, device=device), "bias": torch.zeros(16, device=device)})
    assert torch.equal(state[..., -1], x.float())


@pytest.mark.parametrize("decay", [2.0**-20, 1.0, 1e4])
def test_documents_of_the_selective_scan_whatever_the_decay(device: str, decay: float) -> None:
    operands = SCAN.operands(2, 30, 2, resets=0.15, state=True)
    operands["A"] = operands["A"] * decay
    want, got = gradients(SCAN, operands, "reference"), gradients(SCAN, moved(operands, device))
    if decay == 1e4:
        del want["A"], got["A"]  # what is left of it, decays being 0, is rounding
    assert_near(got, want, 1e-3 if decay == 1e4 else 1e-4)  # the gradient of dt takes that rounding times A
