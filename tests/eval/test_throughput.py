"""Decode throughput: the integral of step times, and the in-place cache that the steps run on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import MixerConfig, ThroughputConfig
from distill.hybrid.surgery import hybridize
from eval.backends import attention, attention_cpu
from eval.backends.hf import Decoder, InPlaceLayer, in_place_cache
from eval.throughput import headline, measure, one_in_n_out

KV_HEADS, HEAD_DIM, INNER, STATES, TAPS = 2, 32, 128, 16, 4
BYTES = 4
SDPA = "scaled_dot_product_attention"


def rows_of(contexts: list[int], seconds: Any, model: str = "m", batch: int = 8) -> list[dict[str, Any]]:
    return [{"model": model, "batch": batch, "context": c, "step_seconds": seconds(c)} for c in contexts]


def state_bytes(batch: int) -> int:
    """A mamba1 block's: an fp32 state of N a channel, and the last K - 1 inputs of the convolution."""
    return batch * INNER * (STATES + TAPS - 1) * BYTES


def kv_bytes(batch: int, context: int) -> int:
    return 2 * batch * KV_HEADS * HEAD_DIM * context * BYTES


@pytest.mark.parametrize("contexts", [[1, 1000], [1, 2, 3, 1000], [1, 17, 256, 999, 1000], [1, 500, 1000, 4000]])
def test_one_in_n_out_is_the_sum_of_linear_step_times(contexts: list[int]) -> None:
    def seconds(context: int) -> float:
        return 0.002 + 3e-6 * context

    brute = 8 * 1000 / sum(seconds(context) for context in range(1, 1001))
    assert one_in_n_out(rows_of(contexts, seconds), "m", 8, 1000) == pytest.approx(brute, rel=1e-12)


def test_one_in_n_out_of_a_bent_line() -> None:
    """Straight between the sampled contexts, whatever they are; rows of other models and batches do not count."""
    sampled = {1: 1.0, 4: 7.0, 6: 2.0}
    every = {1: 1.0, 2: 3.0, 3: 5.0, 4: 7.0, 5: 4.5, 6: 2.0}
    rows = rows_of([6, 1, 4], sampled.__getitem__)
    rows += rows_of([1, 2, 6], lambda c: 99.0, model="other") + rows_of([1, 3, 6], lambda c: 99.0, batch=1)
    assert one_in_n_out(rows, "m", 8, 6) == pytest.approx(8 * 6 / sum(every.values()))


@pytest.mark.parametrize("contexts", [[2, 1000], [1, 999], [1], [1000], [], [1, 2000]])
def test_contexts_that_do_not_cover_are_an_error(contexts: list[int]) -> None:
    with pytest.raises(ValueError, match="step times of m at batch 8 do not cover contexts 1 to 1000"):
        one_in_n_out(rows_of(contexts, lambda c: 0.1), "m", 8, 1000)


def test_headline_is_at_the_largest_batch() -> None:
    rows = []
    for batch, teacher, hybrid in ((1, 1.0, 1.0), (4, 2.0, 0.5)):
        rows += rows_of([1, 10], lambda c, t=teacher: t, "teacher", batch)
        rows += rows_of([1, 10], lambda c, h=hybrid: h, "hybrid", batch)
    options = ThroughputConfig(batches=[4, 1], output_tokens=10)
    assert headline(rows, "teacher", "hybrid", options) == pytest.approx(
        {"batch": 4, "output_tokens": 10, "teacher_tokens_per_second": 2.0, "tokens_per_second": 8.0, "ratio": 4.0}
    )


@torch.no_grad()
@pytest.mark.parametrize("hybrid", [False, True])
def test_decoding_in_place_gives_the_logits_of_a_full_forward(family: Any, hybrid: bool) -> None:
    model = hybridize(family, ["mamba1", "attention", "attention", "mamba1"], MixerConfig()) if hybrid else family
    ids = torch.randint(5, 56, (3, 15), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    cache, parts = in_place_cache(model, 15), []
    for part in ids.split([4, *[1] * 11], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 15
    with pytest.raises(ValueError, match="holds 15 tokens, 16 were given"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("hybrid", [False, True])
def test_decoder_decodes_greedily(family: Any, hybrid: bool) -> None:
    """From an empty context, its steps are the argmax of full forwards: token 0 in, N out."""
    model = hybridize(family, ["mamba1", "attention", "attention", "mamba1"], MixerConfig()) if hybrid else family
    decoder, ids = Decoder(model, batch=2, context=1, spare=8), torch.zeros(2, 1, dtype=torch.long)
    for step in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(decoder.tokens, ids[:, -1:]), f"step {step}"
        decoder.step()


@pytest.mark.parametrize("hybrid", [False, True])
def test_every_cache_is_written_in_place(family: Any, hybrid: bool) -> None:
    """A step writes one place of every key and value buffer, and states where they lie: no cache grows or moves."""
    mixers = ["mamba1", "attention", "attention", "mamba1"] if hybrid else ["attention"] * 4
    decoder = Decoder(hybridize(family, mixers, MixerConfig()) if hybrid else family, batch=2, context=12, spare=4)
    decoder.tokens = torch.full((2, 1), 7)  # 0 is padding, whose embedding is zero
    layers = decoder.cache.layers
    assert ["attention" if isinstance(layer, InPlaceLayer) else "mamba1" for layer in layers] == mixers

    def buffers(layer: Any) -> list[torch.Tensor]:
        if isinstance(layer, InPlaceLayer):
            return [layer.key_buffer, layer.value_buffer]
        return [*layer.conv_states.values(), *layer.recurrent_states.values()]

    before = [[(tensor.data_ptr(), tensor.clone()) for tensor in buffers(layer)] for layer in layers]
    decoder.step()
    for layer, old in zip(layers, before, strict=True):
        for tensor, (place, content) in zip(buffers(layer), old, strict=True):
            assert tensor.data_ptr() == place
            assert not torch.equal(tensor, content), "the step has written"
            if isinstance(layer, InPlaceLayer):
                assert tensor.shape == (2, KV_HEADS, 16, HEAD_DIM)
                changed = (tensor != content).any(-1).any(0).any(0).nonzero().flatten().tolist()
                assert changed == [11], "one step writes one place"
        if isinstance(layer, InPlaceLayer):
            assert layer.keys.data_ptr() == layer.key_buffer.data_ptr(), "attention reads the buffer itself"


@pytest.mark.parametrize("kernel", ["compiled", "sdpa"])
def test_keys_and_values_are_not_expanded(family: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped-query attention reads its KV heads where they lie: an expanding teacher would be slower than it is."""
    decoder = Decoder(family, batch=2, context=12)
    seen: list[tuple[int, int]] = []
    where, name = (attention_cpu, "attend") if kernel == "compiled" else (torch.nn.functional, SDPA)
    attend = getattr(where, name)

    def watched(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        seen.extend((tensor.shape[1], tensor.data_ptr()) for tensor in (key, value))
        return attend(query, key, value, *rest, **options)

    monkeypatch.setattr(where, name, watched)
    monkeypatch.setattr(attention, "has_numba", lambda: kernel == "compiled")
    decoder.timed_step()
    buffers = [buffer for layer in decoder.cache.layers for buffer in (layer.key_buffer, layer.value_buffer)]
    assert seen == [(KV_HEADS, buffer.data_ptr()) for buffer in buffers]


@pytest.mark.parametrize("context", [1, 2, 3, 50])
def test_every_timed_step_is_at_the_context(hybrid: Any, context: int) -> None:
    decoder = Decoder(hybrid, batch=2, context=context)
    seen: list[int] = []
    attention = hybrid.model.layers[1].self_attn.k_proj
    attention.register_forward_hook(lambda *_: seen.append(decoder.cache.get_seq_length(1)))
    for _ in range(3):
        assert decoder.timed_step() > 0
        assert decoder.cache.get_seq_length(1) == context
    assert seen == [context - 1] * 3


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_bytes(llama: Any, hybrid: Any, batch: int) -> None:
    """As measured: 4 attention blocks against 2, and 2 states whose size does not depend on the context."""
    options = ThroughputConfig(batches=[batch], contexts=[7, 40], output_tokens=20, repeats=1)
    rows = measure({"teacher": llama, "hybrid": hybrid}, options)
    got = {(row["model"], row["context"]): (row["kv_bytes"], row["state_bytes"]) for row in rows}
    want = {("teacher", c): (4 * kv_bytes(batch, c), 0) for c in (1, 7, 20, 40)}
    want |= {("hybrid", c): (2 * kv_bytes(batch, c), 2 * state_bytes(batch)) for c in (1, 7, 20, 40)}
    assert got == want
    assert all(row["cache_bytes"] == row["kv_bytes"] + row["state_bytes"] for row in rows)


def test_measure_rows(llama: Any, hybrid: Any) -> None:
    lines: list[str] = []
    options = ThroughputConfig(batches=[1, 2], contexts=[8], output_tokens=16, repeats=3)
    rows = measure({"teacher": llama, "hybrid": hybrid}, options, lines.append)
    assert [(r["model"], r["batch"], r["context"]) for r in rows] == [
        (model, batch, context) for batch in (1, 2) for context in (1, 8, 16) for model in ("teacher", "hybrid")
    ]
    for row in rows:
        assert 0 < row["step_seconds_low"] <= row["step_seconds"] <= row["step_seconds_high"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
    assert len(lines) == 6 and lines[0].startswith("batch 1, context 1: teacher ")
    assert headline(rows, "teacher", "hybrid", options)["batch"] == 2
