"""The decode loop: compiled attention beside PyTorch's, and a step that a CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from distill.mixers import set_kernels
from eval.backends import attention, attention_cpu, backend
from eval.backends.attention import Filled, attend_filled
from eval.backends.caches import FixedLayer, buffers
from eval.backends.hf import Decoder, GraphDecoder, Model
from eval.backends.peak import peak_of

MIXED = ["mamba2", "attention", "attention", "mamba1"]


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 63, 64, 65, 130, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 32), (4, 4, 8), (6, 1, 20), (8, 2, 128)])
def test_compiled_attention_is_attention(tokens: int, heads: int, kv_heads: int, width: int) -> None:
    """At every length around its pieces of 64 and of 4, over views of longer buffers whose rest is NaN."""
    torch.manual_seed(0)
    query = 3 * torch.randn(3, heads, 1, width)
    held = [torch.full((3, kv_heads, 320, width), torch.nan) for _ in range(2)]
    keys, values = (buffer[:, :, :tokens].normal_() for buffer in held)
    want = F.scaled_dot_product_attention(query.double(), keys.double(), values.double(), enable_gqa=True, scale=0.3)
    got = attention_cpu.attend(query, keys, values, 0.3)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_compiled_attention_with_scores_beyond_the_range_of_exp() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 4, length, 16) for length in (1, 200, 200))
    query *= 1000
    want = F.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(attention_cpu.attend(query, keys, values, 0.25), want, atol=1e-5, rtol=1e-4)


def test_compiled_attention_lets_nan_out() -> None:
    query, keys, values = (torch.randn(2, 4, length, 16) for length in (1, 70, 70))
    keys[1, 2, 66, 3] = torch.nan
    bad = attention_cpu.attend(query, keys, values, 0.25).isnan()[:, :, 0, 0]
    assert bad.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_attention_on_several_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    query, keys, values = torch.randn(16, 8, 1, 32), *(torch.randn(16, 4, 128, 32) for _ in range(2))
    want = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    torch.testing.assert_close(attention_cpu.attend(query, keys, values, 32**-0.5), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 1], [7, 7], [3, 12]])
def test_attention_over_what_is_filled(lengths: list[int]) -> None:
    """The rest of the buffers is large, so that reading it would show."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 1, 8), *(torch.randn(2, 12, 2, 8).transpose(1, 2) for _ in range(2))
    filled = Filled.of(2, 12, query.device)
    filled.tokens.copy_(torch.tensor(lengths))
    want = []
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        k, v = keys[one, :, :length].clone(), values[one, :, :length].clone()
        want.append(F.scaled_dot_product_attention(query[one], k, v, enable_gqa=True, scale=0.5))
        keys[one, :, length:], values[one, :, length:] = 1e4, 1e4
    torch.testing.assert_close(attend_filled(query, keys, values, 0.5, filled), torch.cat(want))


def variants(family: Any) -> dict[str, Any]:
    return {"teacher": family, "hybrid": hybridize(family, MIXED, MixerConfig())}


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_the_step_of_a_graph_decodes_as_the_other(family: Any, kind: str) -> None:
    model = variants(family)[kind]
    eager, fixed = (made(model, 2, 1, spare=9) for made in (Decoder, GraphDecoder))
    seen = []
    for step in range(9):
        assert torch.equal(eager.tokens, fixed.tokens), f"step {step}"
        seen.append(eager.tokens.flatten().tolist())
        eager.step()
        fixed.step()
    assert model.config._attn_implementation == "sdpa", "as it was"
    with pytest.raises(ValueError, match="holds 10 tokens, 11 were given"):
        fixed.step()


@pytest.mark.parametrize(("kind", "kernels"), [("teacher", "auto"), ("hybrid", "auto"), ("hybrid", "reference")])
def test_nothing_that_a_graph_reads_moves(family: Any, kind: str, kernels: str) -> None:
    """Every buffer, state, token and position stays at its address over steps, and is written there."""
    model = variants(family)[kind]
    set_kernels(model, kernels)
    decoder = GraphDecoder(model, 2, 6, spare=4)
    decoder.tokens.fill_(7)  # 0 is padding, whose embedding is zero

    def held() -> list[torch.Tensor]:
        states = [tensor for layer in decoder.cache.layers for tensor in buffers(layer)[1]]
        return [decoder.tokens, decoder.position, decoder.filled.tokens, *states]

    before = [(tensor.data_ptr(), tensor.clone()) for tensor in held()]
    for _ in range(3):
        decoder.step()
    assert len(before) == 3 + 2 * 4
    for (place, content), tensor in zip(before[1:], held()[1:], strict=True):
        assert tensor.data_ptr() == place and not torch.equal(tensor, content)
    assert decoder.tokens.data_ptr() == before[0][0]
    assert decoder.position.tolist() == [8] and decoder.filled.tokens.tolist() == [9, 9]


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_a_step_asks_no_tensor_for_its_value(family: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a value (item, bool, int, tolist, nonzero) waits for the device, and cannot be captured."""
    decoder = GraphDecoder(variants(family)[kind], 2, 6, spare=4)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    # the compiled step of a mixer on CPU is numpy; on a GPU its operators are PyTorch's or a package's
    set_kernels(decoder.model, "reference")
    decoder.step()
    with pytest.raises(AssertionError, match="read on the host"):
        bool(decoder.tokens[0, 0])


def test_the_step_runs_on_shapes_alone(hybrid: Any) -> None:
    """On the meta device there are no values at all: what asked for one would fail."""
    with torch.device("meta"):
        model = type(hybrid)(hybrid.config)
    set_kernels(model, "reference")
    decoder = GraphDecoder(model, 2, 6, spare=4)
    decoder.step()
    assert decoder.tokens.is_meta and decoder.tokens.shape == (2, 1)


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_an_engine_measures_a_model(family: Any, kind: str) -> None:
    engine = Model(kind, variants(family)[kind])
    engine.prepare(3, 20)
    assert engine.step(1) > 0 and engine.step(20) > 0 and engine.generate(5) > 0 and engine.prefill(2, 10) > 0
    for context in (1, 20):
        want = {"kv_bytes": engine.shape.kv_bytes(3, context), "state_bytes": engine.shape.state_bytes(3)}
        assert engine.cache_bytes(context) == want, "as the shape says"
    logits = 3 * engine.model.config.vocab_size * 4
    assert logits <= engine.overhead_bytes() < 100 * logits
    engine.release()
    with pytest.raises(AssertionError, match="prepare comes first"):
        engine.step(1)


def test_a_cache_that_does_not_fit_is_no_work_at_all(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would hand the memory out and end the process later."""
    from eval.backends import hf

    monkeypatch.setattr(hf, "free_memory", lambda device: 1e6)
    engine = Model("teacher", llama)
    engine.prepare(1, 100)
    with pytest.raises(MemoryError, match=r"a cache of 0\.0205 GB, and 0\.001 GB are free"):
        engine.prepare(100, 100)


def test_peak_counts_what_lives_together() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a + 1  # both live
        del a
        c = b.view(10, 100)  # no bytes of its own
        (c * 2).sum()

    assert peak_of(run, torch.device("cpu")) == pytest.approx(8000, abs=100)


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match="unknown backend 'hff'.*did you mean 'hf'"):
        backend("hff")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_a_captured_step_is_the_eager_one(family: Any, kind: str, dtype: torch.dtype) -> None:
    model = variants(family)[kind].to("cuda", dtype)
    eager, graph = GraphDecoder(model, 4, 1, spare=40), GraphDecoder(model, 4, 1, spare=40)
    assert graph.graph is not None
    eager.graph = None
    for decoder in (eager, graph):
        decoder.move_to(0)
        decoder.tokens.zero_()
        for layer in decoder.cache.layers:
            for tensor in buffers(layer)[1]:
                tensor.zero_()
    for step in range(40):
        eager.step()
        graph.step()
        assert torch.equal(eager.tokens, graph.tokens), f"step {step}"
    for ours, theirs in zip(graph.cache.layers, eager.cache.layers, strict=True):
        for a, b in zip(buffers(ours)[1], buffers(theirs)[1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1, 1, 1], [7, 300, 512]])
def test_flash_attention_over_what_is_filled(lengths: list[int]) -> None:
    torch.manual_seed(0)
    made = [torch.randn(3, 512, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    query = torch.randn(3, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    filled = Filled.of(3, 512, query.device)
    filled.tokens.copy_(torch.tensor(lengths))
    got = attend_filled(query, *made, 0.125, filled)
    want = attend_filled(query.float(), *(each.float() for each in made), 0.125, filled)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_graph_is_not_slower_than_the_host(family: Any) -> None:
    engine = Model("teacher", family.to("cuda", torch.bfloat16))
    engine.prepare(8, 256)
    assert isinstance(engine.prepared, GraphDecoder)
    graph = min(engine.step(256) for _ in range(20))
    engine.prepared.graph = None
    assert graph < min(engine.step(256) for _ in range(20))


def test_fixed_layers_know_how_much_is_filled(llama: Any) -> None:
    decoder = GraphDecoder(llama, 2, 6, spare=4)
    assert all(isinstance(layer, FixedLayer) for layer in decoder.cache.layers)
    assert decoder.cache.get_seq_length() == 5 and attention.IN_PLACE == "distill_in_place"
