"""GGUF files in llama.cpp itself: the logits, the text and the tokens of the hybrid (make test-gguf)."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distill.config import MixerConfig
from distill.data.families import FAMILIES, draw
from distill.data.tokenizer import build_tokenizer
from distill.export import gguf
from distill.export.gguf_weights import to_gguf
from distill.hybrid.surgery import hybridize
from distill.teacher import load_model, load_tokenizer
from eval.backends.llama_cpp import read_config, read_tokenizer
from eval.backends.llama_runtime import Context, File
from stages.cli import main

pytestmark = pytest.mark.gguf
TOKENS = 70
FITTING = ("llama", "mistral", "qwen2", "granite")
SaveHybrid = Callable[..., Any]


def logits_of(file: File, ids: torch.Tensor) -> torch.Tensor:
    """llama.cpp's logits [T, V] of a text."""
    context = Context(file, 1, len(ids), threads=1)
    return torch.from_numpy(context.read([ids.tolist()], last=False)[0])


def greedy(file: File, prompt: list[int], tokens: int) -> list[int]:
    """llama.cpp's likeliest continuation, a token at a time."""
    context = Context(file, 1, len(prompt) + tokens, threads=1)
    found = [int(context.read([prompt])[0].argmax())]
    while len(found) < tokens:
        found.append(int(context.step({0: found[-1]}).argmax()))
    return found


@torch.no_grad()
def likeliest(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """transformers' likeliest continuation, and by how much a token at least beat the next one."""
    ids, found, cache, margin = torch.tensor([prompt]), [], None, float("inf")
    for _ in range(tokens):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        found.append(int(best.indices[0]))
        ids = best.indices[None, :1]
    return found, margin


@pytest.mark.parametrize("seed", range(16))
def test_llama_cpp_computes_the_same(saved_hybrid: SaveHybrid, seed: int, tmp_path: Path) -> None:
    hybrid = saved_hybrid(seed, tmp_path / "hybrid", FITTING[seed % len(FITTING)])
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    names = gguf.export(tmp_path / "hybrid", tmp_path / "model.gguf")
    assert len(names) == len(set(names))
    file = File(tmp_path / "model.gguf")
    ids = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours = hybrid(ids[None]).logits[0]
    difference = float((logits_of(file, ids) - ours).abs().max())
    print(f"{hybrid.config.model_type} {hybrid.config.mixers}: {difference:.1e} of {float(ours.abs().max()):.1f}")
    assert difference <= 1e-3
    text, margin = likeliest(hybrid, ids[:8].tolist(), TOKENS)
    assert greedy(file, ids[:8].tolist(), TOKENS) == text or margin < 1e-3
    assert read_config(file).mixers == hybrid.config.mixers


@pytest.mark.parametrize("blocks", [[2, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8], []])
def test_the_embedded_teachers_hybrids_say_the_same(blocks: list[int], tmp_path: Path) -> None:
    teacher, tokenizer = load_model("embedded"), load_tokenizer("embedded")
    mixers = ["mamba2" if block in blocks else "attention" for block in range(10)]
    hybrid = hybridize(teacher, mixers, MixerConfig(name="mamba2")).eval()
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    output = tmp_path / "out.gguf"
    assert main(["export", str(tmp_path / "hybrid"), "--to", "gguf", "--output", str(output)]) == 0
    file = File(output)
    for seed, family in enumerate(FAMILIES):
        chat = draw(family, random.Random(seed), held_out=True).messages[:1]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = file.tokenize(text, ends=True)
        assert prompt == tokenizer(text)["input_ids"]
        expected, margin = likeliest(hybrid, prompt, TOKENS)
        found = greedy(file, prompt, TOKENS)
        assert found == expected or margin < 1e-3
        assert file.detokenize(found) == tokenizer.decode(found)
        with torch.no_grad():
            ours = hybrid(torch.tensor([prompt])).logits[0]
        assert float((logits_of(file, torch.tensor(prompt)) - ours).abs().max()) <= 1e-3


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_narrow_types_are_near(saved_hybrid: SaveHybrid, kind: str, tmp_path: Path) -> None:
    hybrid = saved_hybrid(5, tmp_path / "hybrid", "llama")
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    command = ["export", str(tmp_path / "hybrid"), "--to", "gguf", "--output"]
    assert main([*command, str(tmp_path / "whole.gguf")]) == main([*command, str(tmp_path / "m.gguf"), "--dtype", kind])
    assert (tmp_path / "m.gguf").stat().st_size < 0.8 * (tmp_path / "whole.gguf").stat().st_size
    ids = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = hybrid(ids[None]).logits[0]
    theirs = logits_of(File(tmp_path / "m.gguf"), ids)
    assert 0 < float((theirs - ours).abs().max()) <= (2e-2 if kind == "f16" else 1e-1) * float(ours.abs().max())


TEXTS = (
    "Hello world", "  two  spaces ", "the 12345 the\n\n\tx", "don't DON'T we'll", "naïve café — 日本語 🙂", "x<s>y", "",
    "a</s>b", "tab\tand\r\nline", "____ ==== ....", "ab abc aab bc", " the", "3.14159, (1+2)*3",
)  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.byte_level(c.isolated(c.split), whole=True),
        lambda c: c.byte_level(c.isolated(c.split.replace("{1,3}", ""))),
        lambda c: c.fallback(["ab", "▁ab", "abc", "th", "the", "▁the", "▁▁", "Hello", "He", "ll", "lo", "Hell"]),
    ],
    ids=["llama3", "qwen2", "sentencepiece"],
)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(make: Any, cores: Any, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(cores), bos_token="<s>", eos_token="</s>")
    shape = {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
        "num_hidden_layers": 2, "vocab_size": 400,
    }  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    hybridize(teacher, ["mamba2", "attention"], MixerConfig(name="mamba2")).save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    gguf.export(tmp_path / "hybrid", tmp_path / "out.gguf")
    file = File(tmp_path / "out.gguf", words_only=True)
    back = read_tokenizer(file)
    lead = " " if file.value("tokenizer.ggml.model") == "llama" else ""
    for text in TEXTS:
        expected = tokenizer(text)["input_ids"]
        assert file.tokenize(text, ends=True) == expected, text
        assert back(text)["input_ids"] == expected
        if "�" not in tokenizer.decode(expected):
            assert file.detokenize(expected).removeprefix(lead) == tokenizer.decode(expected)


def test_texts_of_the_families_are_read_as_they_were_in_training(
    tmp_path: Path, make_llama: Callable[..., Any]
) -> None:
    tokenizer = build_tokenizer()
    hybrid = hybridize(make_llama(hidden_size=128), ["mamba2", *["attention"] * 3], MixerConfig(name="mamba2"))
    hybrid.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    gguf.export(tmp_path / "hybrid", tmp_path / "out.gguf")
    file = File(tmp_path / "out.gguf", words_only=True)
    rng = random.Random(0)
    for family in FAMILIES:
        for _ in range(1000):
            text = tokenizer.apply_chat_template(draw(family, rng, held_out=False).messages, tokenize=False)
            ids = tokenizer(text)["input_ids"]
            assert file.tokenize(text, ends=True) == ids, text
            assert file.detokenize(ids) == text
    for keys in ("mod", "sort", "chase", "xmod", "fromx", "xfromy"):
        text = f"recall a1 from {keys}"
        assert file.tokenize(text) == tokenizer(text)["input_ids"], text
    assert read_tokenizer(file)("recall a1 from from")["input_ids"] == tokenizer("recall a1 from from")["input_ids"]


def test_a_file_appears_whole_or_not_at_all(
    saved_hybrid: SaveHybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_hybrid(3, tmp_path / "hybrid", "llama")
    folder, output = tmp_path / "hybrid", tmp_path / "out" / "x.gguf"
    export = ["export", str(folder), "--to", "gguf", "--output", str(output)]

    def refused(arguments: list[str], message: str) -> None:
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
        assert not output.parent.exists() or not list(output.parent.iterdir())

    refused(export, "has no tokenizer")
    build_tokenizer().save_pretrained(folder)
    refused([*export, "--dtype", "bf61"], "did you mean 'bf16'")
    refused([*export[:-1], str(tmp_path / "out/x")], "must be a file named *.gguf")
    refused([*export[:3], "ggfu", *export[4:]], "did you mean 'gguf'")
    refused(["export", "embedded", *export[2:]], "no folder embedded")
    monkeypatch.setattr("distill.storage.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(export, "MiB free")
    monkeypatch.undo()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(export, "damaged")
    (folder / "model.safetensors").write_bytes(weights)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refused(export, "cannot write to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert main(export) == 0
    refused_again = main(export)
    assert refused_again == 2 and "exists already" in capsys.readouterr().err


def test_numbers_beyond_f16_are_refused(
    saved_hybrid: SaveHybrid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hybrid = saved_hybrid(3, tmp_path / "hybrid", "llama")
    with torch.no_grad():
        hybrid.model.embed_tokens.weight[0, 0] = 1e5
    hybrid.save_pretrained(tmp_path / "hybrid")
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    export = ["export", str(tmp_path / "hybrid"), "--to", "gguf", "--output", str(tmp_path / "x.gguf")]
    assert main([*export, "--dtype", "f16"]) == 2 and "beyond the range of f16" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists() and main([*export, "--dtype", "bf16"]) == 0


def test_never_more_than_a_block_is_read_at_once(saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    hybrid = saved_hybrid(3, tmp_path / "hybrid", "llama")
    state, held = hybrid.state_dict(), []
    for _ in to_gguf(hybrid.config, lambda name: held.append(name) or state[name]):
        assert len({name.split(".")[2] for name in held[-12:] if "layers" in name}) <= 2
    assert len(held) == len(set(held))  # and nothing twice


def test_sequences_do_not_know_of_one_another_and_go_back(saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    saved_hybrid(0, tmp_path / "hybrid", "llama")
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    gguf.export(tmp_path / "hybrid", tmp_path / "out.gguf")
    file = File(tmp_path / "out.gguf")
    rows = [list(range(5, 25)), list(range(30, 60)), [7]]
    context = Context(file, 3, 64, threads=1)
    together = context.read(rows)
    marks, filled = context.mark(), list(context.filled)
    first = context.step({0: 5, 2: 9})
    alone = []
    for row, token in zip(rows, (5, None, 9), strict=True):
        single = Context(file, 1, 64, threads=1)
        alone.append(single.read([row])[0])
        if token is not None:
            alone.append(single.step({0: token}))
    np.testing.assert_allclose(np.concatenate(together), np.concatenate([alone[0], alone[2], alone[3]]), atol=1e-4)
    np.testing.assert_allclose(first, np.concatenate([alone[1], alone[4]]), atol=1e-4)
    assert filled == [20, 30, 1] and len(marks) == 3
    context.clear()
    context.read([[5, 6, 7]] * 3)
    marks = context.mark()
    once = context.step({0: 8, 1: 8, 2: 8})
    context.back(marks, 3)
    np.testing.assert_allclose(context.step({0: 8, 1: 8, 2: 8}), once, atol=1e-6)


def test_the_origin_is_in_the_file_and_shards_make_no_difference(saved_hybrid: SaveHybrid, tmp_path: Path) -> None:
    hybrid = saved_hybrid(1, tmp_path / "hybrid", "qwen2")
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    lineage = [{"name": "H1-2/3", "tokens": 7}]
    (tmp_path / "hybrid/lineage.json").write_text(json.dumps(lineage))
    gguf.export(tmp_path / "hybrid", tmp_path / "out.gguf")
    assert File(tmp_path / "out.gguf", words_only=True).keys(gguf.LINEAGE) == lineage
    (tmp_path / "hybrid/model.safetensors").unlink()
    hybrid.save_pretrained(tmp_path / "hybrid", max_shard_size="20KB")
    assert len(list((tmp_path / "hybrid").glob("model-*.safetensors"))) > 2
    gguf.export(tmp_path / "hybrid", tmp_path / "sharded.gguf")
    assert (tmp_path / "sharded.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


MEASURED = """
import sys, threading, time
from pathlib import Path
from distill.export import {module} as exporter

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

import gguf, torch
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before, most, done = held(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], held())

watcher = threading.Thread(target=watch)
watcher.start()
exporter.export(Path(sys.argv[1]), Path(sys.argv[2]){options})
done.set()
watcher.join()
print(most[0] - before)
"""


@pytest.mark.parametrize("kind", ["gguf", "hf_native"])
def test_no_copy_of_the_model_is_in_memory(kind: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "vocab_size": 64}
    config = AutoConfig.for_model("llama", **wide, num_attention_heads=8, num_key_value_heads=4)
    teacher = AutoModelForCausalLM.from_config(config)
    hybrid = hybridize(teacher, ["mamba2", "attention"] * 8, MixerConfig(name="mamba2"))
    hybrid.save_pretrained(tmp_path / "hybrid", max_shard_size="50MB")
    build_tokenizer().save_pretrained(tmp_path / "hybrid")
    weights = sum(file.stat().st_size for file in (tmp_path / "hybrid").glob("*.safetensors"))
    output = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    code = MEASURED.format(module=kind, options="" if kind == "gguf" else ", shard=20 << 20")
    command = [sys.executable, "-c", code, str(tmp_path / "hybrid"), str(output)]
    held = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{kind}: {held / 2**20:.0f} MiB held of {weights / 2**20:.0f} MiB of weights")
    assert held < weights / 3
