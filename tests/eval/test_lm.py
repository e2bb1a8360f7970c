"""Generations: the same in a batch as alone, drawn by question and seed, halved batches, counts, non-finite logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import AddedToken

from distill.config import MixerConfig
from distill.data.sample import Sampling as TraceSampling
from distill.data.sample import sample
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from eval.answers import Reasoning
from eval.lm import LM, Sampling

PROMPTS = ["add 1+1", "sort 31", "mod 5", "chase a>b b>c c>d from a"]
MODELS = ("teacher", "mamba1", "mamba2")
WARM = Sampling(temperature=1.0, top_p=0.9, samples=2, seed=5)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_llama: Callable[..., Any]) -> Any:
    """The tiny teacher, and hybrids of it that have every other block replaced."""
    teacher = make_llama()
    if request.param == "teacher":
        return teacher
    return hybridize(teacher, [request.param, "attention", request.param, "attention"], MixerConfig(), seed=0)


def requests(tokenizer: Any, prompts: list[str] = PROMPTS, **options: Any) -> list[Instance]:
    """One request a prompt, as lm-eval makes them."""
    options = {"until": [], "max_gen_toks": 10, **options}
    chat = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    return [Instance("generate_until", {}, (text, options), 0, ("task", i, 1)) for i, text in enumerate(chat)]


def answers(model: Any, tokenizer: Any, batch: int, sampling: Sampling = WARM, **options: Any) -> list[list[str]]:
    """Of every sample the answers to all prompts."""
    lm = LM(model, tokenizer, batch, sampling)
    found = []
    for lm.sample in range(sampling.samples):
        found.append(lm.generate_until(requests(tokenizer, **options)))
    return found


def test_a_batch_padded_on_the_left_answers_as_each_alone(model: Any, tokenizer: Any) -> None:
    """Greedy and drawn."""
    greedy = Sampling(reasoning=Reasoning())
    for sampling in (greedy, WARM):
        alone = answers(model, tokenizer, 1, sampling)
        assert answers(model, tokenizer, 3, sampling) == alone
    assert len({tuple(each) for each in alone}) == 2, "samples differ"


def test_greedy_answers_are_what_the_model_generates(model: Any, tokenizer: Any) -> None:
    ids = [tokenizer(request.args[0], add_special_tokens=False)["input_ids"] for request in requests(tokenizer)]
    settings = TraceSampling(temperature=0, max_new_tokens=10)
    said = [sample(model, tokenizer, [each], settings, 0)[0].text for each in ids]
    said = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in said]
    assert answers(model, tokenizer, 3, Sampling(samples=1)) == [said]


def test_answers_follow_from_the_seed_and_the_question(llama: Any, tokenizer: Any) -> None:
    first, again = (answers(llama, tokenizer, 5) for _ in range(2))
    assert first == again
    assert answers(llama, tokenizer, 5, replace(WARM, seed=6)) != first
    fewer = LM(llama, tokenizer, 2, WARM).generate_until(requests(tokenizer)[2:4])
    assert fewer == first[0][2:4], "whatever else is asked"
    warmer = answers(llama, tokenizer, 5, Sampling(seed=5), do_sample=True, temperature=1.0, top_p=0.9)
    assert warmer[0] == first[0], "as the task says, where the config does not"


def test_drawn_tokens_have_the_shares_that_the_model_gives(make_llama: Callable[..., Any], tokenizer: Any) -> None:
    """One token, many samples: their frequencies against the softmax, and nothing outside the mass of top_p."""
    model = make_llama(initializer_range=0.4)
    request = requests(tokenizer, PROMPTS[:1], max_gen_toks=1)
    ids = torch.tensor([tokenizer(request[0].args[0], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    shares = logits[0, -1, : len(tokenizer)].float().div(0.8).softmax(-1)
    lm = LM(model, tokenizer, 500, Sampling(temperature=0.8, samples=2000, reasoning=Reasoning()))
    special = {i for i in range(len(tokenizer)) if not tokenizer.decode([i], skip_special_tokens=True)}
    said = [lm.generate_until(request)[0] for lm.sample in range(2000)]
    for token in shares.argsort(descending=True)[:4].tolist():
        if token not in special:
            share = said.count(tokenizer.decode([token])) / len(said)
            assert share == pytest.approx(float(shares[token]), abs=4 * (float(shares[token]) / 2000) ** 0.5)
    narrow = LM(model, tokenizer, 500, Sampling(temperature=0.8, top_p=1e-6, samples=20, reasoning=Reasoning()))
    assert len({narrow.generate_until(request)[0] for narrow.sample in range(20)}) == 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_a_batch_that_does_not_fit_is_halved_and_answers_stay(
    error: Exception, llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, said = answers(llama, tokenizer, 6), []
    generate = llama.generate

    def small(ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(ids) > 2:
            raise error
        return generate(ids, **kwargs)

    monkeypatch.setattr(llama, "generate", small)
    lm = LM(llama, tokenizer, 6, WARM, "H1-5", said.append)
    assert [lm.generate_until(requests(tokenizer)) for lm.sample in range(2)] == expected
    assert said == [
        "  H1-5: out of memory generating for task 'task': batch 6 -> 3",
        "  H1-5: out of memory generating for task 'task': batch 3 -> 1",
    ]

    def never(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(llama, "generate", never)
    lm.sample = 0
    with pytest.raises(type(error)):
        lm.generate_until([Instance("generate_until", {}, ("x", {"max_gen_toks": 4}), 0, ("other", 0, 1))])


def test_likelihoods_survive_a_halved_batch(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Instance("loglikelihood", {}, (f"add {i}+1=", "2"), i, ("task", i, 1)) for i in range(6)]
    expected = LM(llama, tokenizer, 6).loglikelihood(asked)
    call, said = LM._model_call, []

    def small(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(inps) > 2:
            raise MemoryError
        return call(self, inps, *args, **kwargs)

    monkeypatch.setattr(LM, "_model_call", small)
    found = LM(llama, tokenizer, 6, report=said.append).loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert len(said) == 2 and "out of memory scoring choices" in said[0]


def test_what_ended_how_is_counted(llama: Any, tokenizer: Any) -> None:
    """Random models do not end: all are truncated, until a stop string or the end token comes."""
    lm = LM(llama, tokenizer, 4, Sampling(max_new_tokens=8))
    texts = lm.generate_until(requests(tokenizer))
    ends = sum(lm.tally.ends["task"].values())
    assert ends == len(PROMPTS) and lm.tally.of(["task"])["truncated"] > 0
    letter = next(text[0] for text in texts if text)
    stopped = LM(llama, tokenizer, 4, Sampling(max_new_tokens=8))
    cut = stopped.generate_until(requests(tokenizer, until=[letter]))
    assert cut == [text.split(letter)[0] for text in texts]
    assert stopped.tally.of(["task"])["truncated"] < lm.tally.of(["task"])["truncated"]
    silent = LM(llama, tokenizer, 4, Sampling())
    with torch.no_grad():
        llama.lm_head.bias = torch.nn.Parameter(torch.zeros(llama.config.vocab_size))
        llama.lm_head.bias[tokenizer.eos_token_id] = 1e4
    assert silent.generate_until(requests(tokenizer)) == [""] * len(PROMPTS)
    assert silent.tally.of(["task"]) == {"cut": 0, "truncated": 0, "empty": len(PROMPTS)}


def test_a_generation_ends_at_the_window_and_a_longer_prompt_is_cut_and_counted(
    make_llama: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_llama(max_position_embeddings=32)
    lm = LM(model, tokenizer, 4, Sampling())
    lm.generate_until(requests(tokenizer, ["add 1+1", "1" * 100], max_gen_toks=30_000))
    assert lm.tally.of(["task"])["cut"] == 1
    choices = [
        Instance("loglikelihood", {}, ("1" * n, choice), 0, ("choices", n, 1))
        for n in (5, 32, 33, 100)
        for choice in "23"
    ]
    lm.loglikelihood(choices)
    assert lm.tally.of(["choices"])["cut"] == 2, "questions, not choices"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_it_and_name_model_and_task(value: float, llama: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = value
    lm = LM(llama, tokenizer, 4, Sampling(), "H1-5 (runs/x)")
    with pytest.raises(UserError, match=r"H1-5 \(runs/x\) gives logits that are not finite .* task 'task', question"):
        lm.generate_until(requests(tokenizer))
    with pytest.raises(UserError, match=r"H1-5 \(runs/x\) gives logits that are not finite .* in task 'choices'"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0, ("choices", 0, 1))])


def test_an_option_that_is_not_known_is_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="task 'task' asks for the generation option 'num_beams'"):
        LM(llama, tokenizer, 4).generate_until(requests(tokenizer, num_beams=4))


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_is_left_out_also_where_its_marks_are_special_tokens(
    special: bool, llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<think>"), AddedToken("</think>")]})
    said = tokenizer("<think>1 2 3</think>\n45<|end|>", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(llama, "generate", lambda ids, **_: torch.cat([ids, torch.tensor([said] * len(ids))], 1))
    lm = LM(llama, tokenizer, 4, Sampling(max_new_tokens=40, reasoning=Reasoning("<think>", "</think>")))
    assert set(lm.generate_until(requests(tokenizer))) == {"45"} or not special
    lm = LM(llama, tokenizer, 4, Sampling(max_new_tokens=40, reasoning=Reasoning("<think>", "</think>")))
    lm.whole = {"task"}
    assert lm.generate_until(requests(tokenizer))[0].endswith("45")
