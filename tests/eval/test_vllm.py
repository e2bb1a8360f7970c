"""The vLLM backend on a stand-in with vLLM's own interface (0.10 to 0.23, as its latency benchmark uses it)."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.surgery import hybridize
from eval.backends import vllm


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool


class Clock:
    """Seconds that pass only where the stand-in works."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class LLM:
    """A prompt's token costs 1 ms, a generated one 10 ms and 0.1 ms for every token before it."""

    made: list[dict[str, Any]]
    stops_at = 10**9

    def __init__(self, **options: Any) -> None:
        LLM.made.append(options)
        cache = types.SimpleNamespace(num_gpu_blocks=100, block_size=16)
        self.llm_engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(cache_config=cache))

    def generate(self, prompts: Any, *, sampling_params: SamplingParams, use_tqdm: bool) -> list[Any]:
        assert sampling_params.ignore_eos and not sampling_params.detokenize and not use_tqdm
        tokens = min(sampling_params.max_tokens, LLM.stops_at)
        prompt = len(prompts[0]["prompt_token_ids"])
        CLOCK.now += 1e-3 * prompt + sum(1e-2 + 1e-4 * (prompt + done) for done in range(1, tokens))
        output = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[7] * tokens)])
        return [output] * len(prompts)


CLOCK = Clock()


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(vllm, "time", CLOCK)
    LLM.made, LLM.stops_at = [], 10**9


def test_a_model_inside_vllm(teacher_folder: Path) -> None:
    engine = vllm.open_model(str(teacher_folder), "teacher", "bfloat16", models=3, length=512)
    (options,) = LLM.made
    assert options["model"] == str(teacher_folder) and options["dtype"] == "bfloat16"
    assert options["gpu_memory_utilization"] == pytest.approx(0.3) and options["max_model_len"] > 512
    assert options["enable_prefix_caching"] is False, "all prompts are alike"
    engine.prepare(4, 100)
    for context in (100, 400):
        assert engine.step(context) == pytest.approx(1e-2 + 1e-4 * context, rel=0.01), "the mean of steps around it"
    assert engine.prefill(4, 200) == pytest.approx(0.2)
    assert engine.generate(50) == pytest.approx(1e-3 + sum(1e-2 + 1e-4 * done for done in range(2, 51)))
    assert engine.cache_bytes(100) == {"kv_bytes": 4 * 2 * 4 * 2 * 32 * 100 * 2, "state_bytes": 0}
    assert not engine.holds_cache


def test_more_tokens_than_its_cache_holds(teacher_folder: Path) -> None:
    engine = vllm.open_model(str(teacher_folder), "teacher", "bfloat16")
    with pytest.raises(MemoryError, match="holds 1,600 tokens, 1,700 are asked for"):
        engine.prepare(17, 100)


def test_generations_that_stop_early_are_no_measurement(teacher_folder: Path) -> None:
    engine = vllm.open_model(str(teacher_folder), "teacher", "bfloat16")
    engine.prepare(2, 100)
    LLM.stops_at = 20
    with pytest.raises(UserError, match="made 20 of 50 tokens"):
        engine.generate(50)


def test_a_hybrid_is_refused_before_an_engine_starts(llama: Any, tmp_path: Path) -> None:
    hybridize(llama, ["mamba1"] + ["attention"] * 3, MixerConfig()).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UserError, match="vLLM does not know H1.*--backend hf"):
        vllm.open_model(str(tmp_path / "hybrid"), "H1-1/4", "bfloat16")
    assert LLM.made == []


def test_what_vllm_cannot_open(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, **options: Any) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(LLM, "__init__", fails)
    with pytest.raises(UserError, match="vLLM cannot open teacher: Engine core initialization failed"):
        vllm.open_model(str(teacher_folder), "teacher", "bfloat16")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install vllm"):
        vllm.check_installed()
