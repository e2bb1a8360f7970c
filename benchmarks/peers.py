"""Others' reference code to measure against, loaded without CUDA and without a place in this environment.

mamba-ssm cannot be imported without CUDA, but its reference functions are plain PyTorch. ``make bench-mixers`` puts its
sources (pinned, not built) into a folder beside the environment; here single files of it are run with stand-ins for
the packages that they import and do not use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

PEERS = Path(os.environ.get("PEERS", ".venv/peers"))
STAND_INS = (
    "triton", "triton.language", "selective_scan_cuda", "mamba_ssm", "mamba_ssm.utils", "mamba_ssm.utils.torch",
    "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.softplus",
)  # fmt: skip


def mamba_ssm(file: str) -> ModuleType:
    """The module in ``mamba_ssm/FILE``; exits with what to do where it is not there."""
    path = PEERS / "mamba_ssm" / file
    if not path.is_file():
        sys.exit(f"{path} is not there: run 'make bench-mixers', which fetches mamba-ssm's sources")
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))  # for einops, which loads more of itself when it is first used
    with mock.patch.dict(sys.modules, {name: mock.MagicMock(__spec__=None) for name in STAND_INS}):
        spec.loader.exec_module(module)
    return module
