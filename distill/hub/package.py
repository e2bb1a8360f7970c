"""A folder ready for a model hub: weights, config, tokenizer, generation config, model card, and if wanted the code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distill.hub.card import card
from distill.hub.code import auto_map, code_files
from distill.hub.facts import Facts, facts_of
from distill.posttrain.merge import checkpoint_folder
from distill.records import read_json, verify, write_json, write_text
from distill.storage import fresh_folder
from distill.teacher import load_tokenizer
from distill.weights import headers

TAKEN = (
    "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""The files that are taken along, and no others: what else lies in a folder (a trainer's state, notes, an adapter) is
no part of the model and may tell of this machine."""
PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "cache_dir")
"""Keys that say where on this machine something lay."""
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*")


def package(
    checkpoint: str | Path, output: str | Path, *, code: bool = False, facts: Facts | None = None, origin: str = ""
) -> Path:
    """Write a hybrid checkpoint to ``output`` as a model hub wants it, whole or not at all; returns the folder.

    Args:
        checkpoint: a folder with config.json, or a stage's folder; it is left as it is.
        output: a folder that does not exist; its name is the model's in the card.
        code: bring the Python files along with which ``from_pretrained(output, trust_remote_code=True)`` needs none of
            our packages.
        facts: what the card tells (by default what the checkpoint says of itself).
        origin: the teacher's folder, whose license files are taken along.

    Raises UserError, before anything is written, for an ``output`` that exists, a checkpoint that is no hybrid of ours,
    is damaged or lacks weights or tokenizer, and where there is too little room.
    """
    source, target = checkpoint_folder(checkpoint), Path(output).expanduser()
    verify(source)
    headers(source)
    load_tokenizer(str(source))
    facts = facts or facts_of(source)
    files = sorted(path for kind in TAKEN for path in source.glob(kind) if path.is_file())
    licenses = [path for kind in LICENSES if origin for path in sorted(Path(origin).glob(kind)) if path.is_file()]
    with fresh_folder(target, room=sum(path.stat().st_size for path in (*files, *licenses))) as folder:
        for path in files:
            place = folder / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            if path.name.endswith("_config.json"):
                write_json(place, _clean(read_json(path)))
            else:
                shutil.copyfile(path, place)
        for path in licenses:
            shutil.copyfile(path, folder / path.name)
        config = _clean(read_json(source / "config.json"))
        config.pop("auto_map", None)
        if code:
            config["auto_map"] = auto_map(facts.family)
            for name, text in code_files(facts.family, facts.mixers).items():
                write_text(folder / name, text)
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        if facts.lineage:
            write_json(folder / "lineage.json", list(facts.lineage))
        write_text(folder / "README.md", card(facts, target.resolve().name, code=code))
    return target


def _clean(content: Any) -> Any:
    """A config without what it says of this machine."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in PLACES}
    return content
