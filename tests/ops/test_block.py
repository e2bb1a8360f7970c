"""What a block does beside its mixer, in one compiled pass, against float64 operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.ops import block_cpu, cpu


def make(rows: int, width: int, inner: int, carried: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    return {
        "hidden": 3 * draw(rows, width),
        "mixed": draw(rows, width),
        "norm": (draw(width), 1e-5),
        "mlp": (draw(inner, width), draw(inner, width), draw(width, inner)),
        "following": (draw(width), 1e-2),
        "after": draw(carried, width) if carried else None,
    }


def exact(hidden: Tensor, mixed: Tensor, norm: Any, mlp: Any, following: Any, after: Any) -> tuple[Tensor, Tensor]:
    """The same in float64, by PyTorch."""
    gate, up, down = (weight.double() for weight in mlp)
    out = hidden.double() + mixed.double()
    normed = F.rms_norm(out, out.shape[-1:], norm[0].double(), norm[1])
    out = out + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    carry = F.rms_norm(out, out.shape[-1:], following[0].double(), following[1])
    return out, carry if after is None else carry @ after.double().T


@pytest.mark.parametrize("carried", [None, 70, 131])
@pytest.mark.parametrize(("width", "inner"), [(48, 64), (33, 21), (1, 3)])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 37])
def test_it_is_the_operators_one_by_one(
    rows: int, width: int, inner: int, carried: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SERIAL_WORK", 0)
    given = make(rows, width, inner, carried)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(block_cpu.rest(**given))
    torch.set_num_threads(before)
    for one, other, want in zip(*found, exact(**given), strict=True):
        assert torch.equal(one, other), "the same bits for any number of threads"
        torch.testing.assert_close(one.double(), want, rtol=1e-4, atol=1e-5)


def test_a_row_is_the_same_whoever_is_beside_it() -> None:
    given = make(21, 48, 64, 70)
    whole = block_cpu.rest(**given)
    for row in (0, 7, 20):
        alone = block_cpu.rest(**{**given, "hidden": given["hidden"][row:][:1], "mixed": given["mixed"][row:][:1]})
        assert all(torch.equal(part[row:][:1], one) for part, one in zip(whole, alone, strict=True))


def test_nan_and_inf_come_out() -> None:
    given = make(3, 48, 64, None)
    given["hidden"][1, 5] = torch.nan
    given["mixed"][2, 5] = torch.inf
    out, carry = block_cpu.rest(**given)
    assert out[0].isfinite().all() and carry[0].isfinite().all()
    assert out[1].isnan().all() and out[2].isnan().any()
