"""The llama.cpp backend: a GGUF file timed, and asked by lm-eval, as the checkpoint is that it came from.

Files that 'distill export --to gguf' wrote, quantised or not: they hold the config and the tokenizer of the hybrid.
Prompts are cut by that tokenizer, so that a difference of figures is one of the model. With dtype float32 keys and
values are in float32; with another in float16, as llama.cpp has them by default.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.export.gguf import ORIGIN
from distill.export.quantize import COMPONENTS, PLAIN, read_tensors
from distill.mixers import ATTENTION
from distill.teacher import DTYPES
from eval.backends.llama_runtime import Context, File, check_installed
from eval.roofline import FLOAT, Shape

__all__ = ["LanguageModel", "Model", "check_installed", "is_gguf", "open_model", "read_config", "read_tokenizer"]

TOKEN = 5  # of every prompt that is timed; any ordinary one


def is_gguf(target: str | Path) -> bool:
    """Whether a name on the command line is one of a GGUF file."""
    return Path(target).suffix == ".gguf"


def read_config(file: File) -> Any:
    """The hybrid's config; UserError for a file that tells of none."""
    keys = file.keys(ORIGIN)
    if not isinstance(keys, dict):
        raise UserError(
            f"{file.path} does not say which hybrid it is: measured are files that 'distill export --to gguf' wrote, "
            "and what was quantised from them"
        )
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def read_tokenizer(file: File) -> Any:
    """The tokenizer of the checkpoint that the file came from."""
    core = Tokenizer.from_str(file.value("tokenizer.huggingface.json"))
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        place = file.value(f"tokenizer.ggml.{key}_token_id")
        if place:
            named[f"{name}_token"] = core.id_to_token(int(place))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=file.value("tokenizer.chat_template") or None,
        clean_up_tokenization_spaces=False,
        name_or_path=str(file.path),
        **named,
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def kind_of(file: File) -> str:
    """The type of the file's matrices, as llama.cpp calls it: F32, Q4_K_M; with the components that have it where
    others were left as they were: Q4_K_M-mamba."""
    from gguf import LlamaFileType

    name = LlamaFileType(int(file.value("general.file_type") or 0)).name
    name = name.removeprefix("ALL_").removeprefix("MOSTLY_")
    types: dict[str, set[str]] = {}
    for tensor in read_tensors(file.path) if name not in PLAIN else ():
        for component, pattern in COMPONENTS.items():
            if pattern.fullmatch(tensor.name):
                types.setdefault(component, set()).add(tensor.type)
    smaller = [component for component, found in types.items() if not found <= set(PLAIN)]
    return "-".join([name, *(sorted(smaller) if len(smaller) < len(types) else [])])


@dataclass(frozen=True)
class StoredShape(Shape):
    """The shape of a model as a GGUF file holds it: ``width`` is what a weight takes on average."""

    stored: int = 0
    """Bytes of the file's tensors."""
    cache_width: int = FLOAT
    """Bytes of a key or value."""

    @property
    def weight_bytes(self) -> int:
        return self.stored

    def kv_bytes(self, batch: int, context: int) -> int:
        return 2 * self.attention * batch * context * self.key_value * self.cache_width

    def state_bytes(self, batch: int) -> int:
        """As llama.cpp has them: twice the heads, all in float32; of 3 K-1 rows of the convolution x stands twice."""
        return batch * FLOAT * sum(2 * scan + conv * 4 // 3 for scan, conv in self.states)


def shape_of(file: File, config: Any, dtype: str) -> StoredShape:
    """What time and memory of the file depend on."""
    with torch.device("meta"):
        shape = Shape.of(AutoModelForCausalLM.from_config(config), 1)
    values = {key: getattr(shape, key) for key in shape.__dataclass_fields__}
    width: Any = file.weight_bytes / shape.parameters  # on average, so no whole number
    cache = FLOAT if dtype == "float32" else 2
    return replace(StoredShape(**values, stored=file.weight_bytes, cache_width=cache), width=width)


class LanguageModel:
    """A GGUF file as `eval.lm` asks a transformers model: logits of texts [B, T, V], and answers."""

    def __init__(self, file: File, config: Any, threads: int, dtype: str = "float32") -> None:
        self.file, self.config, self.threads, self.dtype = file, config, threads, DTYPES[dtype]
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id)
        self.context: Context | None = None

    def num_parameters(self) -> int:
        """Parameters of the hybrid; the file holds those of its SSM heads twice."""
        return shape_of(self.file, self.config, "float32").parameters

    def room(self, sequences: int, capacity: int) -> Context:
        """An empty context of at least this size."""
        held = self.context
        if held is None or held.sequences < sequences or held.capacity < capacity:
            self.context = None  # before another is made
            whole = self.dtype == torch.float32
            self.context = Context(self.file, sequences, capacity, threads=self.threads, whole=whole)
        assert self.context is not None
        self.context.clear()
        return self.context

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Logits [B, T, V] of texts [B, T]; padding stands behind."""
        context = self.room(*input_ids.shape)
        logits = context.read(input_ids.tolist(), last=False)
        return SimpleNamespace(logits=torch.from_numpy(np.stack(logits)))

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        logits_processor: Any,
        stopping_criteria: Any,
    ) -> torch.Tensor:
        """As transformers' own: the likeliest token of what the processors leave, until every row has ended. Prompts
        are padded on the left; behind its end a row has padding."""
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        room = generation_config.max_new_tokens
        context = self.room(len(prompts), max(map(len, prompts)) + room)
        ends = torch.tensor(generation_config.eos_token_id)
        scores = torch.from_numpy(np.concatenate(context.read(prompts)))
        going = list(range(len(prompts)))
        for step in range(room):
            if step:
                context_rows = {row: int(input_ids[row, -1]) for row in going}
                scores[going] = torch.from_numpy(context.step(context_rows))
            chosen = logits_processor(input_ids, scores).argmax(-1)
            done = torch.ones(len(prompts), dtype=torch.bool)
            done[going] = False
            chosen[done] = generation_config.pad_token_id
            input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
            ended = stopping_criteria(input_ids, None) | torch.isin(chosen, ends) | done
            going = [row for row in going if not bool(ended[row])]
            if not going:
                break
        return input_ids


class Model:
    """A GGUF file as an `eval.backends.Engine`."""

    holds_cache = False

    def __init__(self, name: str, file: File, shape: StoredShape, threads: int, dtype: str) -> None:
        self.name, self.file, self.shape, self.threads = name, file, shape, threads
        self.dtype, self.device = DTYPES[dtype], torch.device("cpu")
        self.context: Context | None = None
        self.marks: list[Any] = []
        self.marked = 0

    @property
    def prepared(self) -> Context:
        assert self.context is not None, "prepare comes first"
        return self.context

    def _room(self, batch: int, capacity: int) -> Context:
        whole = self.dtype == torch.float32
        return Context(self.file, batch, capacity, threads=self.threads, whole=whole)

    def prepare(self, batch: int, capacity: int) -> None:
        self.release()
        self.context = self._room(batch, capacity)

    def step(self, context: int) -> float:
        """Up to the step the cache is filled by reading a prompt, which is not timed and, of a smaller context than
        the last, begins anew."""
        held = self.prepared
        if not self.marks or self.marked != context - 1:
            if self.marked > context - 1 or not self.marks:
                held.clear()
            if missing := context - 1 - held.filled[0]:
                held.read([[TOKEN] * missing] * held.sequences)
            self.marks, self.marked = held.mark() if context > 1 else [], context - 1
        began = time.perf_counter()
        held.step(dict.fromkeys(range(held.sequences), TOKEN)).argmax(-1)
        seconds = time.perf_counter() - began
        if self.marks:
            held.back(self.marks, context - 1)
        else:
            held.clear()
        return seconds

    def generate(self, tokens: int) -> float:
        held = self.prepared
        held.clear()
        self.marks = []
        chosen = [TOKEN] * held.sequences
        began = time.perf_counter()
        for _ in range(tokens):
            chosen = held.step(dict(enumerate(chosen))).argmax(-1).tolist()
        return time.perf_counter() - began

    def prefill(self, batch: int, tokens: int) -> float:
        room = self._room(batch, tokens)
        began = time.perf_counter()
        room.read([[TOKEN] * tokens] * batch)
        return time.perf_counter() - began

    def cache_bytes(self, context: int) -> dict[str, int]:
        """Computed: llama.cpp rounds the tokens of a sequence up to 256 besides."""
        batch = self.prepared.sequences
        return {"kv_bytes": self.shape.kv_bytes(batch, context), "state_bytes": self.shape.state_bytes(batch)}

    def overhead_bytes(self) -> int:
        """0: llama.cpp takes its workspace when the context is made, and does not say how much through the package."""
        return 0

    def release(self) -> None:
        self.context, self.marks, self.marked = None, [], 0


def open_model(source: str, name: str, dtype: str, *, models: int = 1, length: int = 0) -> Model:
    """The model in a GGUF file, ready to be timed on as many threads as torch has.

    Raises UserError where llama-cpp-python is not installed, for what is no GGUF file, and for one that does not tell
    which hybrid it holds. (How many models there are, and how long the sequences will be, matters to others.)
    """
    check_installed()
    if not is_gguf(source):
        raise UserError(f"the backend llama.cpp takes a GGUF file, {name} is none: distill export {source} --to gguf")
    file = File(Path(source).expanduser())
    return Model(name, file, shape_of(file, read_config(file), dtype), torch.get_num_threads(), dtype)


def placement_of(config: Any) -> tuple[int, int]:
    """Replaced blocks, and all."""
    return sum(mixer != ATTENTION for mixer in config.mixers), config.num_hidden_layers
