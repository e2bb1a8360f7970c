"""What a row of data says: a chat, or a prompt and what follows it, whatever its columns are called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distill.errors import UserError, nearest

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message may hold its reasoning, apart from its content."""
FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))
COLUMNS = ("messages", "conversations", "prompt", "completion", "text", "tools")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT |= {"tool": "tool", "observation": "tool"}


@dataclass(frozen=True)
class Example:
    """One row: a chat (``messages``, perhaps ``tools``), or without messages a ``prompt`` and its ``completion``."""

    messages: list[Message] | None = None
    tools: list[Any] | None = None
    prompt: str = ""
    completion: str = ""
    where: str = ""
    """File and line, for messages."""

    @property
    def key(self) -> str:
        """What was asked: rows with the same key are held out together, or not at all."""
        if self.messages is None:
            return self.prompt or self.completion
        return json.dumps(self.messages[:-1], sort_keys=True, default=str)


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put where a row stands before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def parse_row(row: Any, columns: Mapping[str, str], where: str = "") -> Example:
    """The example of a row; ``columns`` says which of its columns are ours (``{"prompt": "question"}``).

    Raises UserError, with ``where``, for a row that is none.
    """
    with named(where):
        if not isinstance(row, dict):
            raise UserError(f"a row must be a mapping, not {type(row).__name__}")
        if columns:
            row = _rename(row, columns)
        filled = {name: value for name, value in row.items() if value is not None}
        for held in (filled, row):  # a file of several forms has every column, empty where it does not apply
            form = next((names for names in FORMS if set(names) <= held.keys()), None)
            if form is not None:
                return _readable(_example(form, held, where))
        hint = nearest(str(next(iter(row))), ("messages", "text")) if len(row) == 1 else ""
        has = ", ".join(map(str, row)) or "nothing"
        more = "" if columns else "; data.columns maps other names"
        raise UserError(f"needs messages, prompt and completion, or text; has {has}{hint}{more}")


def check_columns(columns: Mapping[str, str], key: str) -> None:
    """Raise UserError for a mapping of columns that could make no row."""
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"unknown column '{name}' in {key}{nearest(name, COLUMNS)}; allowed: {', '.join(COLUMNS)}")
    if columns and not any(set(form) <= set(columns) for form in FORMS):
        raise UserError(
            f"{key} needs messages, conversations, prompt and completion, or text; has {', '.join(columns)}"
        )


def _rename(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(
                f"no column '{theirs}' (data.columns.{ours}){nearest(theirs, map(str, row))}; has "
                f"{', '.join(map(str, row)) or 'nothing'}"
            )
    return {ours: row[theirs] for ours, theirs in columns.items()}


def _example(form: tuple[str, ...], row: dict[str, Any], where: str) -> Example:
    if form == ("text",) or (len(form) == 2 and isinstance(row["prompt"], str) and isinstance(row["completion"], str)):
        values = [row[name] for name in form]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{' and '.join(form)} must be text")
        return Example(prompt="" if len(values) == 1 else values[0], completion=values[-1], where=where)
    if form == ("conversations",):
        chat = [_from_sharegpt(message) for message in _listed(row["conversations"], "conversations")]
    elif form == ("messages",):
        chat = _listed(row["messages"], "messages")
    else:
        chat = [*_turns(row["prompt"], "user"), *_turns(row["completion"], "assistant")]
    chat = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in chat]
    check_chat(chat)
    tools = _parsed(row.get("tools"))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError("tools must be a list of JSON schemas")
    return Example(chat, tools or None, where=where)


def _readable(example: Example) -> Example:
    """The example; UserError where its text has no UTF-8 (JSON can hold halves of characters)."""
    try:
        parts = [example.messages, example.tools, example.prompt, example.completion]
        json.dumps(parts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"its text is no Unicode: {error.reason}") from error
    return example


def _turns(value: Any, role: str) -> list[Any]:
    """``prompt`` or ``completion`` as messages, which it may be already (as TRL has it)."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise UserError("prompt and completion must be text, or lists of messages")
    return [{"role": role, "content": value}]


def _listed(value: Any, name: str) -> list[Any]:
    """A list of mappings, which may be JSON text (in CSV), or a mapping of lists (as older Parquet files have it)."""
    value = _parsed(value)
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list of mappings")
    return value


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _from_sharegpt(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        raise UserError("conversations must be a list of mappings with from and value")
    role = SHAREGPT.get(message["from"])
    if role is None:
        raise UserError(f"unknown speaker '{message['from']}' in conversations; allowed: {', '.join(SHAREGPT)}")
    return {"role": role, "content": message.get("value")}


def check_messages(chat: Any) -> None:
    """Raise UserError unless ``chat`` is a list of mappings with a role and a content of text (which may be absent
    beside tool calls)."""
    if not isinstance(chat, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in chat):
        raise UserError("messages must be a list of mappings with a role and a content")
    for message in chat:
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise UserError("the content of every message must be text")
        if not all(isinstance(message.get(name) or "", str) for name in REASONING):
            raise UserError("the reasoning of a message must be text")


def check_chat(chat: Any) -> None:
    """Raise UserError unless ``chat`` is a list of role/content messages that ends with the assistant's."""
    check_messages(chat)
    if not chat or chat[-1]["role"] != "assistant":
        raise UserError("a chat must end with an assistant turn (the completion to learn)")
