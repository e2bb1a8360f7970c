"""The checkpoints of a training under way: sealed with checksums, the newest good one found, old ones removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from distill.errors import UserError
from distill.records import read_json, write_json
from distill.storage import checksums, damage

MANIFEST = "manifest.json"


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint, the newest first, whole or not."""
    found = {int(name[1]): path for path in folder.glob("*") if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return dict(sorted(found.items(), reverse=True))


def seal(checkpoint: Path) -> None:
    """Note size and checksum of every file of a checkpoint in ``manifest.json``."""
    write_json(checkpoint / MANIFEST, {"files": checksums(checkpoint)})


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None for a whole one. All of it is read."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        found = damage(checkpoint, files)
    except (UserError, TypeError, KeyError, AttributeError):  # a manifest that is not as ``seal`` writes it
        return f"has no whole {MANIFEST}"
    return f"{found[0].name} {found[1]}" if found else None


def newest_good(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, ``say`` told which that is and which newer ones are not."""
    faulty = False
    for path in checkpoints_of(folder).values():
        if (wrong := fault(path)) is None:
            say(f"continuing from {path}")
            return path
        faulty = True
        say(f"{path} is passed over: {wrong}")
    if faulty:
        say("no checkpoint is whole: beginning anew")
    return None


def prune(folder: Path, newest: int, limit: int) -> None:
    """Keep the checkpoint of step ``newest``, just written, and the ``limit - 1`` before it.

    Later ones were passed over, or the training would not have come by here again.
    """
    found = checkpoints_of(folder)
    earlier = [step for step in found if step < newest]
    for step in [*(step for step in found if step > newest), *earlier[limit - 1 :]]:
        shutil.rmtree(found[step])
