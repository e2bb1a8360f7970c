"""Examples to documents: the chat template, which part of its text is learned, and tokens.

``completion`` learns the last assistant turn, ``assistant`` every one, ``all`` everything. Where a turn begins and
ends is read off the template: from its ``{% generation %}`` tags, or from what it renders of the chat up to there. A
template that allows neither, or loses what the assistant says, is refused: then no mask could be right.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from distill.data.boundary import continuation
from distill.data.examples import REASONING, Example, Message, check_chat, named
from distill.data.pack import IGNORE, Document
from distill.errors import UserError

MASKS = ("completion", "assistant", "all")
TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
DAY = date(2025, 1, 1)
"""Today, to templates that ask: rows must not depend on when they are made."""
INSTEAD = "give the rendered text as prompt and completion"


@dataclass(frozen=True)
class Rendered:
    """A text, and the ranges of its characters that are learned; ``bos``: it may lack the token that begins a text."""

    text: str
    learned: list[tuple[int, int]]
    bos: bool = False

    @property
    def cuts(self) -> list[int]:
        """Where the text changes between learned and not, in order, its ends not among them."""
        return sorted({place for span in self.learned for place in span} - {0, len(self.text)})


def encode(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Message]], mask: str = "completion"
) -> list[Document]:
    """Render and tokenise chats: see ``encode_examples``."""
    return encode_examples(tokenizer, [Example(chat) for chat in chats], mask)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], mask: str = "completion"
) -> list[Document]:
    """Render and tokenise examples, each one document.

    A prompt and completion (or text) gets the tokenizer's end token, and its begin token if the tokenizer's own
    post-processor adds one; neither if the text has it already.

    Raises UserError, naming the row, where a chat does not end with the assistant, and where the chat template refuses
    it, loses what the assistant says in it, or does not show which part of its text that is.
    """
    rendered = []
    for example in examples:
        with named(example.where):
            rendered.append(_text(tokenizer, example) if example.messages is None else render(tokenizer, example, mask))
    return tokenise(tokenizer, rendered, mask)


def _text(tokenizer: Any, example: Example) -> Rendered:
    whole, end = example.prompt + example.completion, tokenizer.eos_token or ""
    if not whole.endswith(end):
        whole += end
    return Rendered(whole, [(len(example.prompt), len(whole))], bos=True)


def render(tokenizer: Any, example: Example, mask: str) -> Rendered:
    """A chat as text, by the template.

    Reasoning in a field of its own is given to the template under every usual name; for one that reads none of them
    it goes into the content, as ``<think>...</think>``.
    """
    check_chat(example.messages)
    assert example.messages is not None
    if tokenizer.chat_template is None:
        raise UserError("the teacher's tokenizer has no chat template, which messages and the embedded traces need")
    chat = [_reasoned(message) for message in example.messages]
    if any(_reasoning(message) for message in chat) and not _reads_reasoning(tokenizer):
        chat = [_inlined(message) for message in chat]
    found = _rendered(tokenizer, chat, example.tools, mask)
    if lost := _lost(chat, found, mask):
        raise UserError(
            f"the chat template does not render all that the assistant says: {lost[:60]!r} is lost; {INSTEAD}"
            + (", or set data.mask=completion" if mask == "assistant" else "")
        )
    return found


def _reasoning(message: Message) -> str:
    return next((message[name] for name in REASONING if message.get(name)), "")


def _reasoned(message: Message) -> Message:
    """A message whose reasoning, if it has any, stands under every usual name, and whose content is there."""
    reasoning = _reasoning(message)
    return {
        **message,
        "content": message.get("content") or "",
        **(dict.fromkeys(REASONING, reasoning) if reasoning else {}),
    }


def _reads_reasoning(tokenizer: Any) -> bool:
    """Whether the template renders the reasoning of a last turn that has it in a field of its own."""
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        return "c0ffee" in _template(tokenizer, [asked, {**said, **dict.fromkeys(REASONING, "c0ffee")}], None)
    except UserError:  # what it wants is unknown; nothing can be lost, as what is rendered is looked at in the end
        return False


def _inlined(message: Message) -> Message:
    """A message with its reasoning at the beginning of its content."""
    reasoning = _reasoning(message)
    rest = {name: value for name, value in message.items() if name not in REASONING}
    return {**rest, "content": f"<think>{reasoning}</think>{message['content']}"} if reasoning else rest


def _lost(chat: Sequence[Message], found: Rendered, mask: str) -> str:
    """What the assistant says in a turn that is learned and the text does not hold, spaces aside, or ``""``.

    Reasoning must stand in what is learned of its turn; of a content, a template may open the ``<think>`` before that.
    """
    turns = [message for message in chat if message["role"] == "assistant"]
    whole = _squash(found.text)
    for turn, (start, end) in zip(turns if mask == "assistant" else turns[-1:], found.learned, strict=True):
        if _squash(_reasoning(turn)) not in _squash(found.text[start:end]):
            return _reasoning(turn)
        if _squash(turn["content"]) not in whole:
            return str(turn["content"])
    return ""


def _squash(text: str) -> str:
    return "".join(text.split())


def _template(tokenizer: Any, chat: Sequence[Message], tools: Any, **options: Any) -> str:
    """``apply_chat_template``; UserError where the template refuses the chat."""
    if not chat:
        return ""
    template = _source(tokenizer, tools)
    try:
        return tokenizer.apply_chat_template(list(chat), tools=tools, chat_template=template, tokenize=False, **options)
    except Exception as error:  # a template is a program of its author's: it may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the teacher's chat template refuses it: {reason}") from error


def _source(tokenizer: Any, tools: Any) -> str:
    """The chat template's text, in which today is ``DAY``."""
    return NOW.sub(lambda found: repr(DAY.strftime(found[2])), tokenizer.get_chat_template(tools=tools))


def undated(tokenizer: Any) -> Any:
    """The tokenizer, whose chat template is told ``DAY`` for today by whoever renders with it, as training is."""
    if tokenizer.chat_template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = _source(tokenizer, None)
    return other


def _rendered(tokenizer: Any, chat: list[Message], tools: Any, mask: str) -> Rendered:
    text = _template(tokenizer, chat, tools)
    tagged = bool(TAGS.search(_source(tokenizer, tools)))
    if mask == "assistant" and tagged:
        return Rendered(text, _tagged(tokenizer, chat, tools))
    if mask == "assistant":
        return Rendered(text, _prefixed(tokenizer, chat, tools, text))
    prompt = _template(tokenizer, chat[:-1], tools, add_generation_prompt=True)
    if prompt and text.startswith(prompt):
        return Rendered(text, [(len(prompt), len(text))])
    if tagged:
        return Rendered(text, _tagged(tokenizer, chat, tools)[-1:])
    raise UserError(f"the chat template does not render a prompt as a prefix of its chat: {prompt[-60:]!r}; {INSTEAD}")


def _tagged(tokenizer: Any, chat: list[Message], tools: Any) -> list[tuple[int, int]]:
    """The ranges that the template's generation tags enclose, one an assistant turn."""
    _, (spans,) = render_jinja_template(
        conversations=[chat],
        tools=tools,
        chat_template=_source(tokenizer, tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    turns = sum(message["role"] == "assistant" for message in chat)
    if len(spans) != turns:
        raise UserError(
            f"the chat template's generation tags enclose {len(spans)} of {turns} assistant turns; {INSTEAD}"
        )
    return [(start, end) for start, end in spans]


def _prefixed(tokenizer: Any, chat: list[Message], tools: Any, text: str) -> list[tuple[int, int]]:
    """The ranges of the assistant's turns, by rendering the chat up to the begin and the end of each."""
    spans = []
    for turn in [number for number, message in enumerate(chat) if message["role"] == "assistant"]:
        prompt = _template(tokenizer, chat[:turn], tools, add_generation_prompt=True)
        whole = _template(tokenizer, chat[: turn + 1], tools)
        if not prompt or not whole.startswith(prompt) or not text.startswith(whole):
            raise UserError(
                f"the chat template renders message {turn + 1} differently when others follow (or has nothing before "
                "it), so that data.mask=assistant cannot tell where it stands: set data.mask=completion, or give the "
                "template {% generation %} tags"
            )
        spans.append((len(prompt), len(whole)))
    return spans


def tokenise(tokenizer: Any, rendered: Sequence[Rendered], mask: str) -> list[Document]:
    """Tokenise texts; what is learned begins and ends where the ids of the text up to there end.

    Where a token would span such a place, the parts are tokenised apart, as generation sees them.
    """
    if not rendered:
        return []
    ids = _ids(tokenizer, [text.text for text in rendered])
    heads = iter(_ids(tokenizer, [text.text[:cut] for text in rendered for cut in text.cuts]))
    begin = _begin(tokenizer) if any(text.bos for text in rendered) else None
    documents = []
    for text, row in zip(rendered, ids, strict=True):
        places = [0, *text.cuts, len(text.text)]
        ends = [next(heads) for _ in text.cuts]
        if all(row[: len(head)] == head for head in ends):
            bounds = [0, *map(len, ends), len(row)]
            parts = [row[a:b] for a, b in pairwise(bounds)]
        else:
            first = [ends[0]] if ends else []
            rest = list(pairwise(places))[len(first) :]
            parts = first + [continuation(tokenizer, text.text[a:b]) for a, b in rest]
        whole: list[int] = []
        labels: list[int] = []
        for (start, _), part in zip(pairwise(places), parts, strict=True):
            learned = mask == "all" or any(a <= start < b for a, b in text.learned)
            whole += part
            labels += part if learned else [IGNORE] * len(part)
        if text.bos and begin is not None and whole[:1] != [begin]:
            whole, labels = [begin, *whole], [IGNORE, *labels]
        elif mask == "all":
            labels[:1] = [IGNORE] * len(labels[:1])  # nothing stands before it
        documents.append(Document(whole, labels))
    return documents


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _begin(tokenizer: Any) -> int | None:
    """The token that the tokenizer's post-processor puts before a text, if it does."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None
