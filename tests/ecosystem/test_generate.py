"""``generate`` with its standard options on hybrids of every family: right, or refused with one clear message."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize, keep_fp32

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 56, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Three rows, left-padded to 12 tokens: of 12, 7 and 1 tokens. Padding is no pad token: those embed to 0."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5], mask[2, :11] = 0, 0
    return ids.masked_fill(mask == 0, 7), mask


def recomputed(model: Any, ids: Tensor, mask: Tensor, steps: int = 8) -> Tensor:
    """Greedy continuation [B, steps] by a full forward without cache for every token."""
    for _ in range(steps):
        chosen = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return ids[:, -steps:]


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 5},
    "static, chunked": {"cache_implementation": "static", "prefill_chunk_size": 5},
}


@torch.no_grad()
def test_every_cache_gives_what_recomputing_gives(hybrid_family: Any, padded: tuple[Tensor, Tensor]) -> None:
    ids, mask = padded
    expected = recomputed(hybrid_family, ids, mask).tolist()
    for name, options in CACHES.items():
        made = hybrid_family.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert made[:, 12:].tolist() == expected, name
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, **GREEDY, "max_new_tokens": 5}
    for options in (GREEDY, {"attention_mask": mask, **beams}):
        wanted = hybrid_family.generate(ids, **options)
        made = hybrid_family.generate(ids, **options, cache_implementation="static")
        assert made.tolist() == wanted.tolist()


@torch.no_grad()
def test_with_nothing_replaced_all_goes_as_with_the_teacher(family: Any, padded: tuple[Tensor, Tensor]) -> None:
    """Also what a recurrent state forbids."""
    hybrid, (ids, mask) = hybridize(family, ["attention"] * 4, MixerConfig()), padded
    for options in ({"cache_implementation": "static"}, {"num_beams": 2}):
        made = hybrid.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert made.tolist() == family.generate(ids, attention_mask=mask, **GREEDY, **options).tolist()
    made = hybrid.generate(ids[:1], prompt_lookup_num_tokens=2, **GREEDY)
    assert made.tolist() == family.generate(ids[:1], **GREEDY).tolist()


OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "two sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 3},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[9], [10, 11]], "min_new_tokens": 4},
    "end": {"eos_token_id": list(range(5, 20))},
    "guided": {"guidance_scale": 1.5},
}


@torch.no_grad()
@pytest.mark.parametrize("hybrid", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(hybrid: Any, padded: tuple[Tensor, Tensor], name: str) -> None:
    """With the cache, the static one and none, the same seed gives the same tokens; scores are those of a forward."""
    (ids, mask), results = padded, []
    if name == "guided":  # its own second text takes no padding
        ids, mask = ids[:1], mask[:1]
    rows = OPTIONS[name].get("num_return_sequences", 1)
    for cache in ("dynamic", "static", "none"):
        torch.manual_seed(3)
        options = {**GREEDY, **OPTIONS[name], **CACHES[cache]}
        made = hybrid.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, output_logits=True, **options
        )
        results.append(made.sequences.tolist())
        assert made.sequences.shape[0] == rows * ids.shape[0]
        if "num_beams" not in OPTIONS[name]:
            sequences, seen = made.sequences, mask.repeat_interleave(rows, 0)
            every = torch.cat([seen, seen.new_ones(seen.shape[0], sequences.shape[1] - seen.shape[1])], 1)
            logits = hybrid(sequences, attention_mask=every, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
            torch.testing.assert_close(torch.stack(made.logits, 1), logits, atol=1e-3, rtol=1e-3)
    assert results[0] == results[1] == results[2]


@torch.no_grad()
def test_sampling_follows_the_models_probabilities(hybrid: Any) -> None:
    """Samples of two tokens, against softmax: a state shared among the sequences would show."""
    ids = tokens(1, 6)
    torch.manual_seed(0)
    made = hybrid.generate(ids, do_sample=True, top_k=0, num_return_sequences=1024, max_new_tokens=2, eos_token_id=None)
    first, counts = made[:, 6].unique(return_counts=True)
    likely = first[counts.argmax()]
    second = made[made[:, 6] == likely, 7]
    given = hybrid(torch.cat([ids, likely[None, None]], 1), use_cache=False).logits[0, -2:].softmax(-1)
    for samples, wanted in ((made[:, 6], given[0]), (second, given[1])):
        seen = samples.bincount(minlength=wanted.shape[0]) / samples.numel()
        assert (seen - wanted).abs().max() < 5 * (0.25 / samples.numel()) ** 0.5


@torch.no_grad()
def test_stop_strings_and_streamers(hybrid: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokenizer("3 + 4 =", return_tensors="pt", add_special_tokens=False)["input_ids"]
    options = {**GREEDY, "max_new_tokens": 12}
    whole = hybrid.generate(ids, **options)
    text = tokenizer.decode(whole[0, ids.shape[1] :])
    stop = tokenizer.decode(whole[0, ids.shape[1] + 3 : ids.shape[1] + 5])
    cut = hybrid.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert ids.shape[1] < cut.shape[1] <= ids.shape[1] + 5 and tokenizer.decode(cut[0]).endswith(stop)
    hybrid.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=hybrid.generate, kwargs={"inputs": ids, "streamer": streamer, **options})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


@torch.no_grad()
def test_embeddings_in_place_of_ids(hybrid_family: Any, padded: tuple[Tensor, Tensor]) -> None:
    ids, mask = padded
    expected = hybrid_family.generate(ids, attention_mask=mask, **GREEDY)[:, 12:]
    embeds = hybrid_family.get_input_embeddings()(ids)
    for cache in ("dynamic", "static"):
        made = hybrid_family.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **CACHES[cache])
        assert made.tolist() == expected.tolist(), cache


@torch.no_grad()
def test_going_on_from_a_cache(hybrid_family: Any, padded: tuple[Tensor, Tensor]) -> None:
    """A second turn, for a padded batch: the cache is given back with the whole text, and only the rest is read."""
    ids, mask = padded
    config = hybrid_family.config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=64)):
        options = {"past_key_values": cache, "return_dict_in_generate": True, **GREEDY}
        first = hybrid_family.generate(ids, attention_mask=mask, **options)
        assert int(first.past_key_values.get_seq_length()) == 12 + 7
        text = torch.cat([first.sequences, tokens(3, 5, seed=1)], 1)
        every = torch.cat([mask, mask.new_ones(3, text.shape[1] - 12)], 1)
        again = copy.deepcopy(cache)  # a prompt that is kept for other questions
        expected = recomputed(hybrid_family, text, every).tolist()
        for kept in (cache, again):
            made = hybrid_family.generate(text, attention_mask=every, past_key_values=kept, **GREEDY)
            assert made[:, text.shape[1] :].tolist() == expected


@torch.no_grad()
def test_a_cache_moves_and_begins_anew(hybrid_family: Any, padded: tuple[Tensor, Tensor]) -> None:
    """Rows reordered, repeated and left out; reset; and what cannot be: taking tokens back."""
    ids, mask = padded
    caches = [DynamicCache(config=hybrid_family.config), StaticCache(config=hybrid_family.config, max_cache_len=16)]
    for cache in caches:
        hybrid_family(ids, attention_mask=mask, past_key_values=cache)
        rows = torch.tensor([2, 0, 0, 1, 2])
        cache.reorder_cache(rows)
        whole = torch.cat([mask[rows], mask.new_ones(5, 1)], 1)
        after = hybrid_family(tokens(5, 1), attention_mask=whole, past_key_values=cache).logits[:, -1]
        for row, place in enumerate(rows):
            text = torch.cat([ids[place][mask[place].bool()], tokens(5, 1)[row]])[None]
            expected = hybrid_family(text, use_cache=False).logits[0, -1]
            torch.testing.assert_close(after[row], expected, atol=1e-4, rtol=1e-4)
        with pytest.raises((RuntimeError, ValueError, AttributeError)):
            cache.crop(-1)
    cache = DynamicCache(config=hybrid_family.config)
    results = []
    for _ in range(2):
        results.append(hybrid_family(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()])
        hybrid_family(tokens(3, 1), past_key_values=cache)
        cache.reset()
    assert torch.equal(*results)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("placement", [["mamba1", "attention"] * 2, ["mamba2", "attention", "attention", "mamba1"]])
def test_bf16_stays_close_over_2048_tokens(make_model: Callable[..., Any], placement: list[str]) -> None:
    """One token at a time in bf16 against one pass in fp32, on the same text: KL a token, which may not pile up.

    The teacher's own is 0.00009 nats over the first 256 tokens and 0.00018 over the last.
    """
    hybrid = hybridize(make_model("llama", max_position_embeddings=4096), placement, MixerConfig(), seed=0)
    ids = tokens(1, 2048)
    exact = hybrid(ids, use_cache=False).logits[0].log_softmax(-1)
    hybrid.to(torch.bfloat16)
    keep_fp32(hybrid)
    cache = DynamicCache(config=hybrid.config)
    steps = [hybrid(token, past_key_values=cache).logits[0] for token in ids.split(1, dim=1)]
    made = torch.cat(steps).float().log_softmax(-1)
    divergence = (exact.exp() * (exact - made)).sum(-1)
    assert divergence[-256:].mean() < 5e-4 and divergence.max() < 2e-2
    assert divergence[-256:].mean() < 3 * divergence[:256].mean()
    states = [cache.layers[block].recurrent_states[0] for block, name in enumerate(placement) if name != "attention"]
    assert {state.dtype for state in states} == {torch.float32}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("cache", ["static", "offloaded", "offloaded_static"])
def test_caches_of_a_gpu(hybrid: Any, padded: tuple[Tensor, Tensor], cache: str) -> None:
    """A static cache makes ``generate`` compile the step there."""
    hybrid, (ids, mask) = hybrid.cuda(), (part.cuda() for part in padded)
    for given in ({"inputs": ids}, {"inputs": ids, "attention_mask": mask}):
        wanted = hybrid.generate(**given, **GREEDY)
        assert hybrid.generate(**given, **GREEDY, cache_implementation=cache).tolist() == wanted.tolist()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation .* takes tokens back, .* cannot forget"),
    "contrastive": (
        {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
        "contrastive search .* takes tokens back, .* cannot forget",
    ),
    "quantized": ({"cache_implementation": "quantized"}, "'quantized' has no place .* allowed: dynamic, static"),
    "paged": ({"cache_implementation": "paged"}, "continuous batching .* use generate with a padded batch"),
    "offloaded": ({"cache_implementation": "offloaded"}, "this model is on the CPU; use dynamic"),
    "offloaded_static": ({"cache_implementation": "offloaded_static"}, "this model is on the CPU; use static"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(hybrid: Any, name: str) -> None:
    options, message = REFUSED[name]
    hybrid.model.register_forward_pre_hook(lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        hybrid.generate(tokens(1, 8), max_new_tokens=4, **options)


def test_no_drafts_for_a_hybrid_and_none_from_it(hybrid: Any, llama: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ValueError, match="assisted generation .* takes tokens back"):
        hybrid.generate(tokens(1, 8), assistant_model=llama, **options)
    with pytest.raises(ValueError, match="drafts of assisted generation: that takes tokens back"):
        llama.generate(tokens(1, 8), assistant_model=hybrid, **options)
