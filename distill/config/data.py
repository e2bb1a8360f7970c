"""Where documents come from, and how they become rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class Origin:
    """Where documents come from."""

    source: str = MISSING
    """``embedded``; a file (JSONL, JSON, CSV, Parquet; gzipped JSONL); a folder of such files, or one that
    ``datasets`` saved; or a hub name, ``owner/name``."""
    split: str = "train"
    """Which part of a hub data set, of a saved one, or of a folder whose file names say it."""
    subset: str = ""
    """Configuration of a hub data set that has several."""
    revision: str = ""
    """Branch, tag or commit of a hub data set (empty: its main branch)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What ours are called there, where they have other names: ``{prompt: question, completion: solution}``. Ours are
    messages, conversations, tools, prompt, completion, text."""


@dataclass
class SourceConfig(Origin):
    """One source of a mixture."""

    source: str = MISSING
    """As in ``Origin``."""
    weight: float = 1.0
    """Its share of the rows, which all have as many tokens, relative to the other weights."""


@dataclass
class DataConfig(Origin):
    """What is trained on."""

    source: str = "embedded"
    """As in ``Origin``: rows with messages (or conversations), prompt and completion, or text."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several sources by weight, in place of ``source``; each has its own split, subset, revision and columns."""
    sequence_length: int = 256
    """Tokens a packed row, T."""
    mix: dict[str, float] = field(
        default_factory=lambda: {"add": 1.0, "mod": 1.0, "chase": 2.0, "recall": 2.0, "sort": 1.0}
    )
    """Weight of each embedded family."""
    mask: str = "completion"
    """Which tokens are targets: ``completion`` (the last assistant turn: reasoning and answer), ``assistant`` (every
    assistant turn) or ``all``."""
    too_long: str = "cut"
    """A document longer than a row: ``cut`` (its beginning is kept, every token has its right context), ``split`` (its
    pieces become documents, the later ones without what came before) or ``drop``. All are counted."""
    streaming: bool = False
    """Read, tokenise and pack as the training goes, in bounded memory; a resumed training reads again up to its place.
    Otherwise the documents are held in memory."""
    shuffle_buffer: int = 10_000
    """Documents among which a streamed source is shuffled; with at least as many as there are, the rows are those
    without streaming."""
