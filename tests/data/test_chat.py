"""Chats and texts to documents: what is learned under every kind of template, begin and end tokens, refusals."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from distill.data.chat import Rendered, encode, encode_examples, render, tokenise
from distill.data.examples import REASONING, Example
from distill.data.pack import IGNORE, Document
from distill.data.tokenizer import build_tokenizer
from distill.errors import UserError

CHAT = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "<think>2 12</think>12"}]


def encode_texts(tokenizer: Any, prompts: list[str], wholes: list[str], mask: str) -> list[Document]:
    """Texts whose prompts are prefixes, as they are."""
    texts = [Rendered(whole, [(len(prompt), len(whole))]) for prompt, whole in zip(prompts, wholes, strict=True)]
    return tokenise(tokenizer, texts, mask)


def test_encode_learns_the_completion_or_everything() -> None:
    tokenizer = build_tokenizer()
    (document,) = encode(tokenizer, [CHAT], "completion")
    assert tokenizer.decode(document.ids[: document.completion]) == "<|user|>sort 21<|assistant|>"
    assert tokenizer.decode(document.ids[document.completion :]) == "<think>2 12</think>12<|end|>"
    (everything,) = encode(tokenizer, [CHAT], "all")
    assert (everything.ids, everything.completion) == (document.ids, 1)


def test_encode_learns_only_the_last_turn() -> None:
    tokenizer = build_tokenizer()
    (document,) = encode(tokenizer, [[*CHAT, {"role": "user", "content": "sort 3"}, CHAT[1]]], "completion")
    assert tokenizer.decode(document.ids[: document.completion]).endswith("12<|end|><|user|>sort 3<|assistant|>")


@pytest.mark.parametrize("chat", [[], CHAT[:1], [CHAT[1], CHAT[0]]])
def test_a_chat_without_a_last_word_is_refused(chat: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match="must end with an assistant turn"):
        encode(build_tokenizer(), [CHAT, chat], "completion")


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not render a prompt as a prefix"):
        encode(tokenizer, [CHAT], "completion")


def test_encode_texts() -> None:
    tokenizer = build_tokenizer()
    first, second = encode_texts(tokenizer, ["sort 21", ""], ["sort 2112", "add"], "completion")
    assert (tokenizer.decode(first.ids), first.completion) == ("sort 2112", 4)
    assert (tokenizer.decode(second.ids), second.completion) == ("add", 0)


def test_a_token_that_spans_prompt_and_completion_is_not_made() -> None:
    """``from a`` + ``dd 1`` would tokenise as one ``add`` before a space: then nothing of it could be learned."""
    tokenizer = build_tokenizer()
    (document,) = encode_texts(tokenizer, ["from a"], ["from add 1"], "completion")
    apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("from a", "dd 1")]
    assert document.ids == apart[0] + apart[1]
    assert document.completion == len(apart[0])
    assert tokenizer("from add 1", add_special_tokens=False)["input_ids"] != document.ids


# What templates in the wild do, over the embedded tokenizer's characters.
TURN = "{% if m['role'] == 'assistant' %}+{{ m['content'] }}<|end|>{% else %}-{{ m['content'] }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}+{% endif %}"
"""Neither tags nor reasoning."""
READS = LOOP.replace("+{{ m['content'] }}", "+{% if m.NAME %}<think>{{ m.NAME }}</think>{% endif %}{{ m['content'] }}")
"""Renders the reasoning that a field NAME holds."""
TAGGED = LOOP.replace("+{{ m['content'] }}<|end|>", "+{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}")
TRIMS = LOOP.replace("m['content'] }}<|end|>", "m['content'] | trim }}<|end|>")
FORGETS = READS.replace("{% if m.NAME %}", "{% if m.NAME and loop.last %}").replace("NAME", "reasoning_content")
"""Renders the reasoning of the last turn alone, as Qwen3 does."""
DROPS = LOOP.replace("{{ m['content'] }}<|end|>", "{{ m['content'].split('</think>')[-1] }}<|end|>")
"""Drops all reasoning in the content, as DeepSeek-R1 does."""
TOOLS = "{% if tools %}{{ tools[0].name }}{% endif %}{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}"


def with_template(template: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Any, document: Document) -> list[str]:
    """The parts that are learned, as text."""
    assert all(label in (IGNORE, token) for token, label in zip(document.ids, document.labels, strict=True))
    runs = groupby(zip(document.ids, document.labels, strict=True), lambda pair: pair[1] != IGNORE)
    return [tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned]


def turns(*said: str, **last: str) -> list[dict[str, Any]]:
    """A chat of the user's and the assistant's turns; ``last`` are further fields of the last one."""
    roles = ("user", "assistant")
    chat: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    chat[-1] |= last
    return chat


words = st.text("abc123 +", min_size=1, max_size=8)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from([LOOP, TAGGED, None]))
def test_every_assistant_turn_and_nothing_else(pairs: list[tuple[str, str]], template: str | None) -> None:
    """With tags or without; ``completion`` is the last of them, and ``all`` has the same tokens."""
    tokenizer = with_template(template) if template else build_tokenizer()
    chat = turns(*(text for pair in pairs for text in pair))
    (document,) = encode(tokenizer, [chat], "assistant")
    assert learned(tokenizer, document) == [f"{answer}<|end|>" for _, answer in pairs]
    (last,) = encode(tokenizer, [chat], "completion")
    assert learned(tokenizer, last) == [f"{pairs[-1][1]}<|end|>"]
    (everything,) = encode(tokenizer, [chat], "all")
    assert everything.labels == [IGNORE, *everything.ids[1:]]
    assert document.ids == last.ids == everything.ids


def test_tags_are_read_as_transformers_reads_them() -> None:
    tokenizer = build_tokenizer()
    chat = turns("add 1+1", "2", "sort 21", "<think>2 12</think>12")
    (document,) = encode(tokenizer, [chat], "assistant")
    rendered = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == document.ids
    assert rendered["assistant_masks"] == [int(label != IGNORE) for label in document.labels]


@pytest.mark.parametrize("field", REASONING)
@pytest.mark.parametrize("reads", [*REASONING, "content", "own"])
def test_reasoning_is_never_lost(field: str, reads: str) -> None:
    """Whatever its field is called, and whatever the template calls it, or if it knows none."""
    tokenizer = build_tokenizer()
    if reads != "own":
        tokenizer.chat_template = LOOP if reads == "content" else READS.replace("NAME", reads)
    chat = [*turns("sort 21", "12", **{field: "2 12"}), *turns("sort 1", "1")]
    for one, mask in ((chat[:2], "completion"), (chat, "assistant"), (chat, "completion")):
        (document,) = encode(tokenizer, [one], mask)
        assert "<think>2 12</think>12<|end|>" in tokenizer.decode(document.ids)
        if mask == "assistant" or len(one) == 2:
            assert learned(tokenizer, document)[0] == "<think>2 12</think>12<|end|>"


def test_a_template_that_forgets_earlier_reasoning() -> None:
    """The last turn is right, as it is when the model answers; of every turn no mask would be."""
    tokenizer = with_template(FORGETS)
    chat = [*turns("sort 21", "12", reasoning="2 12"), *turns("sort 3", "3", reasoning="3")]
    (document,) = encode(tokenizer, [chat])
    assert tokenizer.decode(document.ids) == "-sort 21+12<|end|>-sort 3+<think>3</think>3<|end|>"
    assert learned(tokenizer, document) == ["<think>3</think>3<|end|>"]
    with pytest.raises(UserError, match="message 2 differently when others follow.*data.mask=completion"):
        encode(tokenizer, [chat], "assistant")
    tagged = FORGETS.replace("+{% if", "+{% generation %}{% if").replace("<|end|>", "<|end|>{% endgeneration %}")
    with pytest.raises(UserError, match=r"'2 12' is lost.*data\.mask=completion"):
        encode(with_template(tagged), [[*chat[:3], {"role": "assistant", "content": "3"}]], "assistant")


def test_reasoning_that_stands_elsewhere_is_lost_all_the_same() -> None:
    """What an earlier turn thought is also what the user said, so that the text as a whole has it."""
    tagged = FORGETS.replace("+{% if", "+{% generation %}{% if").replace("<|end|>", "<|end|>{% endgeneration %}")
    chat = [*turns("sort 3", "3", reasoning="sort"), *turns("sort 1", "1", reasoning="1")]
    with pytest.raises(UserError, match="'sort' is lost"):
        encode(with_template(tagged), [chat], "assistant")


def test_a_template_that_drops_reasoning_from_the_content_is_refused() -> None:
    for chat in (turns("sort 21", "<think>2 12</think>12"), turns("sort 21", "12", thinking="2 12")):
        with pytest.raises(UserError, match="does not render all that the assistant says.*prompt and completion"):
            encode(with_template(DROPS), [chat])
    (document,) = encode(with_template(DROPS), [turns("sort 21", "12")])
    assert learned(build_tokenizer(), document) == ["12<|end|>"]


def test_a_template_that_trims() -> None:
    tokenizer = with_template(TRIMS)
    (document,) = encode(tokenizer, [turns("a", " 1 ", "b", " 2 ")], "assistant")
    assert learned(tokenizer, document) == ["1<|end|>", "2<|end|>"]


def test_the_last_tags_serve_where_the_prompt_is_no_prefix() -> None:
    tokenizer = with_template("{{ messages | length }}" + TAGGED)
    (document,) = encode(tokenizer, [turns("a", "1", "b", "2")])
    assert learned(tokenizer, document) == ["2<|end|>"]


def test_tags_around_another_number_of_turns_are_refused() -> None:
    tokenizer = with_template(TAGGED.replace("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"))
    with pytest.raises(UserError, match="enclose 4 of 2 assistant turns"):
        encode(tokenizer, [turns("a", "1", "b", "2")], "assistant")


def test_tools_system_and_tool_turns_reach_the_template() -> None:
    tokenizer = with_template(TOOLS)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [{"role": "system", "content": "s"}, *turns("a"), call, {"role": "tool", "content": "5"}, *turns("b", "2")]
    (document,) = encode_examples(tokenizer, [Example(chat, [{"name": "calc"}])])
    assert tokenizer.decode(document.ids) == "calc-s-a+<|end|>-5-b+2<|end|>"
    assert learned(tokenizer, document) == ["2<|end|>"]


def test_rows_do_not_depend_on_the_day() -> None:
    """Templates that write today's date into the system prompt, as Llama 3.2 does, are given a fixed one."""
    for call in ("strftime_now('%d/%m/%Y')", 'strftime_now("%d/%m/%Y")'):
        tokenizer = with_template("{% if strftime_now is defined %}{{ " + call + " }}{% endif %}" + LOOP)
        today = tokenizer.apply_chat_template(turns("a"), tokenize=False)
        assert "01/01/2025" not in today and "/20" in today
        for mask in ("completion", "assistant"):
            rendered = render(tokenizer, Example(turns("a", "1")), mask)
            assert rendered.text == "01/01/2025-a+1<|end|>"


def test_what_a_template_raises_names_the_row() -> None:
    for template, reason in (("{{ raise_exception('no system') }}", "no system"), ("{{ messages + 1 }}", "")):
        with pytest.raises(UserError, match=rf"t\.jsonl:4: the teacher's chat template refuses it: .*{reason}"):
            encode_examples(with_template(template), [Example(turns("a", "1"), where="t.jsonl:4")])


def test_an_assistant_that_speaks_first() -> None:
    """Nothing stands before its turn: the tags say where it is, otherwise it is refused."""
    chat = [{"role": "assistant", "content": "1"}]
    (document,) = encode(with_template(TAGGED), [chat])
    assert learned(build_tokenizer(), document) == ["1<|end|>"]
    for mask in ("completion", "assistant"):
        with pytest.raises(UserError, match="prompt as a prefix|has nothing before it"):
            encode(with_template(LOOP), [chat], mask)


def with_begin(token: str | None = "<|user|>") -> Any:
    """The embedded tokenizer, with a post-processor that puts a token before every text."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|user|>"
    if token:
        number = tokenizer.convert_tokens_to_ids(token)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{token} $A", None, [(token, number)])
    return tokenizer


def test_texts_begin_as_the_tokenizer_begins_them_and_never_twice() -> None:
    rows = [Example(prompt="1", completion="2"), Example(completion="3"), Example(completion="<|user|>4<|end|>")]
    for mask in ("completion", "assistant", "all"):
        first, second, third = encode_examples(with_begin(), rows, mask)
        texts = [build_tokenizer().decode(document.ids) for document in (first, second, third)]
        assert texts == ["<|user|>12<|end|>", "<|user|>3<|end|>", "<|user|>4<|end|>"]
        assert learned(build_tokenizer(), second) == ["3<|end|>"]
        assert learned(build_tokenizer(), first) == ["12<|end|>" if mask == "all" else "2<|end|>"]
    bare = encode_examples(with_begin(None), rows)
    assert build_tokenizer().decode(bare[0].ids) == "12<|end|>"
    (chat,) = encode(with_begin(), [turns("a", "1")])
    assert build_tokenizer().decode(chat.ids) == "<|user|>a<|assistant|>1<|end|>", "a template writes its own"


def test_a_bad_chat_names_its_row() -> None:
    with pytest.raises(UserError, match=r"^t\.jsonl:9: a chat must end"):
        encode_examples(build_tokenizer(), [Example([{"role": "user", "content": "a"}], where="t.jsonl:9")])


def real(name: str) -> Any:
    """A tokenizer of bytes with the chat template of a model family, as TRL ships it."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(
    ("name", "last", "every"),
    [
        ("llama3", "<think>R2</think>A2<|eot_id|>", ["<think>R1</think>A1<|eot_id|>"]),
        ("llama3_2", "<think>R2</think>A2<|eot_id|>", ["<think>R1</think>A1<|eot_id|>"]),
        ("qwen2_5", "<think>R2</think>A2<|im_end|>\n", ["<think>R1</think>A1<|im_end|>\n"]),
        ("qwen3", "<think>\nR2\n</think>\n\nA2<|im_end|>\n", None),
        ("qwen3_training", "<think>\nR2\n</think>\n\nA2<|im_end|>\n", ["<think>\nR1\n</think>\n\nA1<|im_end|>\n"]),
        ("phi3", "<think>R2</think>A2<|end|>\n</s>", None),
    ],
)
def test_templates_of_model_families(name: str, last: str, every: list[str] | None) -> None:
    """Right masks, or refused: Qwen3 forgets earlier reasoning, Phi-3 ends the chat in its own way."""
    tokenizer = real(name)
    chat = [*turns("Q1", "A1", reasoning="R1"), *turns("Q2", "A2", reasoning="R2")]
    (document,) = encode(tokenizer, [chat])
    assert learned(tokenizer, document) == [last]
    if every is None:
        with pytest.raises(UserError, match="message 2 differently when others follow"):
            encode(tokenizer, [chat], "assistant")
    else:
        (document,) = encode(tokenizer, [chat], "assistant")
        assert learned(tokenizer, document) == [*every, last]


def test_a_template_that_answers_for_the_model_is_refused() -> None:
    """DeepSeek-R1's begins every answer with an opening tag that it does not render in a chat."""
    for chat in (turns("Q", "A"), turns("Q", "<think>R</think>A")):
        with pytest.raises(UserError, match="does not render (a prompt as a prefix|all that the assistant says)"):
            encode(real("deepseek_r1_distill"), [chat])
