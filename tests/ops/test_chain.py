"""One token through several blocks in one compiled pass, against the same blocks one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.mixers import available
from distill.ops import block_cpu, chain_cpu, cpu
from tests.conftest import random_mixer

SHAPES = [(4, 2, 32, 64), (6, 1, 8, 33)]  # query heads, key/value heads, head_dim, intermediate size
WIDTH, BLOCKS, BATCH = 48, 3, 37


class Chain:
    """Random blocks of one kind, and what they are given."""

    def __init__(self, name: str, shape: tuple[int, int, int, int], after: int | None, **options: Any) -> None:
        heads, kv_heads, head_dim, inner = shape
        self.mixers = [random_mixer(name, heads, kv_heads, head_dim, seed, **options) for seed in range(BLOCKS)]
        with torch.random.fork_rng():
            torch.manual_seed(5)
            inputs = [mixer.in_proj.weight for mixer in self.mixers]
            inputs.append(torch.randn(after, WIDTH) if after else None)
            self.hidden, self.carry = torch.randn(BATCH, WIDTH), torch.randn(BATCH, len(inputs[0]))
            self.blocks = [self.block(place, inner, inputs) for place in range(BLOCKS)]

    def block(self, place: int, inner: int, inputs: list[Any]) -> chain_cpu.Block:
        mixer = self.mixers[place]
        scan = (mixer.d_inner, mixer.d_state) if hasattr(mixer, "d_state") else (mixer.heads, *2 * [mixer.head_dim])
        conv = mixer.conv1d.weight
        states = (torch.randn(BATCH, len(conv), conv.shape[-1] - 1), torch.randn(BATCH, *scan))
        mlp = (torch.randn(inner, WIDTH) / 7, torch.randn(inner, WIDTH) / 7, torch.randn(WIDTH, inner) / 7)
        norms = [(torch.randn(WIDTH), eps) for eps in (1e-5, 1e-2)]
        weights = tuple(weight.detach() for weight in mixer.step_weights())
        inputs = [each if each is None else each.detach() for each in inputs]
        project = mixer.out_proj.weight.detach()
        return chain_cpu.Block(weights, states, inputs[place], project, norms[0], mlp, norms[1], inputs[place + 1])

    def with_states(self, rows: slice = slice(None)) -> list[chain_cpu.Block]:
        """The blocks with copies of their states, of these rows."""
        return [each._replace(states=tuple(state[rows].clone() for state in each.states)) for each in self.blocks]

    def go(self, rows: slice = slice(None), threads: int = 1) -> list[Tensor]:
        before, blocks = torch.get_num_threads(), self.with_states(rows)
        torch.set_num_threads(threads)
        with torch.no_grad():
            found = self.mixers[0].through(self.hidden[rows], self.carry[rows], blocks)
        torch.set_num_threads(before)
        return [*found, *(state for block in blocks for state in block.states)]

    @torch.no_grad()
    def one_by_one(self) -> list[Tensor]:
        hidden, carry, blocks = self.hidden, self.carry, self.with_states()
        for mixer, block in zip(self.mixers, blocks, strict=True):
            mixed = mixer.compiled_step(carry, *block.states) @ block.project.T
            hidden, carry = block_cpu.rest(hidden, mixed, block.norm, block.mlp, block.following, block.after)
        return [hidden, carry, *(state for block in blocks for state in block.states)]


@pytest.mark.parametrize("after", [None, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", available())
def test_it_is_block_after_block(
    name: str, shape: tuple[int, int, int, int], after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SERIAL_WORK", 0)
    chain = Chain(name, shape, after)
    found = chain.go()
    for one, other, want in zip(found, chain.go(threads=2), chain.one_by_one(), strict=True):
        assert torch.equal(one, other), "the same bits for any number of threads"
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)
    given = [chain.hidden, chain.carry]
    assert all(
        torch.equal(one, other)
        for one, other in zip(given, [Chain(name, shape, after).hidden, chain.carry], strict=True)
    )


@pytest.mark.parametrize("options", [{"mil_layout": "faithful"}, {"d_conv": 2}], ids=str)
def test_options_of_mamba1(options: dict[str, Any]) -> None:
    chain = Chain("mamba1", SHAPES[0], 70, **options)
    for one, want in zip(chain.go(), chain.one_by_one(), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", available())
def test_a_row_is_the_same_whoever_is_beside_it(name: str) -> None:
    chain = Chain(name, SHAPES[0], 70)
    whole = chain.go()
    for row in (0, 15, 16, BATCH - 1):
        alone = chain.go(slice(row, row + 1))
        assert all(torch.equal(part[row : row + 1], one) for part, one in zip(whole, alone, strict=True))


@pytest.mark.parametrize("name", available())
def test_nan_stays_in_its_row(name: str) -> None:
    chain = Chain(name, SHAPES[0], None)
    chain.carry[1, 5], chain.hidden[20, 3] = torch.nan, torch.inf
    finite = [part.flatten(1).isfinite().all(1) for part in chain.go()[:2]]
    for rows in finite:
        assert not rows[1] and not rows[20] and rows.sum() == BATCH - 2


def test_shapes_that_do_not_fit_are_refused() -> None:
    chain = Chain("mamba1", SHAPES[0], None)
    with pytest.raises(ValueError, match="same shapes"):
        chain.mixers[0].through(chain.hidden[:5], chain.carry[:5], chain.blocks)
    odd = [*chain.blocks[:2], chain.blocks[2]._replace(mlp=Chain("mamba1", SHAPES[1], None).blocks[0].mlp)]
    with pytest.raises(ValueError, match="same shapes"):
        chain.mixers[0].through(chain.hidden, chain.carry, odd)


def test_softplus() -> None:
    values = torch.cat([torch.linspace(-90, 90, 100_001), torch.tensor([-torch.inf, torch.inf])])
    found = torch.tensor([cpu.softplus(value) for value in values.numpy()], dtype=torch.float32)
    exact = F.softplus(values.double(), threshold=1e9)
    worst = ((found.double() - exact).abs() / exact)[values.abs() < 87].max()
    assert worst < 5e-7 and found[-2] == 0 and found[-1] == torch.inf
    assert torch.tensor(cpu.softplus(float("nan"))).isnan()
