"""The vLLM backend: what a server would reach, for models that vLLM knows (teachers; a hybrid only after an export).

vLLM offers no single step, so that a step's time is the difference of two generations. Its cache is its own, paged, and
taken whole when a model is opened; bytes of a cache are computed from the shape.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distill.errors import UserError, brief, out_of_memory
from distill.hybrid.surgery import is_hybrid
from distill.teacher import DTYPES, load_config, resolve
from eval.roofline import Shape

STEPS = 16
"""Tokens that a step's time is taken over."""
MEMORY = 0.9
"""Share of a GPU's memory that all models opened together may take."""
INSTALL = "pip install vllm (several GB, on a machine with a GPU), or take --backend hf"
TOKEN = 5  # of every prompt; any ordinary one


class Model:
    """A model inside vLLM as an `eval.backends.Engine`."""

    holds_cache = False

    def __init__(self, name: str, llm: Any, shape: Shape) -> None:
        from vllm import SamplingParams

        self.name, self.llm, self.shape, self.parameters = name, llm, shape, SamplingParams
        self.batch, self.device = 0, torch.device("cuda")
        self.dtype = torch.bfloat16 if shape.width == 2 else torch.float32

    def prepare(self, batch: int, capacity: int) -> None:
        """Nothing is allocated; MemoryError where vLLM's cache would not hold so many tokens at once."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        room = (cache.num_gpu_blocks or 0) * cache.block_size
        if batch * capacity > room:
            raise MemoryError(f"vLLM's cache holds {room:,} tokens, {batch * capacity:,} are asked for")
        self.batch = batch

    def step(self, context: int) -> float:
        """Mean of `STEPS` steps around ``context``."""
        prompt = max(context - STEPS // 2, 1)
        return max(self._seconds(self.batch, prompt, 1 + STEPS) - self._seconds(self.batch, prompt, 1), 0.0) / STEPS

    def generate(self, tokens: int) -> float:
        return self._seconds(self.batch, 1, tokens)

    def prefill(self, batch: int, tokens: int) -> float:
        return self._seconds(batch, tokens, 1)

    def cache_bytes(self, context: int) -> dict[str, int]:
        """Computed: pages are rounded up to whole blocks besides."""
        return {
            "kv_bytes": self.shape.kv_bytes(self.batch, context),
            "state_bytes": self.shape.state_bytes(self.batch),
        }

    def overhead_bytes(self) -> int:
        """0: vLLM sets its workspace aside before it sizes its cache."""
        return 0

    def release(self) -> None:
        """The cache is vLLM's for as long as the model is open."""

    def _seconds(self, batch: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [TOKEN] * prompt} for _ in range(batch)]
        sampling = self.parameters(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling_params=sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        made = [len(output.outputs[0].token_ids) for output in outputs]
        if made != [tokens] * batch:
            raise UserError(
                f"{self.name}: vLLM made {min(made, default=0)} of {tokens} tokens; is its max_model_len lower?"
            )
        return seconds


def check_installed() -> None:
    """UserError, which says what to do, where vLLM is not installed or there is no GPU."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"the backend vllm needs the package vllm, which is not installed: {INSTALL}")


def open_model(source: str, name: str, dtype: str, *, models: int = 1, length: int = 0) -> Model:
    """The model in a folder or on a hub, inside vLLM with an equal share of the memory for each of ``models``.

    Raises UserError where vLLM is not installed or cannot hold the model.
    """
    check_installed()
    config = load_config(source, convertible=False)
    if is_hybrid(config):
        raise UserError(
            f"vLLM does not know {name} ({config.model_type}), a hybrid of ours as it is: take --backend hf"
        )
    from vllm import LLM

    with torch.device("meta"):
        shape = Shape.of(AutoModelForCausalLM.from_config(config), DTYPES[dtype].itemsize)
    try:
        llm = LLM(
            model=resolve(source),
            dtype=dtype,
            gpu_memory_utilization=MEMORY / models,
            max_model_len=length + STEPS + 1 if length else None,
            enable_prefix_caching=False,  # prompts are all alike
        )
    except Exception as error:  # of vLLM's engine, its workers or CUDA
        if out_of_memory(error):
            raise
        raise UserError(f"vLLM cannot open {name}: {brief(error)}") from error
    return Model(name, llm, shape)
