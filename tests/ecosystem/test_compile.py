"""torch.compile of hybrids: the decode step is one graph, the rest breaks where it must, and results stay the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize
from distill.ops.causal_conv1d import causal_conv1d_update
from distill.ops.selective_scan import selective_scan_update
from distill.ops.ssd import ssd_update

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["mamba1", "mamba2"])
def small(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    """H1-1/2 of a family whose blocks take masks by layer type, which is the harder kind."""
    return hybridize(make_model("qwen3", num_hidden_layers=2), [request.param, "attention"], MixerConfig(), seed=0)


def tokens(*shape: int) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(0))


def decode(model: Any, step: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of 8 tokens prefilled by ``model``, the others one by one by ``step``."""
    cache = StaticCache(config=model.config, max_cache_len=24)
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    first = {} if mask is None else {"attention_mask": mask[:, :8]}
    parts = [model(ids[:, :8], past_key_values=cache, position_ids=positions[:, :8], **first).logits]
    for place in range(8, ids.shape[1]):
        ready = model.create_masks_for_generate(
            model.config,
            torch.empty(ids.shape[0], 1, 0),
            None if mask is None else mask[:, : place + 1],
            cache,
        )
        ready["full_attention"] = ready["full_attention"].contiguous()  # as generate makes them
        one = slice(place, place + 1)
        given = {"past_key_values": cache, "position_ids": positions[:, one].contiguous(), "attention_mask": ready}
        parts.append(step(ids[:, one], **given).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def test_the_decode_step_is_one_graph(small: Any) -> None:
    """``fullgraph`` raises at any break; one compilation must serve every step, another cache, and a padded batch."""
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(small.forward, backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(decode(small, step, ids), small(ids, use_cache=False).logits, **CLOSE)
    padded = decode(small, step, ids, mask)
    torch.testing.assert_close(padded[1:], small(ids[1:], use_cache=False).logits, **CLOSE)
    torch.testing.assert_close(padded[:1, 5:], small(ids[:1, 5:], use_cache=False).logits, **CLOSE)
    assert counter.frame_count == 1
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("distill" in name and "_update" in name for name in names), "the mixer is not in the graph"


@torch.no_grad()
def test_generate_compiles_the_step(small: Any) -> None:
    ids, counters = tokens(2, 9), torch._dynamo.utils.counters
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    plain = small.generate(ids, **options)
    counters.clear()
    assert small.generate(ids, compile_config=config, **options).tolist() == plain.tolist()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor(small: Any) -> None:
    ids = tokens(1, 12)
    step = torch.compile(small.forward, fullgraph=True, dynamic=False)
    torch.testing.assert_close(decode(small, step, ids), decode(small, small, ids), **CLOSE)


@pytest.mark.slow
def test_prefill_and_training_break_but_are_right(small: Any) -> None:
    ids = tokens(2, 12)
    compiled = torch.compile(small, backend="eager")
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        inputs: list[dict[str, Any]] = [
            {"input_ids": ids, "use_cache": False},
            {"input_ids": ids, "attention_mask": mask, "use_cache": False},
        ]
        for given in inputs:
            torch.testing.assert_close(compiled(**given).logits[:, 4:], small(**given).logits[:, 4:], **CLOSE)
    gradients = []
    for model in (small, compiled):
        small.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in small.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


SHAPES = {
    "causal_conv1d": [(2, 8, 3), (2, 8), (8, 4), (8,)],
    "selective_scan": [(2, 8, 4), (2, 8), (2, 8), (8, 4), (2, 2, 4), (2, 2, 4), (8,)],
    "ssd": [(2, 2, 4, 4), (2, 2, 4), (2, 2), (2,), (2, 2, 4), (2, 2, 4), (2,)],
}
"""Of the state and the inputs of each single-token update."""
UPDATES = {"causal_conv1d": causal_conv1d_update, "selective_scan": selective_scan_update, "ssd": ssd_update}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_operators_keep_what_they_promise_a_compiler(name: str, dtype: torch.dtype) -> None:
    """Schema (only the state is overwritten), fake and traced results, by PyTorch's own check; and the values."""
    rng = torch.Generator().manual_seed(0)
    state, x, *others = (torch.rand(shape, generator=rng) for shape in SHAPES[name])
    inputs = [x.to(dtype), *others]
    operator = getattr(torch.ops.distill, f"{name}_update").default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (state.clone(), inputs, "auto"), test_utils=tests)
    eager, compiled = state.clone(), state.clone()
    y = UPDATES[name](eager, *inputs)
    assert torch.equal(operator(compiled, inputs), y) and torch.equal(compiled, eager)
    assert not torch.equal(eager, state) and y.dtype == dtype
