"""A hybrid in llama.cpp's formats: size, memory, speed, accuracy and distance to the unquantised model, per format; and
what is lost where one component alone is quantised.

    python benchmarks/quantize.py runs/wide --name wide --json docs/quantize.json --doc docs/export.md
    python benchmarks/quantize.py --random 1024x12 --name random --json docs/quantize.json --doc docs/export.md

RUN or CHECKPOINT, a ``mamba2`` hybrid of the embedded teacher (or of a widened one: benchmarks/widen.py). KL is
KL(unquantised || quantised) in nats a token over held-out documents, `same` how often both put the same token first;
accuracy is the mean of the five generative families, and choice that of the multiple-choice suite. Memory is what a
process grows by from before the file is opened until its cache of 512 tokens has been used; keys, values and states
are in float32 throughout. --random has random weights in their place: size, memory and speed of a larger model, whose
accuracy would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.config import MeasureConfig, MixerConfig
from distill.data.families import FAMILIES
from distill.data.tokenizer import VOCAB_SIZE, build_tokenizer
from distill.data.traces import EmbeddedTraces, pad_id
from distill.export import gguf, imatrix
from distill.export.quantize import COMPONENTS, kind_of, quantize, read_tensors
from distill.hybrid.surgery import hybridize
from distill.placement import ATTENTION
from distill.records import read_json, write_json
from distill.teacher import load_model, load_tokenizer
from eval import accuracy
from eval.backends.llama_cpp import LanguageModel, open_model, read_config, read_tokenizer
from eval.backends.llama_runtime import File
from stages.cli import quiet
from stages.package import locate

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,IQ3_M"
PLAIN = "F32"
LENGTH = 128
CONTEXT = 512
"""Tokens of the prompt that prefill is timed on, and in the cache while decoding is."""
TRAINING, HELD_OUT = 90_003, 90_001  # seeds of the rows for the importance and for the figures


def figures_of(paths: Sequence[str], args: argparse.Namespace) -> None:
    """What the process of one or several files does: print a line of JSON for each."""
    torch.set_num_threads(args.threads)
    for path in map(Path, paths):
        found: dict[str, Any] = cost(path, args.repeats) if args.cost else {}
        if not args.random:
            found |= quality(path, Path(args.reference), args)
        print(json.dumps(found), flush=True)


def cost(path: Path, repeats: int) -> dict[str, float]:
    """Tokens a second of prefill and of decoding one sequence, medians; and MiB that the process grew by."""
    before = resident()
    engine = open_model(str(path), path.stem, "float32")
    engine.prepare(1, CONTEXT + 8)
    engine.step(CONTEXT)
    steps = [engine.step(CONTEXT) for _ in range(8 * repeats)]
    used = resident() - before
    engine.release()
    fills = [engine.prefill(1, CONTEXT) for _ in range(repeats)]
    return {
        "memory_mib": used,
        "prefill": CONTEXT / statistics.median(fills),
        "decode": 1 / statistics.median(steps),
    }


def resident() -> float:
    """MiB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def quality(path: Path, reference: Path, args: argparse.Namespace) -> dict[str, float]:
    """Distance to the model whose log-probabilities ``reference`` holds (written where it is missing), and accuracy."""
    file = File(path)
    tokenizer = read_tokenizer(file)
    model = LanguageModel(file, read_config(file), args.threads)
    ours = log_probabilities(model, documents(tokenizer, args.tokens))
    if not reference.exists():
        np.save(reference, ours)
    theirs = np.load(reference).astype(np.float64)
    scores = accuracy.evaluate(model, tokenizer, MeasureConfig(limit=args.questions, batch_size=32)).record["accuracy"]
    means = {
        kind: statistics.mean(row["value"] for row in scores if row["kind"] == kind)
        for kind in ("generative", "multiple_choice")
    }
    return {
        "kl": float((np.exp(theirs) * (theirs - ours)).sum(-1).mean()),
        "same": float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
        "tokens": len(ours),
        **means,
    }


def documents(tokenizer: Any, tokens: int) -> list[torch.Tensor]:
    """Held-out documents [T] of about so many tokens together."""
    rows = EmbeddedTraces(
        tokenizer, -(-tokens // LENGTH), LENGTH, dict.fromkeys(FAMILIES, 1.0), HELD_OUT, held_out=True
    )
    found: list[torch.Tensor] = []
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), LENGTH]
        parts = [row["input_ids"][a:b] for a, b in pairwise(starts)]
        found += [part for part in parts if part.any() and len(part) > 1]  # the rest of a row is padding
    return found


def log_probabilities(model: LanguageModel, texts: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Of every next token of every document [N, V]."""
    found = [model(ids[None]).logits[0, :-1].double().log_softmax(-1) for ids in texts]
    return torch.cat(found).numpy()


def random_hybrid(shape: str, folder: Path) -> None:
    """Save a hybrid of random weights, ``WIDTHxBLOCKS``, every other block replaced."""
    width, blocks = (int(number) for number in shape.split("x"))
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=width, intermediate_size=256 * round(width * 8 / 3 / 256),
            num_hidden_layers=blocks, num_attention_heads=width // 64, num_key_value_heads=width // 256, head_dim=64,
            pad_token_id=0, bos_token_id=None, eos_token_id=4,
        )
    )  # fmt: skip
    mixers = ["mamba2" if block % 2 else ATTENTION for block in range(blocks)]
    hybridize(teacher, mixers, MixerConfig(name="mamba2")).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make every file and measure it; the record."""
    kinds = [kind_of(name) for name in args.types.split(",")]
    if args.random:
        checkpoint = folder / "random"
        random_hybrid(args.random, checkpoint)
    else:
        checkpoint, _ = locate(Path(args.target), args.stage)
    plain = folder / f"{PLAIN}.gguf"
    gguf.export(checkpoint, plain, "f32")
    columns = None
    if not args.random:
        model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
        mix = dict.fromkeys(FAMILIES, 1.0)
        rows = EmbeddedTraces(tokenizer, -(-args.importance // LENGTH), LENGTH, mix, TRAINING)
        columns = imatrix.measure(model, rows, "embedded", batch_size=8, pad=pad_id(tokenizer)).columns
    formats = []
    for kind in (PLAIN, *kinds):
        path = plain
        if kind != PLAIN:
            path = quantize(plain, folder / f"{kind}.gguf", kind, matrix=columns, threads=args.threads).path
        tensors = read_tensors(path)
        bits = 8 * sum(each.bytes for each in tensors) / sum(each.elements for each in tensors)
        (figures,) = measured([path], args, folder, cost=True)
        formats.append({"type": kind, "size_mib": path.stat().st_size / 2**20, "bits": bits, **figures})
        print(" ".join(f"{key}={value:.4g}" if isinstance(value, float) else str(value)
                       for key, value in formats[-1].items()), flush=True)  # fmt: skip
    record = {"formats": formats, "parameters": sum(each.elements for each in read_tensors(plain))}
    if not args.random:
        parts = [(only, kind) for only in COMPONENTS for kind in kinds]
        paths = [
            quantize(plain, folder / f"{only}-{kind}.gguf", kind, matrix=columns, only=only, threads=args.threads).path
            for only, kind in parts
        ]
        found = measured(paths, args, folder, cost=False)
        record["components"] = [
            {"component": only, "type": kind, **figures} for (only, kind), figures in zip(parts, found, strict=True)
        ]
    return record


def measured(paths: Sequence[Path], args: argparse.Namespace, folder: Path, *, cost: bool) -> list[dict[str, float]]:
    """The figures of files, from a process of their own."""
    command = [sys.executable, __file__, "--one", *map(str, paths), "--reference", str(folder / "reference.npy")]
    command += [f"--{name}={getattr(args, name)}" for name in ("threads", "repeats", "tokens", "questions", "random")]
    done = subprocess.run([*command, *["--cost"] * cost], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    formats = record["formats"]
    scored = "kl" in formats[0]
    head = ["format", "MiB", "bits a weight", "memory MiB", "prefill tokens/s", "decode tokens/s"]
    head += ["accuracy %", "choice %", "same %", "KL"] if scored else []
    rows = []
    for each in formats:
        row = [each["type"], f"{each['size_mib']:,.2f}", f"{each['bits']:.2f}", f"{each['memory_mib']:,.1f}"]
        row += [f"{each['prefill']:,.0f}", f"{each['decode']:,.0f}"]
        if scored:
            row += [f"{100 * each[key]:.1f}" for key in ("generative", "multiple_choice", "same")] + [
                f"{each['kl']:.1e}"
            ]
        rows.append(row)
    text = markdown(head, rows)
    if not scored:
        return text
    kinds = [each["type"] for each in formats[1:]]
    cells = {(each["component"], each["type"]): each for each in record["components"]}
    cells |= {("all", each["type"]): each for each in formats[1:]}
    rows = [
        [name, *(f"{cells[name, kind]['kl']:.1e} / {100 * cells[name, kind]['generative']:.1f}" for kind in kinds)]
        for name in (*COMPONENTS, "all")
    ]
    return f"{text}\n\n{markdown(['quantised alone: KL / accuracy %', *kinds], rows)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", nargs="?", help="RUN or CHECKPOINT")
    add("--stage", help="of a RUN")
    add("--random", default="", metavar="WIDTHxBLOCKS", help="random weights in its place")
    add("--types", default=TYPES, help="(default: %(default)s)")
    add("--tokens", type=int, default=16384, help="held-out tokens for KL (default: %(default)s)")
    add("--importance", type=int, default=65536, help="training tokens for the importance (default: %(default)s)")
    add("--questions", type=int, default=100, help="of each task (default: %(default)s)")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=5)
    add("--name", default="formats", help="of the record and of the place in --doc")
    add("--json", metavar="FILE", help="add the record to this file")
    add("--doc", metavar="FILE", help="write the tables between <!-- NAME --> and <!-- /NAME --> of this page")
    for name in ("--one", "--reference"):
        add(name, nargs="*" if name == "--one" else None, help=argparse.SUPPRESS)
    add("--cost", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    if args.one:
        figures_of(args.one, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        record = run(args, Path(folder))
    if args.json:
        path = Path(args.json)
        write_json(path, {**(read_json(path) if path.exists() else {}), args.name: record})
    text = tables(record)
    print(text)
    if args.doc:
        page, mark = Path(args.doc), f"<!-- {args.name} -->"
        pattern = re.compile(f"{mark}.*?<!-- /{args.name} -->", re.DOTALL)
        page.write_text(pattern.sub(lambda _: f"{mark}\n\n{text}\n\n<!-- /{args.name} -->", page.read_text()))


if __name__ == "__main__":
    main()
