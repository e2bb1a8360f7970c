"""A real file system of a few MiB fills up: what was finished stays good, the message is clear, more room continues.

Needs ``mount`` in a namespace of its own (as root, or in a user namespace): a machine that forbids both skips this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
SIZES = ("100k", "2m", "6m", "14m", "24m", "100m")
SCRIPT = r"""
set -u
mount -t tmpfs -o size=1m tmpfs "$1"
for size in $2; do
    mount -o "remount,size=$size" "$1"
    echo "@@ $size"
    "$3" -m stages.cli run "$4" "run_dir=$1/run"; echo "code $?"
    find "$1/run" -type d -name partial
    "$3" - "$1/run" <<'CHECK'
import sys
from pathlib import Path
from distill.checkpoints import checkpoints_of, fault
for folder in Path(sys.argv[1]).glob("stages/*/train.partial/checkpoints"):
    for step, path in checkpoints_of(folder).items():
        print("whole" if fault(path) is None else "BROKEN", step)
CHECK
done
cp -r "$1/run" "$5"
"""


def namespace() -> list[str]:
    """The command before a command that may mount; skips where there is none."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        try:
            tried = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
        except FileNotFoundError:
            break
        if tried.returncode == 0:
            return command
    pytest.skip("this machine lets us mount no small file system (neither as root nor in a user namespace)")


def test_a_disk_that_fills_up(lab: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = [*namespace(), "bash", "-c", SCRIPT, "disk", str(small), " ".join(SIZES), sys.executable]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(lab.config), str(tmp_path / "run")],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    parts = dict(part.split("\n", 1) for part in done.stdout.split("@@ ") if part[:1].isdigit())
    assert list(parts) == list(SIZES), done.stdout
    for size, said in parts.items():
        shown = [line for line in said.splitlines() if re.match("distill run|what was|code|whole", line)]
        print("\n".join([f"\n{size} of disk:", *shown]))
        assert "BROKEN" not in said and "Traceback" not in said
        assert "/partial" not in said, "what was half written is removed"
        if size != SIZES[-1]:
            assert "code 2" in said
            assert "No space left" in said and "MiB free: too little" in said and "the same command continues" in said
    assert "whole" in parts["14m"] + parts["24m"], "a checkpoint was there as the disk filled up"
    assert "code 0" in parts[SIZES[-1]]
    assert lab.differences(tmp_path / "run") == []
