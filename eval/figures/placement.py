"""The mixer of every block after every stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from eval.drawing import INK, WIDE, add_legend, mixer_colours, styled, tell
from eval.runs import Stage, lineage_of


@styled
def placement(stages: Sequence[Stage], width: float = WIDE) -> Figure:
    """A row per stage, a cell per block: its mixer by colour, and the stage that converted it by number."""
    rows = [(s.index, s.name, s.records["place"]["mixers"]) for s in stages if s.records["place"]]
    converted = {
        s.index: {block: each.index for each, _ in lineage_of(stages, s) for block in each.added} for s in stages
    }
    blocks = max(len(mixers) for _, _, mixers in rows)
    used = list(dict.fromkeys(mixer for _, _, mixers in rows for mixer in mixers))
    colours = mixer_colours(used)
    lines = math.ceil(blocks / max(1, int((width - 1) / 0.14)))
    per_line = math.ceil(blocks / lines)
    size = 8 if per_line <= (40 if width > 6 else 26) else 6.5
    figure = Figure(figsize=(width, 0.55 + lines * (0.42 + 0.27 * len(rows))), layout="constrained")
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first = line * per_line
        for row, (index, _, mixers) in enumerate(rows):
            for block, mixer in list(enumerate(mixers))[first : first + per_line]:
                cell = Rectangle((block - 0.46, row - 0.42), 0.92, 0.84, fc=colours[mixer], lw=0)
                axes.add_patch(cell)
                since = f", since stage {converted[index][block]}" if block in converted[index] else ""
                tell(cell, f"{rows[row][1]}, block {block}: {mixer}{since if mixer != 'attention' else ''}")
                if mixer != "attention" and block in converted[index]:
                    new = converted[index][block] == index
                    weight, alpha = ("bold", 1.0) if new else ("normal", 0.75)
                    at = {"ha": "center", "va": "center_baseline", "fontsize": size}
                    axes.text(block, row, str(converted[index][block]), color="white", weight=weight, alpha=alpha, **at)
        axes.set(xlim=(first - 0.5, first + per_line - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [name for _, name, _ in rows], color=INK)
        shown = range(first, min(first + per_line, blocks))
        axes.set_xticks([block for block in shown if per_line <= 20 or block % 5 == 0])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    add_legend(figure, [Patch(color=colours[mixer], label=mixer) for mixer in used], width)
    return figure
