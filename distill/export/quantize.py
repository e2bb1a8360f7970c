"""A GGUF in fewer bits a weight, by llama.cpp's own quantiser: its mixtures, under its names.

llama.cpp decides what each tensor becomes: most of them the type that the mixture is named after, the more sensitive
ones a finer type; norms, convolutions and the SSM's ``ssm_a``, ``ssm_d`` and biases stay as they are. Rows that do not
fill its blocks of 256 weights fall back to a type with blocks of 32. ``only`` leaves everything outside one component
of the blocks as it was, so that the component's share of the loss can be measured.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError, brief, choose
from distill.storage import fresh_file

__all__ = ["COMPONENTS", "NEED_MATRIX", "TYPES", "Quantized", "kind_of", "quantize", "read_tensors"]

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S",
    "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S",
)  # fmt: skip
"""llama.cpp's mixtures for dense models, from the most bits to the fewest; but for Q2_0 and Q1_0, which the package
gguf cannot read."""
NEED_MATRIX = ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Those that llama.cpp makes only with an importance matrix."""
COMPONENTS = {
    "mamba": re.compile(r"blk\.\d+\.ssm_(in|out)\.weight"),
    "attention": re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.weight"),
    "mlp": re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.weight"),
}
PLAIN = ("F32", "F16", "BF16")
BLOCK = 256
"""Weights in a block of the K, I and T types; most others have blocks of 32."""
INSTALL = (
    "pip install 'distill-hybrid[gguf]' (llama-cpp-python is compiled on installation: docs/export.md has the flags)"
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF: ``type`` is ggml's name of it, ``columns`` the length of a row."""

    name: str
    type: str
    columns: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Quantized:
    """What a quantisation wrote."""

    path: Path
    kind: str
    tensors: list[Tensor]

    @property
    def bits(self) -> float:
        """Bits a weight over all tensors."""
        return 8 * sum(tensor.bytes for tensor in self.tensors) / sum(tensor.elements for tensor in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """ggml type -> number of tensors, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    @property
    def narrow(self) -> list[Tensor]:
        """Quantised tensors whose rows do not fill blocks of 256: what the mixture wants for them does not fit."""
        if ("_K" not in self.kind and not self.kind.startswith(("IQ", "TQ"))) or self.kind == "IQ4_NL":
            return []
        return [each for each in self.tensors if each.type not in PLAIN and each.columns % BLOCK]


def kind_of(name: str) -> str:
    """The mixture that a user means by ``name``; UserError for one that llama.cpp has not."""
    found = name.strip().upper()
    if found in PLAIN:
        raise UserError(f"{found} is not quantised: 'distill export --to gguf --dtype {found.lower()}' writes it")
    return choose("type", found, TYPES)


def library() -> Any:
    """The module ``llama_cpp``; UserError where it is not installed."""
    try:
        importlib.import_module("gguf")
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise UserError(f"'quantize' needs llama.cpp ({error}): {INSTALL}") from error


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors of a GGUF. UserError for what is none, or is cut short."""
    library()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever numpy says of a file that is too short or holds something else
        raise UserError(f"{path} is no GGUF, or is cut short: {brief(error)}") from error
    return [
        Tensor(each.name, each.tensor_type.name, int(each.shape[0]), int(each.n_elements), int(each.n_bytes))
        for each in reader.tensors
    ]


def quantize(
    source: Path,
    output: Path,
    kind: str,
    *,
    matrix: Mapping[str, np.ndarray] | None = None,
    only: str | None = None,
    threads: int = 0,
) -> Quantized:
    """Write ``source`` (a GGUF in F32, F16 or BF16) to ``output`` as the mixture ``kind``.

    ``matrix`` has the importance of each column [columns] of a tensor by its name (`distill.export.imatrix`); ``only``
    is one of `COMPONENTS`; ``threads`` 0: one a core.

    Raises UserError, before anything is written, for another kind of file, a type that needs a matrix where there is
    none, a matrix of another model, an ``output`` that exists and a disk without room.
    """
    lib = library()
    tensors = read_tensors(source)
    check(source, tensors, kind, matrix, only)
    options = Options(lib, kind, threads)
    if matrix is not None:
        options.weigh_by(matrix)
    if only is not None:
        options.keep([tensor for tensor in tensors if not COMPONENTS[only].fullmatch(tensor.name)])
    with fresh_file(output, room=options.run(source, output, dry=True)) as partial:
        options.run(source, partial)
        written = read_tensors(partial)
    return Quantized(output, kind, written)


def check(
    source: Path, tensors: Sequence[Tensor], kind: str, matrix: Mapping[str, np.ndarray] | None, only: str | None
) -> None:
    """Raise UserError for what llama.cpp would refuse after a while, or take for something else."""
    if other := {tensor.type for tensor in tensors} - set(PLAIN):
        raise UserError(
            f"{source} is quantised already ({', '.join(sorted(other))}): quantise the file in F32, F16 or BF16 that "
            "it came from"
        )
    if only is not None:
        pattern = COMPONENTS[choose("component", only, COMPONENTS)]
        if not any(pattern.fullmatch(tensor.name) for tensor in tensors):
            raise UserError(f"{source} has no {only} tensors: --only {only} would quantise nothing")
    if matrix is None:
        if kind in NEED_MATRIX:
            raise UserError(
                f"{kind} needs an importance matrix: quantise a RUN, a CHECKPOINT with --data, or give --imatrix FILE"
            )
        return
    for tensor in tensors:
        given = len(matrix.get(tensor.name, ()))
        wanted = any(pattern.fullmatch(tensor.name) for pattern in COMPONENTS.values())
        if given != tensor.columns and (given or wanted):
            raise UserError(
                f"the importance matrix has {given} columns for {tensor.name}, and {source} has {tensor.columns}: it "
                "is of another model"
            )


class Options:
    """What llama.cpp's quantiser is asked; holds the memory that its C structures point into."""

    def __init__(self, lib: Any, kind: str, threads: int) -> None:
        self.lib, self.kind = lib, kind
        self.c = lib.llama_model_quantize_default_params()
        self.c.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
        self.c.nthread = threads or len(os.sched_getaffinity(0))
        self.held: list[Any] = []

    def weigh_by(self, matrix: Mapping[str, np.ndarray]) -> None:
        """Weigh the error of each column by ``matrix``."""
        entries = (self.lib.llama_model_imatrix_data * (len(matrix) + 1))()  # the last one, of zeros, ends it
        for entry, (name, importance) in zip(entries, matrix.items(), strict=False):
            values = np.ascontiguousarray(importance, dtype=np.float32)
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            self.held.append(values)
        self.c.imatrix = ctypes.cast(entries, type(self.c.imatrix))
        self.held.append(entries)

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Leave these as they are."""
        overrides = (self.lib.llama_model_tensor_override * (len(tensors) + 1))()
        for override, tensor in zip(overrides, tensors, strict=False):
            override.pattern = f"^{re.escape(tensor.name)}$".encode()
            override.type = getattr(self.lib, f"GGML_TYPE_{tensor.type}")
        self.c.tt_overrides = ctypes.cast(overrides, type(self.c.tt_overrides))
        self.held.append(overrides)

    def run(self, source: Path, output: Path, *, dry: bool = False) -> int:
        """Quantise, or only (``dry``) see whether it can be done; returns the bytes of the tensors (0: not said)."""
        self.c.dry_run = dry
        with logged(self.lib) as lines:
            failed = self.lib.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(self.c))
        said = "".join(lines)
        if failed:
            why = re.findall(r"failed to quantize: (.+)", said)
            if why and "iostream" in why[-1]:
                raise RuntimeError(why[-1])  # a disk that is full: `distill.storage.full_disk_named` says so
            raise UserError(f"llama.cpp cannot quantise {source} to {self.kind}: {brief(why[-1] if why else said)}")
        size = re.findall(r"quant size\s*=\s*([\d.]+) MiB", said)
        return int(float(size[-1]) * 2**20) if size else 0


@contextmanager
def logged(lib: Any) -> Iterator[list[str]]:
    """What llama.cpp says in the meantime, in place of stderr."""
    lines: list[str] = []
    stopped: list[BaseException] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def note(level: int, text: bytes, user_data: Any) -> None:
        try:
            lines.append(text.decode(errors="replace"))
        except BaseException as error:  # of a signal's handler: C passes nothing on, so it is raised below
            stopped.append(error)

    before, its_data = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before), ctypes.byref(its_data))
    lib.llama_log_set(note, None)
    try:
        yield lines
    finally:
        lib.llama_log_set(before, its_data)
    if stopped:
        raise stopped[0]
