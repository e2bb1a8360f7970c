"""What a model card tells of a hybrid, gathered from a checkpoint; a run's records add the rest (stages/package.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from yaml import YAMLError

from distill.data.sources import EMBEDDED, is_hub
from distill.errors import UserError
from distill.hybrid.surgery import is_hybrid
from distill.placement import ATTENTION, hybrid_name, replaced_blocks
from distill.records import read_json
from distill.teacher import load_config, load_tokenizer

ABSOLUTE = re.compile(r"(?<![\w./])(?:~|[A-Za-z]:)?[/\\][^\s,;'\")]+")
"""A path from the root of a machine, or from a user's home."""


OF_MAMBA1 = ("d_state", "mil_layout", "z_init")
"""Options of a mixer that mamba1 alone reads."""


@dataclass(frozen=True)
class Facts:
    """What is known of a hybrid; what is not known is empty, and the card does not speak of it."""

    name: str
    """``H1-6/10``, or ``H1-6/10-SFT`` of one trained further."""
    family: str
    """``model_type`` of the teacher."""
    mixers: Sequence[str]
    options: Mapping[str, Any]
    """Options of the mixers, as config.json has them."""
    context: int = 0
    """Positions that the config allows (max_position_embeddings)."""
    dtype: str = ""
    chat: bool = False
    """Whether the tokenizer has a chat template."""
    lineage: Sequence[Mapping[str, Any]] = ()
    """The trainings that led to it, oldest first (``lineage.json``)."""
    teacher: str = ""
    """``embedded``, a hub name, or the name of a folder (not where it lies)."""
    license: str = ""
    """As the hub writes it, such as ``apache-2.0``."""
    trainings: Sequence[Mapping[str, Any]] = ()
    """The lineage, each entry with what else is known of it: eval_loss_start and _end, seed, sequence_length."""
    accuracy: Sequence[Mapping[str, Any]] = ()
    """Entries of ``measure.json``: task, kind, metric, value, stderr, n."""
    teachers_accuracy: Sequence[Mapping[str, Any]] = ()
    headline: Mapping[str, Any] = field(default_factory=dict)
    """Throughput beside the teacher: batch, output_tokens, tokens_per_second, teacher_tokens_per_second, ratio."""
    speeds: Sequence[Mapping[str, Any]] = ()
    """Rows of the throughput grid, with kv_bytes and state_bytes, of ``teacher`` and of the hybrid."""
    parameters: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> list[int]:
        """The blocks that have another mixer than attention."""
        return replaced_blocks(self.mixers)

    @property
    def tokens(self) -> int:
        """Tokens trained on along the lineage."""
        return sum(entry["tokens"] for entry in self.lineage)


def named(places: str) -> str:
    """How a source or a model (or several, joined by `` + ``) may be called elsewhere: ``embedded``, a hub name, or a
    file's or folder's own name."""
    names = [
        place if place == EMBEDDED or is_hub(place) else Path(place.rstrip("/\\") or "/").name or "files"
        for place in places.split(" + ")
    ]
    return " + ".join(names)


def without_paths(value: Any) -> Any:
    """JSON in which no text holds an absolute path: what is left of one is its last part."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return ABSOLUTE.sub(lambda found: Path(found[0]).name, value) if isinstance(value, str) else value


def license_of(teacher: str) -> str:
    """The license that the teacher's own model card names, in its folder or the hub's cache; empty where none does."""
    if teacher == EMBEDDED:
        return "apache-2.0"
    file = try_to_load_from_cache(teacher, "README.md") if is_hub(teacher) else Path(teacher).expanduser() / "README.md"
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return ""
    try:
        found = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except (ValueError, OSError, YAMLError):  # a card is no requirement, and this one cannot be read
        return ""
    return found if isinstance(found, str) else ""


def lineage_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The trainings that led to a checkpoint, its sources named as they may be called elsewhere; [] if unknown."""
    file = checkpoint / "lineage.json"
    entries = read_json(file) if file.is_file() else []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("tokens"), int) for entry in entries
    ):
        raise UserError(
            f"{file} is broken: expected a list of entries with tokens; mend it, or remove it to say nothing of them"
        )
    return [
        without_paths({**entry, "data": named(entry["data"])} if isinstance(entry.get("data"), str) else entry)
        for entry in entries
    ]


def options_of(config: Any, mixers: Sequence[str]) -> dict[str, Any]:
    """The options that the mixers of a model have: mamba2 reads none of ``OF_MAMBA1`` (its states are as wide as a
    head), and mamba1's states are never wider than a head."""
    kinds = set(mixers) - {ATTENTION}
    options = {key: value for key, value in config.mixer_config.items() if kinds and key not in OF_MAMBA1}
    if "mamba1" in kinds:
        given = {**config.mixer_config, "d_state": min(config.mixer_config["d_state"], config.head_dim)}
        options |= {key if len(kinds) == 1 else f"{key} (mamba1)": given[key] for key in OF_MAMBA1}
    if "mamba2" in kinds:
        options["d_state" if len(kinds) == 1 else "d_state (mamba2)"] = config.head_dim
    return options


def facts_of(checkpoint: Path) -> Facts:
    """What a checkpoint says of itself.

    Raises UserError where it is no hybrid of ours, or cannot be read.
    """
    config = load_config(str(checkpoint), convertible=False)
    if not is_hybrid(config):
        raise UserError(
            f"{checkpoint} is no hybrid but a {config.model_type}: give the checkpoint of a stage, or a run folder"
        )
    mixers = list(config.mixers or [ATTENTION] * config.num_hidden_layers)
    lineage = lineage_of(checkpoint)
    name = hybrid_name(len(replaced_blocks(mixers)), len(mixers))
    tuned = [str(entry["name"]) for entry in lineage if str(entry.get("name", "")).startswith(f"{name}-")]
    return Facts(
        name=tuned[-1] if tuned else name,
        family=config.model_type.removeprefix("hybrid_"),
        mixers=mixers,
        options=options_of(config, mixers),
        context=getattr(config, "max_position_embeddings", None) or 0,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else "",
        chat=load_tokenizer(str(checkpoint)).chat_template is not None,
        lineage=lineage,
    )
