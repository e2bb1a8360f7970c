"""The frozen teacher: found, checked before its weights load, and asked for hidden states only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from distill.errors import UserError, brief, out_of_memory
from distill.hybrid.model import FAMILIES, head_input
from distill.hybrid.surgery import check_convertible, is_hybrid
from distill.records import read_json
from distill.weights import headers

EMBEDDED = "embedded"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
"""Keys of config.json that say how large a decoder is."""
PROBE = "Sort 5410,  it's\n\n\t\u00e9 \u4f60 1.5"
"""A text that tokenizers of different kinds cut differently."""
_TRUSTED: set[str] = set()  # models whose own code may be run: those a config or option of this process named
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve(name: str) -> str:
    """The folder or hub name behind ``embedded``, a path, or a hub name."""
    if name == EMBEDDED:
        folder = Path(str(resources.files("distill") / "data" / "teacher"))
        if not (folder / "config.json").is_file():
            raise UserError(f"the embedded teacher is missing from {folder}; 'make teacher' trains it")
        return str(folder)
    path = Path(name).expanduser() if name.strip() else Path(" ")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name} is no model folder: it has no config.json")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise UserError(f"no model '{name}': give a folder with config.json, a hub name (owner/model), or '{EMBEDDED}'")
    return str(path) if path.is_dir() else name


def trust_code(name: str, allowed: bool) -> None:
    """Say whether Python code that comes with the model ``name`` may be run when it is loaded; the default is no,
    and it is never asked for any other model."""
    (_TRUSTED.add if allowed else _TRUSTED.discard)(resolve(name))


def load_config(name: str, *, convertible: bool = True) -> Any:
    """A model's config, before any weight is read.

    Raises UserError where it cannot be had, where the model needs code of its own that is not trusted, or
    (``convertible``) where no hybrid can be made of it.
    """
    folder = resolve(name)
    try:
        keys, _ = PreTrainedConfig.get_config_dict(folder)
    except Exception as error:  # of the hub, of its client or of the file: each means that there is no config
        raise _unloadable("config", name, error) from error
    if not isinstance(keys, dict) or not isinstance(keys.get("model_type"), str):
        raise UserError(f"'{name}' is no model: its config.json names no model_type")
    _refuse_code(name, keys, "config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=folder in _TRUSTED)
    except Exception as error:  # transformers' validators raise errors of many kinds; each means a bad key
        raise _unloadable("config", name, error) from error
    if convertible:
        check_convertible(config)
        check_shape(name, config)
    return config


def check_files(name: str) -> None:
    """Raise UserError where the weights of a model folder are not safetensors, missing, cut short or damaged in their
    headers; of a model on the hub, nothing is known before it is loaded."""
    folder = Path(resolve(name))
    if folder.is_dir():
        headers(folder)


def load_model(name: str, dtype: str = "float32", *, convertible: bool = True, device: str = "") -> Any:
    """A causal LM in eval mode, on ``device`` or else on the GPU if there is one; safetensors only.

    Raises UserError for anything that cannot be loaded, and for weights that are not finite.
    """
    load_config(name, convertible=convertible)
    check_files(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve(name)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in ``found``, and named below
            trust_remote_code=folder in _TRUSTED,
        )
    except Exception as error:  # torch, safetensors and hub errors share no base; each means it cannot be loaded
        if out_of_memory(error):
            raise
        raise _unloadable("weights", name, error) from error
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [
        f"{key}: {list(have)} in the file, {list(want)} wanted" for key, have, want in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise UserError(f"the weights of '{name}' are not those of its config: {len(wrong)} wrong, such as {wrong[0]}")
    for key, tensor in model.named_parameters():
        # a sum is one pass without a copy; only where it is not finite is every value looked at
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise UserError(
                f"the weights of '{name}' hold NaN or infinite values, such as in {key}: the file is damaged, or its "
                "training diverged; take an earlier checkpoint"
            )
    if is_hybrid(model.config):
        vars(model.config).pop("auto_map", None)  # code that came along was not run, and is not saved with the model
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; UserError where it has none, or a broken one."""
    folder = resolve(name)
    if Path(folder).is_dir():
        if not any((Path(folder) / file).is_file() for file in TOKENIZERS):
            raise UserError(f"'{name}' has no tokenizer: none of {', '.join(TOKENIZERS)} is in the folder")
        if (settings := Path(folder) / "tokenizer_config.json").is_file():
            keys = read_json(settings)
            _refuse_code(name, keys if isinstance(keys, dict) else {}, settings.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=folder in _TRUSTED)
        if _reads_otherwise(tokenizer, folder):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    except Exception as error:  # tokenizers raises plain Exception
        raise _unloadable("tokenizer", name, error) from error
    return tokenizer


def _reads_otherwise(tokenizer: Any, folder: str) -> bool:
    """Whether a tokenizer cuts text otherwise than its own tokenizer.json: some classes of transformers put their
    own pre-tokenizer and normaliser in the file's place (``Qwen2Tokenizer``, for any tokenizer of a qwen2 model)."""
    file = cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not type(tokenizer).__module__.startswith("transformers."):
        return False
    core = Tokenizer.from_file(file)
    core.no_padding()
    core.no_truncation()
    return core.encode(PROBE, add_special_tokens=False).ids != tokenizer.encode(PROBE, add_special_tokens=False)


def check_tokenizer(name: str, vocabulary: int, *, chats: bool) -> None:
    """Raise UserError where the model's tokenizer knows tokens beyond the ``vocabulary`` of its embedding or has no end
    token, or where there are ``chats`` to render and its template is not there or fails.

    Templates run in jinja's sandbox (transformers' ``ImmutableSandboxedEnvironment``).
    """
    tokenizer = load_tokenizer(name)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer of '{name}' has ids up to {largest}, its model {vocabulary} embeddings (vocab_size): it is "
            "the tokenizer of another model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{name}' names no end token, so that no answer would ever end: give eos_token in its "
            "tokenizer_config.json"
        )
    if not chats:
        return
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of '{name}' has no chat template, which messages and the embedded traces need: add "
            "chat_template.jinja to its folder, or give data with prompt and completion"
        )
    try:
        turns = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"})
        tokenizer.apply_chat_template(list(turns), tokenize=False)
    except Exception as error:  # whatever a template calls can fail
        raise UserError(f"the chat template of '{name}' cannot render a chat: {brief(error)}") from error


def _refuse_code(name: str, keys: Mapping[str, Any], file: str) -> None:
    """Raise UserError where a model brings code of its own, unless it is trusted; for a hybrid of ours transformers
    takes our own code, whatever lies beside its weights (``distill package --code``)."""
    ours = file == "config.json" and keys.get("model_type") in {config.model_type for config, _ in FAMILIES.values()}
    if keys.get("auto_map") and not ours and resolve(name) not in _TRUSTED:
        raise UserError(
            f"'{name}' brings Python code of its own (auto_map in its {file}), which is not run: read the code, and if "
            "you trust it set trust_remote_code=true (of distill traces: --trust-remote-code); if the architecture is "
            "a common one, remove auto_map"
        )


def check_shape(name: str, config: Any) -> None:
    """Raise UserError for a shape that no model could have."""
    for key in SHAPE:
        value = getattr(config, key, 1)  # not every family has every key
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"the config of '{name}': {key}={value!r} must be a whole number above 0")
    heads, groups = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", 1)
    if heads % groups:
        raise UserError(f"the config of '{name}': {heads} query heads cannot share {groups} key-value heads")


def _unloadable(what: str, name: str, error: Exception) -> UserError:
    """The message for a config, weights or a tokenizer that a library could not load."""
    reason = f"no key {error}" if isinstance(error, KeyError) else brief(error)
    if Path(resolve(name)).is_dir():
        return UserError(f"cannot load the {what} of '{name}': {reason}")
    if "connect" in reason or "offline" in reason:
        reason = "the hub cannot be reached, and it is not in the cache"
    return UserError(
        f"'{name}' is no folder here, and as a hub name it cannot be had: {reason}\n"
        "check the name; without a network, download it before or give its folder"
    )


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
