"""Configs merged by OmegaConf against their dataclasses: defaults < file < command line.

An unknown key or a wrong type is an error that names the nearest key and says what the key takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError, safe_load

from distill.config import VERSION, PretrainConfig, RunConfig
from distill.errors import UserError, brief, nearest

UNREADABLE = (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What OmegaConf and PyYAML raise for text that they cannot make a config of (``!!int`` alone is an IndexError)."""
PAIRS = "expected key: value pairs (see configs/demo.yaml)"
SCALARS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

Config = TypeVar("Config", RunConfig, PretrainConfig)


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Merge the dataclass defaults, a YAML file and ``key=value`` overrides.

    Raises UserError for an unreadable file, an unknown key (naming the nearest), a wrong type or value, and for a
    file that a newer version of this program has written.
    """
    layer = read_yaml(path)
    version = layer.pop("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{path}: version={version!r} is no version; expected a whole number up to {VERSION}")
    if version > VERSION:
        raise UserError(
            f"{path} was written by a newer distill (version {version}; this one reads up to {VERSION}): "
            "update distill, or take another run_dir"
        )
    return merge_config(kind, [(str(path), layer)], overrides)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds, interpolations left as they are; UserError where it is none."""
    try:
        loaded = OmegaConf.load(path)
        if OmegaConf.is_dict(loaded) and loaded:
            content: Any = OmegaConf.to_container(loaded)
            return content
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if mark else []
        tab = mark and mark.line < len(lines) and "\t" in lines[mark.line]
        hint = " (indent with spaces, not tabs)" if tab else ""
        problem = brief(", ".join(part for part in (error.context, error.problem) if part))
        if "max_yaml_expanded_nodes" in problem:
            problem = "its aliases (*) expand to more than 10000 values: write out what is needed"
        raise UserError(f"{path}{place} is not YAML: {problem}{hint}") from error
    except OSError as error:
        if error.errno is None:  # OmegaConf's way of saying that it found a number or a truth value
            raise UserError(f"{path}: {PAIRS}, found {brief(error).rpartition(' ')[2]}") from error
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is no text in UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{path} is not YAML that can be a config: it is nested too deeply") from error
    except UNREADABLE as error:
        raise UserError(f"{path} is not YAML: {brief(error)}") from error
    found = "nothing" if not loaded else "a list"
    raise UserError(f"{path}: {PAIRS}, found {found}")


def _number_blocks(layer: Any, where: str) -> Any:
    """The layer with the keys of ``mixer.blocks`` as numbers, which a dotted key is not: ``mixer.blocks.8=mamba2``."""
    mixer: Any = layer.get("mixer") if isinstance(layer, dict) else None
    blocks = mixer.get("blocks") if isinstance(mixer, dict) else None
    if not isinstance(blocks, dict):
        return layer
    for block in blocks:
        if isinstance(block, bool) or not str(block).isdigit():
            raise UserError(
                f"{where}: mixer.blocks: {brief(str(block))} is no block; expected {{8: mamba2, 9: mamba2}}"
            )
    return {**layer, "mixer": {**mixer, "blocks": {int(block): name for block, name in blocks.items()}}}


def merge_config(kind: type[Config], layers: Sequence[tuple[str, Any]], overrides: Sequence[str] = ()) -> Config:
    """Merge mappings (each with the name of where it came from), then overrides, over the defaults.

    A mapping of the user's own keys (``data.mix``, ``model``) is replaced as a whole; ``data.mix.add=2`` changes one.
    """
    merged: Any = OmegaConf.structured(kind)
    named = [(where, "", layer) for where, layer in layers]
    for text in overrides:
        if "=" not in text:
            raise UserError(f"expected key=value, got '{text}'")
        try:
            layer = split_colons(OmegaConf.to_container(OmegaConf.from_dotlist([text])))
        except UNREADABLE as error:
            raise UserError(
                f"'{brief(text)}' cannot be read: {brief(error)}\nput quotes around key=value where it holds spaces"
            ) from error
        named.append((f"'{brief(text, 120)}'", text.split("=")[0], layer))
    for where, key, layer in named:
        layer = _number_blocks(_fill_list(merged, layer, key), where)
        _check_keys(kind, layer, where)
        try:
            for path in _mappings(kind, layer):
                if key in ("", path):
                    OmegaConf.update(merged, path, {}, merge=False)
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, TypeError) as error:
            place = getattr(error, "full_key", None) or key
            reason = str(error).splitlines()[0]
            said = "" if "AnyNode" in reason or "container types" in reason else f"{reason}; "
            prefix = f"{where}: {place}: " if place else f"{where}: "
            raise UserError(f"{prefix}{said}expected {_expected(kind, place)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check_items(kind, config)
    assert isinstance(config, kind)
    return config


def spread_options(options: Mapping[str, Any], *parts: Any, fixed: Sequence[str] = ()) -> list[Any]:
    """Dataclasses like ``parts``, each with those of the ``options`` (keyword arguments) that are its own; the first
    part that has a key takes it.

    Raises UserError for a key that none has, or that is ``fixed``, naming the nearest, and for a value of another type.
    """
    keys = [{field.name for field in fields(part)} - set(fixed) for part in parts]
    allowed = sorted(set().union(*keys))
    layers: list[dict[str, Any]] = [{} for _ in parts]
    for key, value in options.items():
        place = next((number for number, own in enumerate(keys) if key in own), None)
        if place is None:
            raise UserError(f"unknown option '{key}'{nearest(key, allowed)}; allowed: {', '.join(allowed)}")
        layers[place][key] = value
    return [
        merge_config(type(part), [("defaults", asdict(part)), ("options", layer)])
        for part, layer in zip(parts, layers, strict=True)
    ]


def _fill_list(merged: Any, layer: Any, key: str) -> Any:
    """The layer of ``data.mixture.0.weight=2``, which changes one item of a list, with that list as a whole in it."""
    parts = re.match(r"([\w.]*?)\.(\d+)(\.|$)", key)
    items = OmegaConf.select(merged, parts[1]) if parts else None
    if parts is None or not OmegaConf.is_list(items):
        return layer
    number, found = int(parts[2]), OmegaConf.to_container(items)
    assert isinstance(found, list)
    if number >= len(found):
        raise UserError(f"'{key}': {parts[1]} has {len(found)} items, the first is number 0; give all of it to add one")
    parent: Any = layer
    *path, last = parts[1].split(".")
    for name in path:
        parent = parent[name]
    (new,) = parent[last].values()
    if isinstance(new, dict) and not isinstance(found[number], dict):
        return layer
    found[number] = {**found[number], **new} if isinstance(new, dict) else new
    parent[last] = found
    return layer


def split_colons(value: Any) -> Any:
    """Read ``{source:a.jsonl,weight:2}`` as the shell lets one write it: YAML wants a space after a colon, and
    takes each pair for a key without a value."""
    if isinstance(value, list):
        return [split_colons(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        if item is None and isinstance(key, str) and ":" in key:
            name, _, text = key.partition(":")
            result[name] = safe_load(text)
        else:
            result[key] = split_colons(item)
    return result


def _mappings(kind: Any, layer: Any, prefix: str = "") -> list[str]:
    """Dotted paths of the free mappings (not dataclasses) that a layer sets."""
    paths: list[str] = []
    default = kind()
    for key, value in layer.items():
        nested = getattr(default, key)
        if is_dataclass(nested) and isinstance(value, dict):
            paths += _mappings(type(nested), value, f"{prefix}{key}.")
        elif isinstance(nested, dict) and isinstance(value, dict):
            paths.append(prefix + key)
    return paths


def _expected(kind: Any, place: str) -> str:
    """In words, what a dotted key of ``kind`` takes."""
    hint = kind
    for part in re.findall(r"[^.\[\]]+", place):
        below = get_type_hints(hint).get(part) if is_dataclass(hint) else (get_args(hint) or (None,))[-1]
        if below is None:  # deeper than there is anything: what was to be there is said of the place above
            break
        hint = below
    if is_dataclass(hint):
        return f"keys and values, such as {{{next(iter(get_type_hints(hint)))}: ...}}"
    if get_origin(hint) in (list, dict):
        return "a list, such as [5]" if get_origin(hint) is list else "keys and values, such as {a: 1}"
    return SCALARS.get(hint, "another type")


def _check_items(kind: Any, config: Any, prefix: str = "") -> None:
    """Refuse lists and mappings whose items have another type than the dataclass says: OmegaConf lets lists pass."""
    for name, hint in get_type_hints(type(config)).items():
        value, item_type = getattr(config, name), (get_args(hint) or (Any,))[-1]
        if is_dataclass(value):
            _check_items(kind, value, f"{prefix}{name}.")
        elif item_type in SCALARS:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if not isinstance(item, item_type):
                    place = f"{prefix}{name}[{key}]"
                    raise UserError(f"{place}: {brief(repr(item), 80)} is not {SCALARS[item_type]}")


def dump_config(config: RunConfig | PretrainConfig) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _places(kind: Any, key: str, prefix: str = "") -> list[str]:
    """Dotted keys that end in ``key``, of the parts of a config."""
    parts = {name: hint for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}
    found = [f"{prefix}{name}.{key}" for name, hint in parts.items() if key in get_type_hints(hint)]
    return found + [place for name, hint in parts.items() for place in _places(hint, key, f"{prefix}{name}.")]


def _check_keys(kind: Any, layer: Any, where: str, prefix: str = "") -> None:
    """Refuse keys that the dataclass does not have; OmegaConf's own message does not name the nearest."""
    known = get_type_hints(kind)
    for key, value in (layer or {}).items():
        if key not in known:
            deeper = "" if prefix else " or ".join(f"'{place}'" for place in _places(kind, str(key)))
            hint = f" (did you mean {deeper}?)" if deeper else nearest(str(key), known)
            raise UserError(f"{where}: unknown key '{prefix}{key}'{hint}; allowed: {', '.join(known)}")
        nested, items = known[key], get_args(known[key])
        if is_dataclass(nested) and isinstance(value, dict):
            _check_keys(nested, value, where, f"{prefix}{key}.")
        elif isinstance(value, list) and items and is_dataclass(items[0]):
            for number, item in enumerate(value):
                if not isinstance(item, dict):
                    raise UserError(
                        f"{where}: {prefix}{key}[{number}]: expected {{{', '.join(get_type_hints(items[0]))}}}, "
                        f"not {item!r}"
                    )
                _check_keys(items[0], item, where, f"{prefix}{key}[{number}].")
