"""One token through a mixer: the compiled step, the operators one by one, and a forward over all tokens agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from distill.mixers import available
from distill.ops import cpu, decode_cpu
from tests.conftest import random_mixer

SHAPES = [(4, 2, 32), (4, 4, 16), (6, 1, 8), (2, 2, 80)]  # query heads, key/value heads, head_dim
OPTIONS: list[dict[str, Any]] = [{}, {"mil_layout": "faithful"}, {"bc_norm": True}]
CASES = [(shape, options) for shape in SHAPES for options in OPTIONS] + [(SHAPES[0], {"d_conv": k}) for k in (2, 7)]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
@pytest.mark.parametrize("name", available())
def test_the_compiled_step_is_the_mixer(
    name: str, shape: tuple[int, int, int], options: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    compiled = getattr(decode_cpu, name)
    monkeypatch.setattr(decode_cpu, name, lambda *given, **keys: steps.append(1) or compiled(*given, **keys))
    mixer = random_mixer(name, *shape, **options)
    tokens = torch.randn(batch, 9, 48, generator=torch.Generator().manual_seed(0))
    whole, _ = mixer(tokens)
    found = {}
    for kernels in ("auto", "reference"):
        mixer.kernels = kernels
        cache = Cache(layers=[LinearAttentionLayer()])
        parts = [mixer(part, past_key_values=cache)[0] for part in tokens.split([3, 1, 1, 1, 1, 1, 1], dim=1)]
        found[kernels] = torch.cat(parts, 1)
        torch.testing.assert_close(found[kernels], whole, rtol=1e-4, atol=1e-5)
        layer = cache.layers[0]
        found[kernels + " state"] = layer.recurrent_states[0].clone()
        found[kernels + " window"] = layer.conv_states[0].clone()
    assert len(steps) == 6, "only auto takes the compiled step, and for every single token"
    torch.testing.assert_close(found["auto state"], found["reference state"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["auto window"], found["reference window"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", available())
def test_a_batch_that_wakes_threads_gives_what_one_thread_gives(name: str) -> None:
    mixer, results = random_mixer(name, 8, 4, 64), []
    tokens = torch.randn(32, 4, 48, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cache = Cache(layers=[LinearAttentionLayer()])
        outputs = [mixer(part, past_key_values=cache)[0] for part in tokens.split([2, 1, 1], dim=1)]
        results.append((torch.cat(outputs, 1), cache.layers[0].recurrent_states[0]))
    torch.set_num_threads(before)
    assert results[0][1].numel() > cpu.SERIAL_WORK
    for one, other in zip(*results, strict=True):  # not the very bits: a matrix product may depend on its threads
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", available())
def test_half_types_and_double_go_through_the_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, name, None)  # would fail if it were called
    for dtype in (torch.bfloat16, torch.float64):
        mixer = random_mixer(name, 4, 2, 32).to(dtype)
        tokens, cache = torch.randn(2, 4, 48, dtype=dtype), Cache(layers=[LinearAttentionLayer()])
        parts = [mixer(part, past_key_values=cache)[0] for part in tokens.split([3, 1], dim=1)]
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(torch.cat(parts, 1), mixer(tokens)[0], rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", available())
def test_the_defaults_of_the_process_change_nothing(name: str) -> None:
    """A float32 model on CPU in a process whose default is another dtype or device."""
    mixer, tokens, found = random_mixer(name, 4, 2, 32), torch.randn(2, 4, 48), []
    for dtype, device in (
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
        (torch.float64, "cpu"),
        (torch.float32, "meta"),
    ):
        cache = Cache(layers=[LinearAttentionLayer()])
        decode_cpu.sources.cache_clear()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts = [mixer(part, past_key_values=cache)[0] for part in tokens.split([3, 1], dim=1)]
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(torch.cat(parts, 1))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", available())
def test_a_single_token_with_gradients_keeps_them(name: str) -> None:
    mixer, cache = random_mixer(name, 4, 2, 32), Cache(layers=[LinearAttentionLayer()])
    tokens = torch.randn(2, 4, 48)
    with torch.no_grad():
        mixer(tokens[:, :3], past_key_values=cache)
    mixer(tokens[:, 3:], past_key_values=cache)[0].sum().backward()
    assert mixer.in_proj.weight.grad is not None and bool(mixer.in_proj.weight.grad.any())
