"""Bad files, teachers, data and run folders, each made by its name when a row of a table names it.

A builder is a function of (the path to make, a tiny finished run to damage); ``build`` replaces ``{tmp}/NAME`` in a
command by the path of what the builder NAME has made (a name without a builder is left missing).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from eval import report
from stages.cli import main

TINY = """
name: tiny
teacher: {folder}/teacher
schedule: [1, 2]
run_dir: {folder}/run
threads: 1
data: {{sequence_length: 128}}
score: {{loo: {{questions: 4}}, mmr: {{steps: 1, heldout_tokens: 128}}}}
train: {{steps: 2, batch_size: 4, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 4}}
sft: {{steps: 2, batch_size: 4}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 1
  throughput: {{batches: [1], contexts: [16], repeats: 1, output_tokens: 16}}
"""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 4,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``teacher``, ``tiny.yaml`` and the finished run of it, ``run``; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE)).save_pretrained(folder / "teacher")
    build_tokenizer().save_pretrained(folder / "teacher")
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots_of", lambda *_: [])  # figures take most of the time, and have tests of their own
        assert main(["run", str(folder / "tiny.yaml")]) == 0
    return folder


@pytest.fixture
def build(tiny: Path, tmp_path: Path) -> Callable[[list[str]], list[str]]:
    """``build(command)``: the command with ``{tmp}`` filled in and everything that it names made."""

    def make(command: list[str]) -> list[str]:
        for name in re.findall(r"\{tmp\}/([\w.]+)", " ".join(command)):
            if name in BUILDERS and not os.path.lexists(tmp_path / name):
                BUILDERS[name](tmp_path / name, tiny)
        return [part.replace("{tmp}", str(tmp_path)).replace("{tiny}", str(tiny)) for part in command]

    return make


def text(content: str | bytes) -> Callable[[Path, Path], None]:
    """A file with this content."""
    return lambda path, tiny: (path.write_bytes(content if isinstance(content, bytes) else content.encode()), None)[1]


def rows(*lines: Any) -> Callable[[Path, Path], None]:
    """A JSONL file; text stands as it is."""
    return text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def teacher(*changes: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    """A copy of the tiny teacher, changed."""

    def make(path: Path, tiny: Path) -> None:
        shutil.copytree(tiny / "teacher", path)
        for change in changes:
            change(path)

    return make


def run(*changes: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    """A copy of the finished run, changed."""

    def make(path: Path, tiny: Path) -> None:
        shutil.copytree(tiny / "run", path)
        for change in changes:
            change(path)

    return make


def unsealed(run: Path) -> None:
    """Takes the checksums from a run, as versions without them left it: what its records hold is then looked at."""
    for file in run.rglob("step.json"):
        keys("step.json", files=None)(file.parent)


def keys(file: str = "config.json", **values: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file (None: removes them)."""

    def change(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(file: str, content: str) -> Callable[[Path], Any]:
    """Writes a file of the folder anew."""
    return lambda folder: (folder / file).write_text(content)


def remove(*names: str) -> Callable[[Path], None]:
    """Removes files or folders."""

    def change(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Changes the bytes of the weights."""
    return lambda folder: (folder / "model.safetensors").write_bytes(
        change((folder / "model.safetensors").read_bytes())
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the weights."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def fewer_embeddings(weights: dict[str, torch.Tensor]) -> None:
    """Embeddings of the first 20 tokens alone."""
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:20].clone()


def sharded(**places: str) -> Callable[[Path], None]:
    """Gives the weights an index, in which some tensors lie in other files."""

    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        place = {"model.norm.weight": places["norm"]} if places else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**names, **place}}))

    return change


def pickled(folder: Path) -> None:
    """Weights as a pickle alone."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def code(folder: Path) -> None:
    """A model with Python code of its own, which leaves a file behind where it is run."""
    keys(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")


def flipped(content: bytes) -> bytes:
    """A bit of the header is another."""
    return content[:20] + bytes([content[20] ^ 0x10]) + content[21:]


def last_bit(content: bytes) -> bytes:
    """A bit of the last tensor is another."""
    return content[:-1] + bytes([content[-1] ^ 1])


CHAT = {"messages": [{"role": "user", "content": "add 1+1"}, {"role": "assistant", "content": "2"}]}
FIRST = "stages/01-H1-1"
SECOND = "stages/02-H1-2"
TRAINED = f"{FIRST}/train/checkpoint"
PLACEMENT = f"{FIRST}/place/placement.json"
BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    # configs
    "empty.yaml": text(""),
    "comment.yaml": text("# name: x\n"),
    "list.yaml": text("- a\n"),
    "word.yaml": text("demo"),
    "number.yaml": text("7"),
    "broken.yaml": text("a: [1\n b: }"),
    "tab.yaml": text("train:\n\tsteps: 5\n"),
    "binary.yaml": text(bytes(range(256))),
    "latin.yaml": text("name: caf\xe9".encode("latin-1")),
    "twice.yaml": text("seed: 1\nseed: 2\n"),
    "two.yaml": text("seed: 1\n---\nseed: 2\n"),
    "python.yaml": text("name: !!python/object/apply:os.system ['touch ran']\n"),
    "bomb.yaml": text("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )),
    "itself.yaml": text("name: &a [*a]\n"),
    "deep.yaml": text("name: " + "[" * 5000 + "]" * 5000),
    "typo.yaml": text("trian: {steps: 5}\n"),
    "nested.yaml": text("train: {stesp: 5}\n"),
    "type.yaml": text("train: {steps: many}\n"),
    "null.yaml": text("train: null\n"),
    "newer.yaml": text("version: 99\nname: x\nfuture: 1\n"),
    "version.yaml": text("version: one\n"),
    "config.txt": text("name: x\n"),
    "folder.yaml": lambda path, tiny: path.mkdir(),
    "dangling.yaml": lambda path, tiny: path.symlink_to("nowhere"),
    # teachers
    "bert": teacher(keys(model_type="bert")),
    "sliding": teacher(keys(model_type="mistral", sliding_window=8)),
    "no_type": teacher(keys(model_type=None)),
    "unheard_of": teacher(keys(model_type="unheard_of")),
    "not_json": teacher(write("config.json", "{")),
    "a_list": teacher(write("config.json", "[1]")),
    "no_blocks": teacher(keys(num_hidden_layers=0)),
    "odd_heads": teacher(keys(num_key_value_heads=3)),
    "odd_placement": teacher(keys(mixers=5)),
    "words": teacher(keys(hidden_size="many")),
    "truncated": teacher(bytes_of(lambda content: content[: len(content) // 2])),
    "flipped": teacher(bytes_of(flipped)),
    "huge_header": teacher(bytes_of(lambda content: struct.pack("<Q", 1 << 60) + content[8:])),
    "no_weights": teacher(remove("model.safetensors")),
    "zero_bytes": teacher(bytes_of(lambda content: b"")),
    "pickled": teacher(pickled),
    "shard_missing": teacher(sharded(norm="model-00002-of-00002.safetensors")),
    "shard_elsewhere": teacher(sharded(norm="../model.safetensors")),
    "no_map": teacher(write("model.safetensors.index.json", "{}")),
    "smaller": teacher(keys(intermediate_size=32)),
    "deeper": teacher(keys(num_hidden_layers=5)),
    "nan": teacher(tensors(lambda weights: weights["model.norm.weight"].fill_(torch.nan))),
    "infinite": teacher(tensors(lambda weights: weights["model.embed_tokens.weight"][3].fill_(torch.inf))),
    "code": teacher(code),
    "code_of_tokenizer": teacher(keys("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})),
    "no_tokenizer": teacher(remove("tokenizer.json", "tokenizer_config.json")),
    "broken_tokenizer": teacher(write("tokenizer.json", '{"model": 1}')),
    "few_embeddings": teacher(keys(vocab_size=20), tensors(fewer_embeddings)),
    "no_end": teacher(keys("tokenizer_config.json", eos_token=None)),
    "no_template": teacher(remove("chat_template.jinja")),
    "broken_template": teacher(write("chat_template.jinja", "{% for m in messages %}")),
    "evil_template": teacher(write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}")),
    # data
    "blank.jsonl": text("\n\n"),
    "malformed.jsonl": rows(CHAT, '{"messages": ', CHAT),
    "columns.jsonl": rows({"question": "a", "reply": "b"}),
    "no_target.jsonl": rows(CHAT, {"messages": CHAT["messages"][:1]}),
    "numbers.jsonl": rows({"prompt": 1, "completion": 2}),
    "one.jsonl": rows(CHAT),
    "binary.jsonl": text(bytes(range(128, 256))),
    "answers.jsonl": rows({"prompt": "a", "answer": []}),
    # runs
    "a_file": text("here\n"),
    "an_empty_folder": lambda path, tiny: path.mkdir(),
    "run": run(),
    "newer": run(write("run.yaml", "version: 99\nfuture: 1\n")),
    "no_yaml": run(remove("run.yaml")),
    "torn_yaml": run(write("run.yaml", "name: tiny\nteacher: [")),
    "torn_step": run(write(f"{FIRST}/train/step.json", '{"step": "01')),
    "list_step": run(write(f"{FIRST}/score/step.json", "[]")),
    "no_train": run(remove(f"{FIRST}/train")),
    "no_score": run(remove(f"{FIRST}/score", f"{FIRST}/place")),
    "torn_sealed": run(remove(f"{FIRST}/place"), write(f"{FIRST}/score/scores.json", "{")),
    "flipped_sealed": run(remove(f"{FIRST}/measure"), lambda run: bytes_of(last_bit)(run / TRAINED)),
    "odd_seal": run(remove(f"{FIRST}/place"), keys(f"{FIRST}/score/step.json", files=5)),
    "no_swap": run(remove(f"{FIRST}/swap")),
    "torn_scores": run(unsealed, remove(f"{FIRST}/place"), write(f"{FIRST}/score/scores.json", "{")),
    "no_order": run(unsealed, remove(f"{FIRST}/place"), write(f"{FIRST}/score/scores.json", "{}")),
    "odd_order": run(unsealed, remove(f"{FIRST}/place"), write(f"{FIRST}/score/scores.json", '{"order": [77]}')),
    "odd_mixer": run(unsealed, remove(f"{FIRST}/swap"), keys(PLACEMENT, mixers=["../evil", "attention", "attention"])),
    "few_mixers": run(unsealed, remove(f"{FIRST}/swap"), keys(PLACEMENT, mixers=["mamba1"])),
    "torn_weights": run(unsealed, remove(f"{FIRST}/measure"), write(f"{TRAINED}/model.safetensors", "torn")),
    "no_checkpoint": run(unsealed, remove(f"{SECOND}/swap", f"{FIRST}/train/checkpoint")),
    "torn_measure": run(write("teacher/measure.json", "{")),
    "odd_measure": run(keys("teacher/measure.json", accuracy=[{"task": 1, "kind": "generative", "value": "x"}])),
    "odd_log": run(write(f"{FIRST}/train/log.jsonl", '{"step": 1, "loss": "x"}\n{"step": 2}\n')),
    "models.csv": text("nam,accuracy,ratio\n"),
    "file_in_the_way": run(remove("report"), write("report", "")),
}  # fmt: skip
