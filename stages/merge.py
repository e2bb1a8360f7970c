"""Average the weights of two checkpoints: alpha * A + (1 - alpha) * B.

    distill merge runs/demo/posttrain/01-H1-5-SFT/train runs/demo/stages/01-H1-5 --alpha 0.5 --output merged

A and B are CHECKPOINTs: folders with config.json, or stages of a run. They must have the same architecture, placement
and tensors; config and tokenizer come from A. Averaged in float32, stored in A's dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill.posttrain.merge import checkpoint_folder, merge
from stages.common import say


def main(args: argparse.Namespace) -> int:
    a, b = checkpoint_folder(args.a), checkpoint_folder(args.b)
    output = Path(args.output).expanduser()
    merge(a, b, args.alpha, output)
    say(f"{args.alpha:g} * {a} + {1 - args.alpha:g} * {b} -> {output}")
    return 0
