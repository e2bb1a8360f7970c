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
    """A folder of mixers. What was made from other inputs than ``fingerprint`` says is not seen."""

    folder: Path
    fingerprint: str

    def path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"

    def read(self, block: int) -> tuple[dict[str, Tensor], tuple[float, float]] | None:
        """The weights of a block's mixer and its errors at first and at last; None where it is not here."""
        path = self.path(block)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self.fingerprint:
                    return None
                first, last = json.loads(about["errors"])
                return {name: file.get_tensor(name) for name in file.keys()}, (first, last)  # noqa: SIM118
        except SafetensorError:  # torn: it is made again
            return None

    def write(self, block: int, mixer: nn.Module, errors: tuple[float, float]) -> None:
        """Keep a mixer; the file is whole or not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{block:03d}.{os.getpid()}"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in mixer.state_dict().items()}
        save_file(tensors, temporary, {"fingerprint": self.fingerprint, "errors": json.dumps(errors)})
        os.replace(temporary, self.path(block))
