"""The chunked scan of Mamba-2 against its plain recurrence in float64: forward, every gradient, documents, decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.ops import cpu, ssd_chunked, ssd_cpu, ssd_reference
from distill.ops.ssd import ssd, ssd_update

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def operands(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, *, dt: float = 0.1, decay: float = 16.0
) -> list[Tensor]:
    """x, dt, A, B, C, D and an initial state in float64, the same for the same shapes."""
    make = torch.Generator().manual_seed(length * 7 + heads)
    normal = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    return [
        normal(batch, length, heads, width),
        uniform(batch, length, heads) * dt + 1e-3,
        -uniform(heads) * decay - 1e-3,
        normal(batch, length, groups, states),
        normal(batch, length, groups, states),
        normal(heads),
        normal(batch, heads, width, states),
    ]


def starts(batch: int, length: int) -> Tensor:
    """Document starts, other ones in each row."""
    make = torch.Generator().manual_seed(length)
    return torch.rand(batch, length, generator=make) < 0.06


def gradients(scan: Any, tensors: list[Tensor], reset: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """y, the final state, and the gradient of a fixed weighting of y by every operand."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y, state = scan(*leaves[:6], reset=reset, initial_state=leaves[6], **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y.double() * weights).sum().backward()
    found = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    assert all(grad is not None for grad in found.values())
    return {"y": y.detach(), "state": state, **found}  # type: ignore[dict-item]


SHAPES = [(2, 1, 4, 8, 4, 8), (3, 2, 3, 5, 3, 7), (2, 63, 4, 8, 2, 16), (1, 1000, 2, 4, 1, 8), (1, 130, 8, 16, 8, 16)]


SCANS = {
    "chunks of 16": partial(ssd_chunked.scan, chunk=16),
    "chunks of 64": partial(ssd_chunked.scan, chunk=64),
    "cpu": ssd_cpu.scan,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_is_within_1e_4_of_the_plain_recurrence(shape: Any, scan: str, packed: bool) -> None:
    tensors = operands(*shape)
    reset = starts(*shape[:2]) if packed else None
    expected = gradients(ssd_reference.scan, tensors, reset)
    found = gradients(SCANS[scan], [tensor.float() for tensor in tensors], reset)
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-4, (name, float(error))
    assert found["y"].dtype == torch.float32


KERNELS = ["cpu", "chunked"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dt", "decay"), [(1e3, 1e3), (1e-6, 1e-6), (30.0, 16.0), (1e3, 1e-9)])
def test_extreme_steps_and_decays_neither_overflow_nor_lose_precision(
    dt: float, decay: float, packed: bool, kernel: str
) -> None:
    tensors = operands(2, 130, 4, 8, 4, 8, dt=dt, decay=decay)
    reset = starts(2, 130) if packed else None
    expected = gradients(ssd_reference.scan, tensors, reset)
    for name, value in gradients(ssd, [tensor.float() for tensor in tensors], reset, kernel=kernel).items():
        assert value.isfinite().all(), name
        assert (value.double() - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-12, name


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tiny_step_after_a_huge_one_keeps_its_precision(kernel: str) -> None:
    x, dt, A, B, C, D, _ = operands(1, 64, 1, 4, 1, 4)
    dt[:] = 1e-4
    dt[:, 3] = 1e5
    expected, _ = ssd_reference.scan(x, dt, A, B, C, D)
    found, _ = ssd(*(tensor.float() for tensor in (x, dt, A, B, C, D)), kernel=kernel)
    assert (found[:, 4:].double() - expected[:, 4:]).norm() < 1e-4 * expected[:, 4:].norm()


@pytest.mark.parametrize("scan", SCANS)
def test_float64_agrees_to_the_last_digits(scan: str) -> None:
    tensors = operands(2, 100, 4, 8, 2, 8)
    expected = gradients(ssd_reference.scan, tensors, starts(2, 100))
    for name, value in gradients(SCANS[scan], tensors, starts(2, 100)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_bf16_inputs_are_computed_in_float32() -> None:
    tensors = [tensor.bfloat16() for tensor in operands(2, 63, 4, 8, 4, 8)]
    y, state = ssd(*tensors[:6], initial_state=tensors[6])
    wide, _ = ssd(*(tensor.float() for tensor in tensors[:6]), initial_state=tensors[6].float())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("kernel", ["cpu", "chunked", "reference"])
def test_autocast_does_not_reach_the_scan(kernel: str) -> None:
    tensors = [tensor.float() for tensor in operands(1, 70, 2, 8, 2, 8)]
    want = gradients(ssd, tensors, None, kernel=kernel)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(ssd, tensors, None, kernel=kernel)
    assert torch.equal(got["y"], want["y"]) and torch.equal(got["state"], want["state"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cut", [1, 20, 32, 64, 99])
def test_one_document_does_not_change_a_bit_of_the_next(cut: int, kernel: str) -> None:
    reset = torch.zeros(1, 130, dtype=torch.bool)
    reset[:, cut] = True
    tensors = [tensor.float() for tensor in operands(1, 130, 4, 8, 4, 8)]
    others = [tensor.clone() for tensor in tensors]
    for index in (0, 1, 3, 4):
        others[index][:, :cut] *= 3
    others[6] += 1
    one, two = (gradients(ssd, each, reset, kernel=kernel) for each in (tensors, others))
    assert not torch.equal(one["y"][:, :cut], two["y"][:, :cut])
    assert torch.equal(one["y"][:, cut:], two["y"][:, cut:])
    assert torch.equal(one["state"], two["state"])
    for name in ("x", "dt", "B", "C"):
        assert torch.equal(one[name][:, cut:], two[name][:, cut:]), name
    assert not one["initial_state"].isnan().any()


def test_chunks_of_tokens_and_single_tokens_continue_the_state() -> None:
    tensors = [tensor.float() for tensor in operands(2, 40, 4, 8, 2, 8)]
    x, dt, A, B, C, D, state = tensors
    whole, last = ssd(x, dt, A, B, C, D, initial_state=state)
    parts = []
    for first, end in ((0, 7), (7, 30)):
        y, state = ssd(
            *(t[:, first:end] for t in (x, dt)), A, *(t[:, first:end] for t in (B, C)), D, initial_state=state
        )
        parts.append(y)
    for t in range(30, 40):
        parts.append(ssd_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_the_same_bits_from_run_to_run() -> None:
    tensors = [tensor.float() for tensor in operands(2, 200, 4, 8, 4, 8)]
    one, two = (gradients(ssd, tensors, starts(2, 200), kernel="chunked") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_compiled_scan_gives_the_same_bits_for_any_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SERIAL_WORK", 0)
    tensors, before, found = [tensor.float() for tensor in operands(2, 200, 4, 8, 2, 8)], torch.get_num_threads(), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        found.append(gradients(ssd, tensors, starts(2, 200), kernel="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(one[name], value) for one in found[1:] for name, value in found[0].items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_infinite_document_leaves_the_others_alone(kernel: str) -> None:
    """A select and not a product with zero, which would be NaN."""
    reset = torch.zeros(1, 70, dtype=torch.bool)
    reset[:, [20, 40]] = True
    tensors = [tensor.float() for tensor in operands(1, 70, 2, 4, 2, 4)]
    want = gradients(ssd, tensors, reset, kernel=kernel)
    for index in (0, 3, 4):
        tensors[index] = tensors[index].clone()
        tensors[index][:, 20:40] = torch.inf
    got = gradients(ssd, tensors, reset, kernel=kernel)
    for name in ("y", "x", "dt", "B", "C"):
        for outside in (slice(0, 20), slice(40, 70)):
            assert torch.equal(got[name][:, outside], want[name][:, outside]), name
    assert torch.equal(got["state"], want["state"])


def test_long_documents_keep_the_gradients_of_parameters() -> None:
    tensors = operands(1, 20_000, 1, 4, 1, 4)
    found = gradients(ssd, [tensor.float() for tensor in tensors], None, kernel="cpu")
    expected = gradients(ssd, tensors, None, kernel="cpu")
    for name in ("A", "D"):
        assert (found[name].double() - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x must be \[B, T, H, P\]"),
        ({"dt": torch.zeros(2, 5, 3)}, r"dt must have shape \[2, 5, 4\], got \[2, 5, 3\]"),
        ({"A": torch.zeros(3)}, r"A must have shape \[4\]"),
        ({"B": torch.zeros(2, 5, 3, 8)}, "H=4 must be a multiple of the groups G=3"),
        ({"reset": torch.zeros(2, 5)}, "reset must be bool"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must have shape \[2, 5\]"),
        ({"initial_state": torch.zeros(2, 4, 8, 7)}, r"initial_state must have shape \[2, 4, 8, 8\]"),
        ({"x": torch.zeros(2, 0, 4, 8)}, "at least one token"),
        ({"x": torch.zeros(2, 5, 4, 8, dtype=torch.long)}, "x must be of a floating-point type, got torch.int64"),
        ({"kernel": "chunk"}, "unknown kernel 'chunk' .did you mean 'chunked'"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given = dict(zip(NAMES[:6], (tensor.float() for tensor in operands(2, 5, 4, 8, 4, 8)), strict=False)) | change
    with pytest.raises(ValueError, match=message):
        ssd(**given)


@pytest.mark.parametrize("kernel", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("shape", [(1, 4, 8, 4, 8), (3, 4, 5, 2, 7), (2, 16, 64, 16, 64)], ids=str)
def test_every_update_is_a_step_of_the_recurrence(shape: tuple[int, ...], kernel: str) -> None:
    batch, *rest = shape
    x, dt, A, B, C, D, state = operands(batch, 1, *rest)
    y, last = ssd_reference.scan(x, dt, A, B, C, D, initial_state=state)
    for dtype, precision in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        single = [tensor.to(dtype) for tensor in (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)]
        carried = state.clone().to(dtype)
        found = ssd_update(carried, *single, kernel=kernel)
        assert found.dtype == carried.dtype == dtype
        torch.testing.assert_close(found.double(), y[:, 0], rtol=precision, atol=precision)
        torch.testing.assert_close(carried.double(), last, rtol=precision, atol=precision)


def test_auto_takes_the_compiled_update_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    update = ssd_cpu.update
    monkeypatch.setattr(ssd_cpu, "update", lambda *operands: called.append(1) or update(*operands))
    x, dt, A, B, C, D, state = (tensor.float() for tensor in operands(2, 1, 4, 8, 4, 8))
    ssd_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    assert called


@pytest.mark.parametrize("change", [{"x": torch.zeros(2, 4)}, {"dt": torch.zeros(2, 3)}, {"B": torch.zeros(2, 3, 8)}])
def test_an_update_of_a_wrong_shape_leaves_the_state(change: dict[str, Tensor]) -> None:
    x, dt, A, B, C, D, state = (tensor.float() for tensor in operands(2, 1, 4, 8, 4, 8))
    given = {"x": x[:, 0], "dt": dt[:, 0], "A": A, "B": B[:, 0], "C": C[:, 0], "D": D} | change
    before = state.clone()
    with pytest.raises(ValueError, match="must"):
        ssd_update(state, **given)
    with pytest.raises(ValueError, match="contiguous float32"):
        ssd_update(state.half(), x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    assert torch.equal(state, before)


@pytest.mark.parametrize("kernel", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("groups", [4, 2])
def test_an_empty_batch(kernel: str, groups: int) -> None:
    leaves = [o.float().requires_grad_() for o in operands(0, 70, 4, 8, groups, 8)]
    y, state = ssd(*leaves[:6], reset=starts(0, 70), initial_state=leaves[6], kernel=kernel)
    y.sum().backward()
    assert y.shape == (0, 70, 4, 8) and state.shape == (0, 4, 8, 8)
    assert leaves[2].grad is not None and not leaves[2].grad.any()
