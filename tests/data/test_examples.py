"""Rows to examples: every form of columns, names of the user's own, and what is refused (with where it stands)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.examples import check_columns, parse_row
from distill.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": [{**message, "tool_calls": None, "name": None} for message in CHAT], "prompt": None},
        {"messages": None, "text": None, "prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "a"},
        {"prompt": "q", "completion": CHAT[1:]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}]},
        {"messages": CHAT, "text": "other"},
    ],
)
def test_forms_of_a_chat(row: dict[str, Any]) -> None:
    example = parse_row(row, {}, "here")
    assert (example.messages, example.tools, example.where) == (CHAT, None, "here")


def test_texts() -> None:
    example = parse_row({"prompt": "q", "completion": "a", "text": "t"}, {})
    assert (example.messages, example.prompt, example.completion) == (None, "q", "a")
    example = parse_row({"text": "t", "prompt": None}, {})
    assert (example.prompt, example.completion) == ("", "t")


def test_columns_of_other_names() -> None:
    example = parse_row(
        {"question": "q", "solution": "a", "messages": 5}, {"prompt": "question", "completion": "solution"}
    )
    assert (example.prompt, example.completion) == ("q", "a")
    assert parse_row({"chat": CHAT}, {"messages": "chat"}).messages == CHAT
    with pytest.raises(UserError, match=r"f:2: no column 'qestion' \(data\.columns\.text\) .*mean 'question'"):
        parse_row({"question": "q"}, {"text": "qestion"}, "f:2")


@pytest.mark.parametrize("tools", [[{"name": "f"}], json.dumps([{"name": "f"}])])
def test_tools_pass_through(tools: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    example = parse_row({"messages": [CHAT[0], call], "tools": tools}, {})
    assert example.tools == [{"name": "f"}]
    assert example.messages is not None and example.messages[1]["tool_calls"] == call["tool_calls"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT, "tools": "f"}, "tools must be a list"),
        ({"messages": [*CHAT, {"role": "user", "content": None}]}, "content of every message"),
        ({"messages": [CHAT[0], {**CHAT[1], "reasoning": ["x"]}]}, "reasoning of a message must be text"),
        ({"conversations": [{"from": "me", "value": "q"}]}, "unknown speaker 'me'.*human"),
        ({"conversations": [["human", "q"]]}, "mappings with from and value"),
        ({"conversations": "hello"}, "conversations must be a list"),
        ({"prompt": 5, "completion": "a"}, "prompt and completion must be text, or lists"),
        ({"text": "a\ud800"}, "its text is no Unicode: surrogates not allowed"),
        ({"messages": [{"role": "user", "content": "\udfff"}, CHAT[1]]}, "its text is no Unicode"),
        ({"question": "q", "answer": "a"}, r"has question, answer; data\.columns maps other names"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^t\.jsonl:7: .*{message}"):
        parse_row(row, {}, "t.jsonl:7")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q", "completion": "a"}, r"unknown column 'promt' in data\.columns \(did you mean 'prompt'\?\)"),
        ({"prompt": "q"}, r"data\.columns needs .*; has prompt"),
    ],
)
def test_a_bad_mapping_is_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_columns(columns, "data.columns")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab[{", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "text", "tools"]), VALUES))
def test_any_row_is_parsed_or_refused(row: dict[str, Any]) -> None:
    try:
        example = parse_row(row, {})
    except UserError:
        return
    assert example.messages is None or example.messages[-1]["role"] == "assistant"
    assert isinstance(example.key, str)


def test_the_key_is_what_is_asked() -> None:
    other = [CHAT[0], {"role": "assistant", "content": "b"}]
    assert parse_row({"messages": CHAT}, {}).key == parse_row({"messages": other}, {}).key
    assert (
        parse_row({"prompt": "q", "completion": "a"}, {}).key == parse_row({"prompt": "q", "completion": "b"}, {}).key
    )
    assert parse_row({"text": "a"}, {}).key != parse_row({"text": "b"}, {}).key
