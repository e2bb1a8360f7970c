"""What a result was computed on, and by which command: kept beside it, and out of every fingerprint."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any


@cache
def device() -> str:
    """The GPUs that this process sees, or the processor and how many of its cores it may use."""
    torch = sys.modules.get("torch")  # who computed anything has imported it; nobody else is made to
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(0)}" if count > 1 else str(torch.cuda.get_device_name(0))
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def command() -> str:
    """The command line of this process as one would type it; empty where it is not ours (a test, a notebook)."""
    program = Path(sys.argv[0]).name
    return shlex.join(["distill", *sys.argv[1:]]) if program in ("distill", "cli.py") else ""


def free_memory(place: Any) -> float:
    """Bytes that can still be taken on a device (a torch.device, or its name). Linux hands out main memory that it has
    not got and then ends a process, so that whoever is about to take much of it has to ask first."""
    if str(place).startswith("cuda"):
        cuda = sys.modules["torch"].cuda
        held = cuda.memory_reserved(place) - cuda.memory_allocated(place)
        return float(cuda.mem_get_info(place)[0] + held)
    available = float("inf")
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024.0
    return min(available, of_group("memory.max") - of_group("memory.current", 0.0))


def of_group(file: str, otherwise: float = float("inf")) -> float:
    """A number of the control group that this process runs in, where there is one."""
    path = Path("/sys/fs/cgroup") / file
    text = path.read_text().strip() if path.is_file() else ""
    return float(text) if text.isdecimal() else otherwise
