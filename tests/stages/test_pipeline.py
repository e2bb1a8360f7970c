"""Every family of teachers through the whole chain, in shapes, dtypes and with tokenizers that real ones have."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from distill.data.families import FAMILIES, draw
from stages import pipeline
from stages.cli import main

CONFIG = """
name: tiny
teacher: {folder}/teacher
schedule: [1, 2]
run_dir: {folder}/run
threads: 1
dtype: {dtype}
mixer: {{name: {mixer}}}
data: {{source: {folder}/traces.jsonl, sequence_length: 128}}
score:
  loo: {{questions: 4}}
  mmr: {{steps: 1, heldout_tokens: 128}}
train: {{steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1, eval_rows: 2}}
measure:
  generative: [embedded_add]
  multiple_choice: []
  limit: 1
  max_new_tokens: 4
  throughput: {{batches: [2], contexts: [4], repeats: 1, output_tokens: 8}}
"""
TEACHERS: dict[str, tuple[str, str, torch.dtype, dict[str, Any]]] = {
    "llama": ("llama", "byte_level", torch.bfloat16, {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "smollm": ("llama", "byte_level", torch.float32, {"head_dim": None, "num_key_value_heads": 4}),
    "mistral": ("mistral", "metaspace", torch.float16, {"head_dim": 16}),
    "qwen2": ("qwen2", "byte_level", torch.float32, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "prepend", torch.bfloat16, {"hidden_size": 40}),
    "granite": ("granite", "unigram", torch.float32, {"head_dim": None}),
    "smollm3": ("smollm3", "byte_level", torch.float32, {}),
}
"""Family, tokenizer, stored dtype (bfloat16: computed in it, too) and keys of its config: MQA, MHA and GQA,
heads * head_dim beside the hidden size."""

MAMBA2 = ("smollm", "qwen3")
"""Those that become mamba2; the others mamba1."""


@pytest.fixture(params=list(TEACHERS))
def run(
    request: pytest.FixtureRequest,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[[str], Any],
    tmp_path: Path,
) -> Path:
    """A config for a run on a tiny random teacher in shards, its vocabulary padded, and a file of chats."""
    family, kind, dtype, keys = TEACHERS[request.param]
    tokenizer = make_tokenizer(kind)
    shape = {"num_hidden_layers": 3, "vocab_size": len(tokenizer) + 13, "bos_token_id": 0, "eos_token_id": 1}
    teacher = make_model(family, **{**shape, "pad_token_id": None, "initializer_range": 0.05, **keys})
    teacher.to(dtype).save_pretrained(tmp_path / "teacher", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rng = random.Random(0)
    chats = [{"messages": draw(name, rng, held_out=False).messages} for name in FAMILIES for _ in range(8)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    path = tmp_path / "tiny.yaml"
    computed = "bfloat16" if dtype == torch.bfloat16 else "float32"
    mixer = "mamba2" if request.param in MAMBA2 else "mamba1"
    path.write_text(CONFIG.format(folder=tmp_path, dtype=computed, mixer=mixer))
    return path


def test_every_family_goes_through_the_whole_chain(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "write_report", lambda run: run)  # the same whatever the teacher, and slow to draw
    folder = run.parent
    assert len(list((folder / "teacher").glob("*.safetensors"))) > 2, "the teacher is in shards"
    assert main(["run", str(run)]) == 0
    first, last = (folder / "run" / "stages" / name for name in ("01-H1-1", "02-H1-2"))
    scores = [json.loads((stage / "score/scores.json").read_text()) for stage in (first, last)]
    assert [score["scorer"] for score in scores] == ["loo", "mmr"]
    assert all(math.isfinite(row["score"]) for score in scores for row in score["blocks"])
    mixers = json.loads((last / "place/placement.json").read_text())["mixers"]
    assert mixers.count("attention") == 1 and len(set(mixers)) == 2
    for stage in (first, last):
        losses = json.loads((stage / "train/train.json").read_text())
        assert 0 < losses["eval_loss_start"] < math.inf and 0 < losses["eval_loss_end"] < math.inf
        measured = json.loads((stage / "measure/measure.json").read_text())
        assert measured["accuracy"] and measured["headline"]["tokens_per_second"] > 0
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    hybrid = AutoModelForCausalLM.from_pretrained(last / "train/checkpoint")
    assert hybrid.config.mixers == mixers
    assert hybrid.config.model_type == f"hybrid_{teacher.config.model_type}"
    tied = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == tied
    assert torch.equal(hybrid.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)
    (kept,) = (block for block, mixer in enumerate(mixers) if mixer == "attention")
    with safe_open(first / "swap/checkpoint/model.safetensors", framework="pt") as swapped:
        name = f"model.layers.{kept}.self_attn.q_proj.weight"
        assert torch.equal(swapped.get_tensor(name).float(), teacher.get_parameter(name)), (
            "whatever dtype it is stored in"
        )
    elsewhere = ["plan", str(run), f"run_dir={folder}/other", "plan.device_tflops=1"]
    assert main([*elsewhere, f"start_from.H1-2={first}/train/checkpoint"]) == 0
    capsys.readouterr()
    assert main([*elsewhere, f"teacher={last}/train/checkpoint"]) == 2
    assert "start_from.H1-h=FOLDER" in capsys.readouterr().err
