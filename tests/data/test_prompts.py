"""Prompts: the forms they come in, what is refused, and when an answer is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.data.families import FAMILIES, is_held_out
from distill.data.prompts import answers_of, embedded_prompts, is_correct, normalise, read_prompts
from distill.errors import UserError


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_forms(tmp_path: Path) -> None:
    chat = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    path = write(
        tmp_path,
        {"prompt": "add 1+1", "answer": 2, "completion": "unused"},
        "",
        {"messages": chat, "answer": "x", "id": 7},
        {"messages": [*chat, {"role": "user", "content": "again"}]},
        {"prompt": "p", "answer": None},
        {"prompt": "p", "answer": 1.5},
    )
    prompts = read_prompts(path)
    assert prompts[0].messages == [{"role": "user", "content": "add 1+1"}]
    assert [p.answer for p in prompts] == ["2", "x", None, None, "1.5"]
    assert [p.plain for p in prompts] == [True, False, False, True, True]
    assert prompts[1].messages == chat[:2], "what the assistant said last is dropped"
    assert [m["content"] for m in prompts[2].messages] == ["s", "u", "a", "again"]
    assert prompts[1].where == f"{path}:3"
    assert read_prompts(path, 2) == prompts[:2]
    assert len(read_prompts(path, 99)) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "not JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "not JSON"),
        ([1], "a row must be a mapping, not list"),
        ({}, "needs prompt or messages; has nothing"),
        ({"promt": "a", "answer": 1}, r"has promt, answer \(did you mean 'prompt'\?\)"),
        ({"prompt": ""}, "prompt must be text that is not empty, not ''"),
        ({"prompt": 5}, "prompt must be text that is not empty, not 5"),
        ({"messages": "a"}, "must be a list of mappings"),
        ({"messages": [{"role": "user", "content": None}]}, "content of every message must be text"),
        ({"messages": []}, "must have a user turn"),
        ({"messages": [{"role": "system", "content": "a"}]}, "must have a user turn"),
        ({"prompt": "a", "answer": [1]}, r"answer must be text or a number, not \[1\]"),
        ({"prompt": "a", "answer": True}, "answer must be text or a number, not True"),
        ({"prompt": "a", "answer": " "}, "answer must be text or a number, not ' '"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"prompt": "a"}, "", row, {"prompt": "a"})
    with pytest.raises(UserError, match=rf"prompts\.jsonl:3: .*{message}"):
        read_prompts(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(write(tmp_path, "", " "))


def test_embedded_prompts_come_from_the_training_side() -> None:
    prompts = embedded_prompts(200, 0)
    asked = [prompt.messages[0]["content"] for prompt in prompts]
    assert len(set(asked)) == len(asked) == 200
    assert not any(is_held_out(text) for text in asked)
    assert [sum(text.startswith(family + " ") for text in asked) for family in FAMILIES] == [40] * 5
    assert all(len(prompt.messages) == 1 and prompt.answer and prompt.plain for prompt in prompts)
    assert embedded_prompts(20, 0) == prompts[:20]
    assert embedded_prompts(20, 1) != prompts[:20]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("42", "42", True),
        (" 42.\n", "42", True),
        ("1,234,567", "1234567", True),
        ("1,234.50", "1234.5", True),
        ("-7", "-7.0", True),
        ("1e3", "1000", True),
        ("43", "42", False),
        ("142", "42", False),
        ("<think>42</think>43", "42", False),
        ("<think>43</think> 42", "42", True),
        ("<think>1</think>9<think>2</think>42", "42", True),
        ("<think>42", "42", False),
        ("so \\boxed{42}", "42", True),
        ("\\boxed{42} or \\boxed{43}", "42", False),
        ("<think>\\boxed{42}</think>43", "42", False),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", True),
        ("\\boxed{42", "42", False),
        ("\\boxed{x}", "\\boxed{x}", True),
        ("1,2", "12", False),
        ("0125", "125", False),
        ("0125", "0125", True),
        ("0", "-0", True),
        ("Paris.", "Paris", True),
        ("paris", "Paris", False),
        ("nan", "nan", True),
        ("1e99999999", "1e99999998", False),
        ("", "42", False),
    ],
)
def test_when_an_answer_is_right(completion: str, answer: str, right: bool) -> None:
    assert is_correct(completion, answer) is right


def test_what_a_completion_gives_as_its_answer() -> None:
    assert answers_of("a</think>b \\boxed{c{d}e} f") == ["b \\boxed{c{d}e} f", "c{d}e"]
    assert normalise(" 12,345. ") == "12345"
