"""llama.cpp through its C interface: a GGUF file opened, and decoded token by token for several sequences at once.

The package's ``Llama`` holds one sequence and cannot roll a recurrent state back.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError, brief

INSTALL = "pip install 'distill-hybrid[gguf]'; docs/export.md says with which CMAKE_ARGS"
MAGIC = b"GGUF"
CHUNK = 512
"""Tokens of a call that reads prompts."""
ERROR = 4  # the level of llama.cpp's log that says why something failed
STATES_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: of a sequence, what cannot be rolled back
_told: list[str] = []


def check_installed() -> None:
    """UserError, which says what to do, where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError(f"a GGUF file needs the package llama-cpp-python, which is not installed: {INSTALL}")


def check_file(path: Path) -> None:
    """UserError for what is no GGUF file."""
    if not path.is_file():
        raise UserError(f"no file {path}: give a GGUF file, such as 'distill export --to gguf' writes")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")


def library() -> Any:
    """The package, its log kept to what went wrong."""
    check_installed()
    import llama_cpp

    if not hasattr(library, "log"):

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def log(level: int, text: bytes, _: Any) -> None:
            if level == ERROR:
                _told.append(text.decode(errors="replace").strip())

        library.log = log  # type: ignore[attr-defined]  # llama.cpp keeps no reference
        llama_cpp.llama_log_set(log, None)
        llama_cpp.llama_backend_init()
    return llama_cpp


class File:
    """A GGUF file, opened; with ``words_only`` its weights are not read."""

    def __init__(self, path: Path, *, words_only: bool = False) -> None:
        check_file(path)
        self.path, self.lib = path, library()
        _told.clear()
        params = self.lib.llama_model_default_params()
        params.vocab_only = words_only
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise UserError(f"llama.cpp cannot read {path}: {brief(_told[0] if _told else 'it does not say why')}")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.words = self.lib.llama_vocab_n_tokens(self.vocabulary)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            self.lib.llama_model_free(self.model)
            self.model = None

    def value(self, key: str) -> str:
        """A value of the file's, as text; empty where it has none."""
        size = self.lib.llama_model_meta_val_str(self.model, key.encode(), None, 0)
        if size < 0:
            return ""
        buffer = ctypes.create_string_buffer(size + 1)
        self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    def keys(self, key: str) -> Any:
        """A value of the file's that is JSON; None where it has none."""
        text = self.value(key)
        return json.loads(text) if text else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.lib.llama_model_size(self.model))

    def tokenize(self, text: str, *, special: bool = True, ends: bool = False) -> list[int]:
        """llama.cpp's own reading of a text; ``special``: marks in it are tokens, ``ends``: with what begins and ends
        a text."""
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), ids, room, ends, special)
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """llama.cpp's own text of tokens, as its programs print it piece by piece."""
        found = bytearray()
        for token in ids:
            size = -self.lib.llama_token_to_piece(self.vocabulary, token, None, 0, 0, special)
            buffer = ctypes.create_string_buffer(max(size, 1))
            self.lib.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, special)
            found += buffer.raw[:size]
        return found.decode(errors="replace")


class Context:
    """Room for ``sequences`` of ``capacity`` tokens each; keys and values in float32, or as llama.cpp has them (f16).

    Raises MemoryError where it cannot be had.
    """

    def __init__(self, file: File, sequences: int, capacity: int, *, threads: int, whole: bool = True) -> None:
        lib = self.lib = file.lib
        self.file, self.sequences, self.capacity = file, sequences, capacity
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * -(-capacity // 256) * 256  # shared out equally, and rounded to 256
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = max(CHUNK, sequences)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        if whole:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _told.clear()
        self.context = lib.llama_init_from_model(file.model, params)
        if not self.context:
            raise MemoryError(brief(_told[-1] if _told else f"no room for {sequences} sequences of {capacity} tokens"))
        self.memory = lib.llama_get_memory(self.context)
        self.room = int(params.n_batch)
        self.batch = lib.llama_batch_init(self.room, 0, 1)
        self.ids, self.places, self.wanted = (
            np.ctypeslib.as_array(field, shape=(self.room,))
            for field in (self.batch.token, self.batch.pos, self.batch.logits)
        )
        np.ctypeslib.as_array(self.batch.n_seq_id, shape=(self.room,))[:] = 1
        self.filled = [0] * sequences

    def __del__(self) -> None:
        if getattr(self, "batch", None) is not None:
            self.lib.llama_batch_free(self.batch)
        if getattr(self, "context", None):
            self.lib.llama_free(self.context)
            self.context = None

    def clear(self) -> None:
        """Forget every sequence."""
        self.lib.llama_memory_clear(self.memory, True)
        self.filled = [0] * self.sequences

    def step(self, rows: dict[int, int]) -> np.ndarray[Any, Any]:
        """One token for each sequence of ``rows`` (sequence -> token); returns logits [len(rows), V]."""
        for i, (row, token) in enumerate(rows.items()):
            self._put(i, row, token, self.filled[row], wanted=True)
            self.filled[row] += 1
        return self._decode(len(rows), len(rows))

    def read(self, rows: Sequence[Sequence[int]], *, last: bool = True) -> list[np.ndarray[Any, Any]]:
        """Prompts, one for each sequence; returns logits [1, V] of the ``last`` tokens, or [T, V] of all."""
        queue = [
            (row, place, token, not last or place == len(ids) - 1)
            for row, ids in enumerate(rows)
            for place, token in enumerate(ids)
        ]
        found: list[list[np.ndarray[Any, Any]]] = [[] for _ in rows]
        for start in range(0, len(queue), self.room):
            part = queue[start : start + self.room]
            for i, (row, place, token, wanted) in enumerate(part):
                self._put(i, row, token, self.filled[row] + place, wanted=wanted)
            asked = [row for row, _, _, wanted in part if wanted]
            logits = self._decode(len(part), len(asked))
            for row in dict.fromkeys(asked):
                found[row].append(logits[[i for i, each in enumerate(asked) if each == row]])
        for row, ids in enumerate(rows):
            self.filled[row] += len(ids)
        return [np.concatenate(each) for each in found]

    def mark(self) -> list[Any]:
        """What `back` needs to take sequences back to here: their recurrent states (attention needs none)."""
        marks = []
        for row in range(self.sequences):
            size = self.lib.llama_state_seq_get_size_ext(self.context, row, STATES_ONLY)
            buffer = (ctypes.c_uint8 * size)()
            self.lib.llama_state_seq_get_data_ext(self.context, buffer, size, row, STATES_ONLY)
            marks.append(buffer)
        return marks

    def back(self, marks: list[Any], filled: int) -> None:
        """Take every sequence back to the ``filled`` tokens at which ``marks`` were taken."""
        for row, buffer in enumerate(marks):
            self.lib.llama_state_seq_set_data_ext(self.context, buffer, len(buffer), row, STATES_ONLY)
            if not self.lib.llama_memory_seq_rm(self.memory, row, filled, -1):
                raise RuntimeError("llama.cpp cannot take a sequence back")
        self.filled = [filled] * self.sequences

    def _put(self, i: int, row: int, token: int, place: int, *, wanted: bool) -> None:
        if place >= self.capacity:  # llama.cpp would end the process
            raise ValueError(f"the context holds {self.capacity} tokens of a sequence, {place + 1} were given")
        self.ids[i], self.places[i], self.wanted[i] = token, place, wanted
        self.batch.seq_id[i][0] = row

    def _decode(self, tokens: int, outputs: int) -> np.ndarray[Any, Any]:
        """Run the batch; returns logits [outputs, V], a copy."""
        self.batch.n_tokens = tokens
        code = self.lib.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(
                f"llama.cpp cannot decode (code {code}): {brief(_told[-1] if _told else 'no reason given')}"
            )
        if not outputs:
            return np.empty((0, self.file.words), np.float32)
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(outputs, self.file.words)).copy()
