"""The frozen teacher: found, checked before its weights load, and asked for hidden states only."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill.errors import UserError
from distill.hybrid.model import head_input
from distill.hybrid.surgery import check_convertible

EMBEDDED = "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(name: str) -> str:
    """The folder or hub name behind ``embedded``, a path, or a hub name."""
    if name == EMBEDDED:
        folder = Path(str(resources.files("distill") / "data" / "teacher"))
        if not (folder / "config.json").is_file():
            raise UserError(f"the embedded teacher is missing from {folder}; 'make teacher' trains it")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name} is no model folder: it has no config.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise UserError(f"no model '{name}': give a folder with config.json, a hub name (owner/model), or '{EMBEDDED}'")
    return str(path) if path.is_dir() else name


def load_config(name: str, *, convertible: bool = True) -> Any:
    """A model's config, before any weight is read.

    Raises UserError where it cannot be had, or (``convertible``) where no hybrid can be made of it.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the config of '{name}': {str(error).splitlines()[0]}") from error
    if convertible:
        check_convertible(config)
    return config


def load_model(name: str, dtype: str = "float32", *, convertible: bool = True) -> Any:
    """A causal LM in eval mode on the GPU if there is one; safetensors only.

    Raises UserError for anything that cannot be loaded.
    """
    load_config(name, convertible=convertible)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            resolve(name), dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # torch, safetensors and hub errors share no base; each means it cannot be loaded
        raise UserError(f"cannot load the weights of '{name}': {str(error).splitlines()[0]}") from error
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in found[kind])
    if wrong:
        raise UserError(f"the weights of '{name}' are not those of its config: {len(wrong)} wrong, such as {wrong[0]}")
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; UserError where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of '{name}': {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Teacher:
    """A frozen model: ``hidden(batch)`` gives what ``head``, the LM head, makes its logits of, [B, T, E]."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        return self.model.lm_head

    @torch.no_grad()
    def hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states [B, T, E] of packed rows (no cache: it would join the documents)."""
        return head_input(self.model, self.model.model(**inputs, use_cache=False).last_hidden_state)


class RememberingTeacher(Teacher):
    """A teacher that answers a batch it has seen before from memory, where the same batches come many times.

    Args:
        limit: bytes of hidden states to keep; what comes after is computed each time.
    """

    def __init__(self, model: Any, limit: int = 1 << 31) -> None:
        super().__init__(model)
        self.room = limit
        self.seen: dict[bytes, torch.Tensor] = {}

    def hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Final hidden states [B, T, E] of packed rows."""
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(inputs[name].cpu().contiguous().numpy().tobytes())
        key = digest.digest()
        if key not in self.seen:
            hidden = super().hidden(inputs)
            if hidden.nbytes > self.room:
                return hidden
            self.room -= hidden.nbytes
            self.seen[key] = hidden
        return self.seen[key]
