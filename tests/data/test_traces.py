"""Datasets: embedded rows by (seed, index) alone, JSONL files in three forms, and what is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import DataConfig, Origin
from distill.data import traces
from distill.data.families import FAMILIES
from distill.data.families import is_held_out as is_held_out_question
from distill.data.pack import IGNORE, TOO_LONG, Document
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import SHARD, EmbeddedTraces, FileTraces, StreamedTraces, is_held_out, read_examples
from distill.data.traces import load_rows as load_source
from distill.data.traces import read_documents as read_source
from distill.errors import UserError

TOKENIZER = build_tokenizer()
MIX = dict.fromkeys(FAMILIES, 1.0)
Row = dict[str, torch.Tensor]


def embedded(rows: int = 3 * SHARD, seed: int = 0, length: int = 64, **options: Any) -> EmbeddedTraces:
    return EmbeddedTraces(TOKENIZER, rows, length, options.pop("mix", MIX), seed, **options)


def load_rows(
    source: str | Path,
    tokenizer: Any,
    rows: int,
    length: int,
    mix: Any,
    seed: int,
    *,
    held_out: bool = False,
    **keys: Any,
) -> Any:
    data = DataConfig(source=str(source), sequence_length=length, mix=mix, **keys)
    return load_source(data, data, tokenizer, rows, seed, held_out=held_out)


def read_documents(path: Path, tokenizer: Any, mask: str) -> list[Document]:
    return list(read_source(Origin(source=str(path)), tokenizer, mask))


def equal(a: Row, b: Row) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "traces.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(path: Path, mask: str = "completion") -> list[tuple[str, str]]:
    """(prompt, completion) of every document, as text."""
    return [
        (TOKENIZER.decode(d.ids[: d.completion]), TOKENIZER.decode(d.ids[d.completion :]))
        for d in read_documents(path, TOKENIZER, mask)
    ]


def test_any_order_of_access_gives_the_same_rows() -> None:
    rows = embedded()
    straight = [rows[i] for i in range(len(rows))]
    order = random.Random(0).sample(range(len(rows)), 30)
    other = embedded()
    assert all(equal(other[i], straight[i]) for i in order)
    assert equal(embedded()[2 * SHARD], straight[2 * SHARD]), "a first access in the middle"


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    assert equal(embedded(rows=5)[4], embedded(rows=5000)[4])


def test_every_row_and_every_seed_is_another() -> None:
    rows = embedded()
    seen = {tuple(rows[i]["input_ids"].tolist()) for i in range(len(rows))}
    assert len(seen) == len(rows) == 3 * SHARD
    for other in (embedded(seed=1), embedded(held_out=True)):
        assert not any(tuple(other[i]["input_ids"].tolist()) in seen for i in range(SHARD))


def test_rows_are_full_and_of_one_length() -> None:
    rows = embedded(length=128)
    for i in range(SHARD):
        assert {value.shape for value in rows[i].values()} == {(128,)}
        assert (rows[i]["labels"] != IGNORE).any()
    padding = sum(int((rows[i]["input_ids"] == TOKENIZER.pad_token_id).sum()) for i in range(SHARD))
    assert padding / (128 * SHARD) < 0.1


def test_the_mask() -> None:
    """``all`` has the same tokens, and every one but a document's first is a target."""
    completion, everything = embedded(), embedded(mask="all")
    for i in range(20):
        a, b = completion[i], everything[i]
        assert torch.equal(a["input_ids"], b["input_ids"])
        text = (b["position_ids"] != 0) & (b["input_ids"] != TOKENIZER.pad_token_id)
        assert torch.equal(b["labels"] != IGNORE, text)
        kept = a["labels"] != IGNORE
        assert torch.equal(a["labels"][kept], a["input_ids"][kept])
        assert kept.sum() < text.sum()


def test_held_out_rows_come_from_the_other_side() -> None:
    for side in (True, False):
        rows = load_rows("embedded", TOKENIZER, 20, 256, MIX, 3, held_out=side)
        text = "".join(TOKENIZER.decode(rows[i]["input_ids"]) for i in range(20))
        prompts = re.findall(r"<\|user\|>(.*?)<\|assistant\|>", text)
        assert len(prompts) > 100
        assert all(is_held_out_question(prompt) is side for prompt in prompts)


def test_the_mix_is_kept() -> None:
    rows = embedded(rows=SHARD, length=256, mix={"add": 3.0, "sort": 1.0, "mod": 0.0})
    text = "".join(TOKENIZER.decode(rows[i]["input_ids"]) for i in range(SHARD))
    counts = {family: text.count(f"<|user|>{family} ") for family in FAMILIES}
    assert counts["mod"] == counts["chase"] == counts["recall"] == 0
    assert 2.3 < counts["add"] / counts["sort"] < 3.9


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"ad": 1.0}, r"unknown family in data\.mix 'ad' \(did you mean 'add'\?\)"),
        ({}, "positive weights"),
        ({"add": 0.0}, "positive weights"),
        ({"add": 2.0, "mod": -1.0}, "positive weights"),
    ],
)
def test_a_bad_mix_is_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows("embedded", TOKENIZER, 4, 64, mix, 0)


def test_three_forms_of_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"messages": [{"role": "user", "content": "add 1+1"}, {"role": "assistant", "content": "2"}], "id": 1},
        "",
        {"prompt": "sort 21", "completion": " 12"},
        {"text": "chase"},
    )
    assert texts(path) == [
        ("<|user|>add 1+1<|assistant|>", "2<|end|>"),
        ("sort 21", " 12<|end|>"),
        ("", "chase<|end|>"),
    ]
    assert [d.completion for d in read_documents(path, TOKENIZER, "all")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": ', "not JSON"),
        ("plain words", "not JSON"),
        ({"mesages": []}, r"has mesages \(did you mean 'messages'\?\)"),
        ({"prompt": "a"}, "needs messages, prompt and completion, or text"),
        ({"completion": "a"}, "needs messages, prompt and completion, or text"),
        ({"messages": "a"}, "must be a list of mappings"),
        ({}, "needs messages, prompt and completion, or text"),
        ([1], "a row must be a mapping, not list"),
        (5, "a row must be a mapping, not int"),
        ({"text": None}, "text must be text"),
        ({"prompt": "a", "completion": None}, "prompt and completion must be text"),
        ({"messages": ["hi"]}, "must be a list of mappings"),
        ({"messages": [{"role": "assistant"}]}, "content of every message must be text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with an assistant turn"),
        ({"messages": []}, "must end with an assistant turn"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"text": "add"}, "", row, {"text": "add"})
    with pytest.raises(UserError, match=rf"traces\.jsonl:3: .*{message}"):
        read_documents(path, TOKENIZER, "completion")


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    bare = build_tokenizer()
    bare.chat_template = None
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(UserError, match="no chat template"):
        read_documents(write(tmp_path, chat), bare, "completion")
    assert len(read_documents(write(tmp_path, {"text": "add"}), bare, "completion")) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "no/ne"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.source: no such file: .*give 'embedded', a file .*, a folder of them, or a hub name",
    ):
        load_rows(str(tmp_path / name), TOKENIZER, 4, 64, MIX, 0)


@pytest.mark.parametrize("count", [0, 1])
def test_too_small_a_file_is_refused(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, *[{"text": "add"}] * count)
    with pytest.raises(UserError, match=rf"at least 2 documents .* found {count}"):
        load_rows(str(path), TOKENIZER, 4, 64, MIX, 0)


def test_a_file_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": "1" * 30, "completion": "2"}] * 4)
    with pytest.raises(UserError, match=r"no completion tokens within data\.sequence_length=16"):
        load_rows(str(path), TOKENIZER, 4, 16, MIX, 0)
    assert len(load_rows(str(path), TOKENIZER, 4, 32, MIX, 0)) == 4  # type: ignore[arg-type]


def numbered(folder: Path, count: int) -> Path:
    return write(folder, *[{"prompt": f"add {i:04d}", "completion": "7"} for i in range(count)])


def prompts_of(rows: FileTraces) -> list[str]:
    return [n for i in range(len(rows)) for n in re.findall(r"add (\d{4})", TOKENIZER.decode(rows[i]["input_ids"]))]


def test_a_file_is_split_by_what_is_asked(tmp_path: Path) -> None:
    path = numbered(tmp_path, 160)
    train, held = (load_rows(str(path), TOKENIZER, 1000, 20, MIX, 0, held_out=side) for side in (False, True))
    assert isinstance(train, FileTraces) and isinstance(held, FileTraces)
    assert set(prompts_of(held)) | set(prompts_of(train)) == {f"{i:04d}" for i in range(160)}
    assert not set(prompts_of(held)) & set(prompts_of(train))
    assert 3 <= len(set(prompts_of(held))) <= 20


def test_a_short_file_is_repeated_and_a_long_one_cut(tmp_path: Path) -> None:
    path = numbered(tmp_path, 32)
    rows = load_rows(path, TOKENIZER, 100, 20, MIX, 0)
    assert len(rows) == 100
    distinct = len(rows.packed)
    assert equal(rows[3], rows[3 + distinct])
    assert not equal(rows[3], rows[4])
    assert len(list(rows)) == 100  # type: ignore[call-overload]
    assert len(load_rows(path, TOKENIZER, 5, 20, MIX, 0).packed) == 5


def test_a_file_is_shuffled_by_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path, 64)
    one, same, other = (prompts_of(load_rows(path, TOKENIZER, 40, 20, MIX, seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)
    assert set(one) == set(other)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"latin\.jsonl cannot be read"):
        read_documents(path, TOKENIZER, "completion")


def test_rows_end_where_they_should() -> None:
    rows = EmbeddedTraces(TOKENIZER, 3, 128, {"add": 1.0}, 0)
    assert len(list(rows)) == 3
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(IndexError):
        rows[-1]


def streamed(path: Path, rows: int = 60, seed: int = 0, **options: Any) -> StreamedTraces:
    stream = load_rows(path, TOKENIZER, rows, 20, MIX, seed, streaming=True, **options)
    assert isinstance(stream, StreamedTraces)
    return stream


@given(seed=st.integers(0, 5), held_out=st.booleans(), policy=st.sampled_from(TOO_LONG))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_has_the_rows_of_the_file_in_memory(tmp_path: Path, seed: int, held_out: bool, policy: str) -> None:
    """With a buffer that holds all; rows come again when the file is through, in both."""
    path = write(tmp_path, *[{"prompt": f"add {i}", "completion": "1" * (i % 31)} for i in range(90)])
    both = [
        load_rows(path, TOKENIZER, 150, 20, MIX, seed, held_out=held_out, too_long=policy, streaming=s) for s in (0, 1)
    ]
    assert all(equal(both[0][i], both[1][i]) for i in range(150))


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_any_row_of_a_stream_can_be_had_first(tmp_path: Path, buffer: int) -> None:
    """What a resumed training asks for: row 0 (its length), then the row after its checkpoint, then those after."""
    path = numbered(tmp_path, 120)
    straight = [streamed(path, 150, 3, shuffle_buffer=buffer)[i] for i in range(3)]
    whole = streamed(path, 150, 3, shuffle_buffer=buffer)
    rows = [whole[i] for i in range(150)]
    assert all(equal(a, b) for a, b in zip(straight, rows, strict=False))
    for start in (1, 63, 64, 65, 101, 149):
        resumed = streamed(path, 150, 3, shuffle_buffer=buffer)
        assert equal(resumed[0], rows[0])
        assert all(equal(resumed[i], rows[i]) for i in range(start, 150))
    assert equal(whole[2], rows[2]), "going back reads again"


def test_a_stream_is_shuffled_within_its_buffer(tmp_path: Path) -> None:
    path = numbered(tmp_path, 400)
    one, same, other = (prompts_of(streamed(path, 100, seed, shuffle_buffer=20)) for seed in (1, 1, 2))
    assert one == same != other
    assert one != sorted(one)
    assert all(abs(int(name) - place) < 200 for place, name in enumerate(one)), "no further than a few buffers"


def test_a_stream_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: the buffer, a batch to tokenise and the open rows, whatever the file's size."""
    taken: list[int] = []

    def endless(origin: Any, *, streaming: bool) -> Iterator[tuple[str, Any]]:
        assert streaming
        for number in count():
            taken.append(number)
            yield f"row {number}", {"prompt": f"add {number}", "completion": "1"}

    monkeypatch.setattr(traces, "check_source", lambda *_: None)
    monkeypatch.setattr(traces, "read", endless)
    stream = streamed(Path("endless"), 10**9, shuffle_buffer=50)
    assert len(taken) < 50 + 3 * 64 * 3 + 2 * traces.BATCH
    before = len(taken)
    stream[1000]
    assert len(taken) - before < 3 * 1000
    assert len(stream._near) <= SHARD
    held = streamed(Path("endless"), 8, shuffle_buffer=5, held_out=True)
    once = [held[i] for i in range(8)]
    before = len(taken)
    assert all(equal(held[i], once[i]) for _ in range(3) for i in range(8))
    assert len(taken) == before, "held-out rows are kept"


@pytest.mark.parametrize("streaming", [False, True])
def test_no_question_is_on_both_sides(tmp_path: Path, streaming: bool) -> None:
    path = write(tmp_path, *[{"prompt": f"add {i % 100:04d}", "completion": str(i)} for i in range(400)])
    train, held = (
        set(prompts_of(load_rows(path, TOKENIZER, 400, 20, MIX, 0, streaming=streaming, held_out=side)))
        for side in (False, True)
    )
    assert not train & held
    assert len(train) + len(held) == 100 and 2 <= len(held) <= 16


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("too_long", "message"),
    [
        (
            "drop",
            r"all documents are longer than data\.sequence_length=16; .*\(it is drop\)",
        ),
        ("cut", r"no completion tokens within data\.sequence_length=16 \(data\.mask=completion\); 1?\d of"),
    ],
)
def test_nothing_to_learn_ends_before_training(tmp_path: Path, streaming: bool, too_long: str, message: str) -> None:
    path = write(tmp_path, *[{"prompt": f"{i:030d}", "completion": "2"} for i in range(20)])
    with pytest.raises(UserError, match=message):
        load_rows(path, TOKENIZER, 4, 16, MIX, 0, streaming=streaming, too_long=too_long)
    rows = load_rows(path, TOKENIZER, 40, 16, MIX, 0, streaming=streaming, too_long="split")
    assert any((rows[i]["labels"] != IGNORE).any() for i in range(40))


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_embedded_rows_too_short_for_anything_are_refused(too_long: str) -> None:
    with pytest.raises(UserError, match=r"embedded: .*data\.sequence_length=4"):
        load_rows("embedded", TOKENIZER, 4, 4, MIX, 0, too_long=too_long)
    rows = load_rows("embedded", TOKENIZER, 4, 20, MIX, 0, too_long="drop")
    assert 0 < rows.counts.too_long < rows.counts.read


def test_a_stream_too_small_to_hold_out_says_so(tmp_path: Path) -> None:
    path = numbered(tmp_path, 3)
    assert not any(is_held_out(example) for example in read_examples(Origin(source=str(path))))
    with pytest.raises(UserError, match=r"no held-out documents to stream: set data\.streaming=false"):
        streamed(path, held_out=True)


def test_a_malformed_row_deep_in_a_stream_is_named(tmp_path: Path) -> None:
    path = numbered(tmp_path, 1000)
    path.write_text(path.read_text() + "{torn\n")
    stream = streamed(path, 1000, shuffle_buffer=10)
    with pytest.raises(UserError, match=r"traces\.jsonl:1001: not JSON"):
        stream[900]


def test_counts_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": f"add {i:02d}", "completion": "1" * (i % 31)} for i in range(64)])
    rows = load_rows(path, TOKENIZER, 10_000, 20, MIX, 0)
    documents = read_documents(path, TOKENIZER, "completion")
    assert rows.counts.read == rows.counts.documents < len(documents) == 64
    assert 0 < rows.counts.lost < 13 * rows.counts.too_long
    assert rows.counts.targets == sum(int((row["labels"] != IGNORE).sum()) for row in rows.packed)
    few = embedded(rows=3)
    assert few.counts.rows == SHARD
    assert few.counts.targets == sum(int((row["labels"] != IGNORE).sum()) for row in embedded(rows=SHARD))  # type: ignore[attr-defined]
