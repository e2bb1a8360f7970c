"""Mixers kept beside the scores that were taken with them: a safetensors file a block, with what it was made from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = "aligned"
"""Where a score step keeps its aligned mixers."""


@dataclass(frozen=True)
class MixerStore:
    """Mixers in ``folder``, in a folder of it named by ``fingerprint``: what was made from other inputs is not seen."""

    folder: Path
    fingerprint: str

    def path(self, block: int) -> Path:
        return self.folder / self.fingerprint / f"block-{block:03d}.safetensors"

    def read(self, block: int) -> tuple[dict[str, Tensor], tuple[float, float]] | None:
        """The weights of a block's mixer and its errors at first and at last; None where it is not here."""
        path = self.path(block)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                first, last = json.loads(file.metadata()["errors"])
                return {name: file.get_tensor(name) for name in file.keys()}, (first, last)  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError):  # torn, or another file: it is made again
            return None

    def write(self, block: int, mixer: nn.Module, errors: tuple[float, float]) -> None:
        """Keep a mixer; the file is whole or not there."""
        path = self.path(block)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in mixer.state_dict().items()}
        save_file(tensors, temporary, {"errors": json.dumps(errors)})
        os.replace(temporary, path)
