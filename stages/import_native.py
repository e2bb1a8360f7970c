"""Read a GraniteMoeHybrid folder back as a hybrid, so that it can be distilled on.

    distill import granite --output hybrid

FOLDER is what 'distill export --to hf-native' wrote (the very hybrid comes back), or another dense GraniteMoeHybrid
model of that form.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.errors import UserError
from distill.export.hf_native import import_folder
from stages.common import say


def main(args: argparse.Namespace) -> int:
    folder, output = Path(args.target).expanduser(), Path(args.output).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give a GraniteMoeHybrid folder, such as 'distill export' writes")
    tensors = import_folder(folder, output)
    say(f"{folder} -> {output}: a hybrid, {len(tensors)} tensors")
    return 0
