"""Readers given anything at all: configs, records, model folders and data either work or raise a UserError.

``make test`` tries a few hundred inputs a reader, ``make test-slow`` some thousands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.config import PretrainConfig, RunConfig
from distill.config_merge import load_config, merge_config
from distill.data.prompts import read_prompts
from distill.data.traces import read_documents
from distill.errors import UserError
from distill.records import read_json, read_record
from distill.schedule import build_schedule
from distill.teacher import check_files, load_tokenizer
from distill.teacher import load_config as load_model_config
from distill.weights import headers
from eval import distance
from eval.frames import importance_frame, loss_frame, stage_frame, task_frame
from eval.provenance import commands, cost_frame, provenance_frame
from eval.report import table
from eval.runs import read_run
from eval.speeds import machine, memory_frame, pays_from, prefill_frame, protocol_frame, throughput_frame
from eval.summary import missing, summary
from stages.lineage import recorded
from stages.targets import check, check_pretrain

AMOUNTS = [pytest.param(1, id="some"), pytest.param(25, id="many", marks=pytest.mark.slow)]
amounts = pytest.mark.parametrize("amount", AMOUNTS)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["???", "${name}", "${oc.env:X}", "embedded", "1e9", "H1-5", "../../x", "\x00", "~x", "{", "a.b"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)
plain = st.recursive(  # what JSON can hold
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def trying(strategy: st.SearchStrategy[Any], amount: int, attempt: Callable[[Any], Any], examples: int) -> None:
    """Calls ``attempt`` with many values; whatever it raises but a UserError of at most five lines is a fault."""
    refused = []

    @settings(
        max_examples=examples * amount,
        deadline=None,
        database=None,
        derandomize=amount == 1,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def once(value: Any) -> None:
        try:
            attempt(value)
        except UserError as error:
            assert str(error).strip()
            refused.append(value)

    once()
    assert refused, "nothing was refused: the reader was never tried on bad input"


def dotted(kind: Any, prefix: str = "") -> list[str]:
    """Every key of a config."""
    found = []
    for field in fields(kind):
        value = getattr(kind, field.name)
        found += [prefix + field.name, *(dotted(value, f"{prefix}{field.name}.") if is_dataclass(value) else [])]
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


@amounts
@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig])
def test_a_config_of_any_values(kind: Any, amount: int, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    known = st.sampled_from(dotted(kind()))

    def attempt(given: tuple[str, Any, str, Any]) -> None:
        key, value, other, text = given
        path.write_text(yaml.safe_dump({**nested(other, 1), **nested(key, value)}, allow_unicode=True))
        finish(load_config(kind, path, [f"{other}={text}"]))

    trying(st.tuples(known, values, known, scalars), amount, attempt, 60)


def finish(config: Any) -> None:
    """What every verb does with a config before anything else."""
    if isinstance(config, PretrainConfig):
        check_pretrain(config)
    else:
        check(config)
        build_schedule(config, 10)


@amounts
def test_a_config_file_of_any_text_or_bytes(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    words = "name train :_ -_ [ ] { } &a_ *a <<:_ !!int_ !!bool_ !!timestamp_ !!set_ ' \" | ?_ # 1 --- ${ } , ."
    pieces = st.lists(st.sampled_from(["\n", "  ", "\t", *words.replace("_", " ").split(" ")]))

    def attempt(content: str | bytes) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        finish(load_config(RunConfig, path))

    trying(st.one_of(st.text(), st.binary(), pieces.map("".join)), amount, attempt, 150)


@amounts
def test_overrides_of_any_text(amount: int) -> None:
    keys = st.one_of(st.text(max_size=12), st.sampled_from([*dotted(RunConfig()), "data.mixture[0].source", "a[b].c"]))
    texts = st.one_of(st.text(max_size=12), values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)))
    override = st.tuples(keys, st.sampled_from(["=", "", "=="]), texts).map("".join)
    trying(
        st.lists(override, min_size=1, max_size=2),
        amount,
        lambda given: finish(merge_config(RunConfig, [], given)),
        250,
    )


@amounts
def test_a_record_of_any_bytes(amount: int, tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        read_json(path)
        read_record(path, fingerprint=str, order=list[int], minutes=float)

    wanted = st.dictionaries(st.sampled_from(["fingerprint", "order", "minutes"]), plain)
    nested_deep = st.integers(1, 3000).map(lambda depth: b"[" * depth + b"]" * depth)
    records = st.one_of(st.binary(), (plain | wanted).map(lambda value: json.dumps(value).encode()), nested_deep)
    trying(records, amount, attempt, 250)


RECORDS = {
    "stages/01-H1-5/score/scores.json": {
        "scorer": "mmr", "steps": 2, "trainable": "all",
        "blocks": [{"block": 0, "score": 0.5, "loss_start": 1.0, "loss_end": 0.5}], "order": [0],
    },
    "stages/01-H1-5/place/placement.json": {"name": "H1-1/2", "mixers": ["mamba1", "attention"], "added": [0]},
    "stages/01-H1-5/train/train.json": {
        "start": "teacher", "steps": 2, "tokens": 64, "minutes": 0.1, "loss": "jsd",
        "eval_loss_start": 1.0, "eval_loss_end": 0.5,
    },
    "stages/01-H1-5/measure/measure.json": {
        "name": "H1-1/2", "replaced": 1, "num_blocks": 2, "tokens": 64, "minutes": 0.1, "parameters": 9,
        "accuracy": [{"task": "add", "kind": "generative", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4}],
        "by_distance": [{"task": "add", "distance": 1, "value": 0.5, "stderr": 0.1, "n": 4}],
        "throughput": [{
            "model": "teacher", "batch": 1, "context": 16, "step_seconds": 0.1, "cache_bytes": 5, "kv_bytes": 5,
            "state_bytes": 0,
        }],
        "headline": {"tokens_per_second": 5.0, "teacher_tokens_per_second": 4.0, "batch": 1, "output_tokens": 16},
        "serving": {
            "machine": {"name": "x", "copy_bytes_per_second": 1.0},
            "one_in_n_out": [{
                "model": "H1-1/2", "protocol": "equal_batch", "batch": 1, "output_tokens": 16, "how": "full",
                "tokens_per_second": 5.0, "tokens_per_second_low": 4.0, "ratio": 1.25,
            }],
            "prefill": [{"model": "teacher", "batch": 1, "tokens": 16, "seconds": 0.1}],
            "memory": [{"model": "teacher", "batch": 1, "tokens": 16, "total_bytes": 9, "measured": True}],
            "pays_from": {"mamba1": {"1": 16}},
        },
    },
    "stages/01-H1-5/measure/step.json": {
        "fingerprint": "0", "seconds": 1.0, "inputs": {"teacher": "0", "measure": {"limit": 0}},
        "provenance": {"host": "x", "packages": {"torch": "2"}, "device": "x", "command": "distill run x"},
    },
    "stages/01-H1-5/train/log.jsonl": {"step": 1, "loss": 0.5, "tokens": 8, "eval_loss": 0.5},
}  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in places(part, (*at, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another at one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@amounts
def test_a_report_of_any_records(amount: int, tmp_path: Path) -> None:
    """One value in one record is another: the tables of the report stand, or the record is named."""
    (tmp_path / "run.yaml").write_text("name: x\nschedule: [5]\n")
    for file, record in RECORDS.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(record) + "\n" + "{}\n" * file.endswith("l"))
    where = st.sampled_from([(file, place) for file, record in RECORDS.items() for place in places(record)])

    def attempt(given: tuple[tuple[str, tuple[Any, ...]], Any]) -> None:
        (file, place), value = given
        content = changed(RECORDS[file], place, value)
        (tmp_path / file).write_text(json.dumps(content) + "\n" + "{}\n" * file.endswith("l"))
        try:
            run = read_run(tmp_path)
            frame = stage_frame(run)
            loss_frame(run), throughput_frame(run), distance.distance_frame(run)
            task_frame(run), importance_frame(run), cost_frame(run), provenance_frame(run), commands(run)
            memory_frame(run), protocol_frame(run), prefill_frame(run), pays_from(run), machine(run)
            missing(run), summary(run, frame), table(tmp_path)
        finally:
            (tmp_path / file).write_text(json.dumps(RECORDS[file]) + "\n" + "{}\n" * file.endswith("l"))

    trying(st.tuples(where, plain), amount, attempt, 200)


@amounts
def test_a_lineage_of_any_json(amount: int, tmp_path: Path) -> None:
    def attempt(value: Any) -> None:
        (tmp_path / "lineage.json").write_text(json.dumps(value))
        sum(entry["tokens"] for entry in recorded(tmp_path))

    entries = st.lists(st.dictionaries(st.sampled_from(["tokens", "name"]), plain), max_size=2)
    trying(plain | entries, amount, attempt, 100)


@amounts
def test_the_config_of_a_model_of_any_json(amount: int, teacher_folder: Path) -> None:
    content = json.loads((teacher_folder / "config.json").read_text())

    def attempt(given: tuple[str, Any] | bytes) -> None:
        if isinstance(given, bytes):
            (teacher_folder / "config.json").write_bytes(given)
        else:
            (teacher_folder / "config.json").write_text(json.dumps({**content, given[0]: given[1]}))
        load_model_config(str(teacher_folder))

    trying(st.tuples(st.sampled_from(sorted(content)), plain) | st.binary(), amount, attempt, 120)


@amounts
def test_weights_of_any_bytes(amount: int, teacher_folder: Path) -> None:
    path = teacher_folder / "model.safetensors"
    whole = path.read_bytes()

    def attempt(given: bytes | tuple[int, int]) -> None:
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            place, cut = given
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 : cut])
        headers(teacher_folder)

    trying(st.binary() | st.tuples(st.integers(0, 3000), st.integers(0, len(whole))), amount, attempt, 100)


@amounts
def test_an_index_of_any_json(amount: int, teacher_folder: Path) -> None:
    names = st.sampled_from(["model.safetensors", "../model.safetensors", "/etc/passwd", "x.bin", "", ".."])
    maps = st.dictionaries(st.sampled_from(["model.norm.weight", "x"]), names | plain)

    def attempt(value: Any) -> None:
        (teacher_folder / "model.safetensors.index.json").write_text(json.dumps(value))
        check_files(str(teacher_folder))

    trying(plain | st.fixed_dictionaries({"weight_map": maps | plain}), amount, attempt, 100)


@amounts
def test_a_tokenizer_of_any_json(amount: int, teacher_folder: Path, tmp_path: Path) -> None:
    files = [file for file in ("tokenizer.json", "tokenizer_config.json") if (teacher_folder / file).is_file()]
    contents = {file: json.loads((teacher_folder / file).read_text()) for file in files}
    where = st.sampled_from([(file, key) for file, content in contents.items() for key in content])

    def attempt(given: tuple[tuple[str, str], Any]) -> None:
        (file, key), value = given
        (teacher_folder / file).write_text(json.dumps({**contents[file], key: value}))
        try:
            load_tokenizer(str(teacher_folder))
        finally:
            (teacher_folder / file).write_text(json.dumps(contents[file]))

    trying(st.tuples(where, plain), amount, attempt, 60)


@amounts
def test_data_of_any_rows(amount: int, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    words = st.sampled_from(["user", "assistant", "system", "2", ""]) | plain
    turn = st.fixed_dictionaries({}, optional={"role": words, "content": words, "tool_calls": plain})
    row = st.fixed_dictionaries(
        {},
        optional={"messages": st.lists(turn, max_size=3) | plain, "prompt": words, "completion": words, "text": words},
    )

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        for read in (lambda: read_documents(path, tokenizer, "completion"), lambda: read_prompts(path)):
            try:
                read()
            except UserError as error:
                caught = error
            else:
                caught = None
        if caught:
            raise caught

    lines = st.lists(row | plain, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    trying(st.binary() | lines, amount, attempt, 150)


def test_a_folder_is_left_as_it_was(teacher_folder: Path) -> None:
    """Reading a model never writes to its folder."""
    before = {path.name: path.read_bytes() for path in teacher_folder.iterdir()}
    load_model_config(str(teacher_folder)), load_tokenizer(str(teacher_folder)), check_files(str(teacher_folder))
    assert {path.name: path.read_bytes() for path in teacher_folder.iterdir()} == before
    shutil.rmtree(teacher_folder)
    with pytest.raises(UserError, match="no model"):
        check_files(str(teacher_folder))
