"""Typed configuration: defaults < file < command line, merged by OmegaConf against dataclasses.

An unknown key or a wrong type is an error that names the nearest key. ``RunConfig`` is one distillation
run, ``PretrainConfig`` the training of a teacher from nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError, safe_load

from distill.errors import UserError, brief, nearest

VERSION = 1
"""Format of ``run.yaml``: raised when a program that knows only the one before could not go on with a run."""
UNREADABLE = (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What OmegaConf and PyYAML raise for text that they cannot make a config of (``!!int`` alone is an IndexError)."""
PAIRS = "expected key: value pairs (see configs/demo.yaml)"
SCALARS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


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


@dataclass
class TrainConfig:
    """How a model is trained (AdamW, warm-up, then linear decay)."""

    loss: str = "reverse_kl"
    """``reverse_kl``, ``forward_kl``, ``jsd``, ``annealed_kl`` (forward turning into reverse) or ``cross_entropy``."""
    temperature: float = 1.0
    """tau, applied to both sides."""
    steps: int = 100
    """Optimizer steps a stage."""
    steps_by_stage: list[int] = field(default_factory=list)
    """One number a stage, in place of ``steps``."""
    batch_size: int = 8
    """Rows a step on one device, over all accumulation steps: the global batch of one process."""
    gradient_accumulation: int = 1
    """Micro-batches that ``batch_size`` is cut into."""
    learning_rate: float = 5e-5
    mixer_learning_rate: float = 0.0
    """That of the replaced mixers (0: the same)."""
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta2: float = 0.95
    """Second moment decay of AdamW (the first is 0.9)."""
    max_grad_norm: float = 1.0
    eval_rows: int = 64
    """Held-out rows on which the loss is taken before and after."""
    save_steps: int = 0
    """Checkpoint every so many steps (0: only at the end)."""
    keep_steps: list[int] = field(default_factory=list)
    """Steps of every stage after which the weights are kept for good, in ``train/steps/000200``: models to load,
    or to start a later stage from (those that ``start_from`` names are kept without being listed)."""
    gradient_checkpointing: bool = False


@dataclass
class SftConfig(Origin):
    """Fine-tuning of a distilled stage on traces, and its merge with that stage (the paper's H1-30-SFT)."""

    source: str = ""
    """Traces, as in ``data.source``, with split, subset, revision and columns of their own (empty: the run's data)."""
    steps: int = 100
    """Optimizer steps; what is not set here (weight decay, clipping, ...) is as in ``train``."""
    batch_size: int = 8
    """Rows a step on one device, over all accumulation steps."""
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    save_steps: int = 0
    """Checkpoint every so many steps (0: only at the end)."""
    alpha: float = 0.5
    """Weight of the fine-tuned model in the merge: alpha * SFT + (1 - alpha) * H1-h."""


@dataclass
class MixerConfig:
    """What replaces attention, and how it starts."""

    name: str = "mamba1"
    d_state: int = 16
    """State size N (at most head_dim)."""
    d_conv: int = 4
    """Taps of the causal convolution."""
    init: str = "mil"
    """``mil`` (from the attention that is replaced) or ``fresh`` (random)."""
    mil_layout: str = "aligned"
    """``aligned`` or ``faithful``: how keys and values meet queries under GQA."""
    z_init: str = "default"
    """``default`` (random) or ``identity`` (the gate starts at about 1)."""
    conv_init: str = "default"
    """``default`` (random) or ``identity`` (the convolution starts as a pass-through)."""
    bc_norm: str = "auto"
    """RMSNorm per head on B and C: ``auto`` (where the teacher has such norms on k and q), ``always`` or ``never``."""


@dataclass
class LooConfig:
    """Leave-one-out: accuracy lost when a block is the identity."""

    task: str = "embedded_choice"
    """A log-likelihood task of lm-eval."""
    questions: int = 500
    """How many questions (0: all)."""


@dataclass
class MmrConfig:
    """MIL-Mamba-replacement: loss after a short distillation with one more block swapped."""

    steps: int = 100
    heldout_tokens: int = 16384
    """Fixed held-out tokens on which the loss is taken at 0 steps and after the last."""
    trainable: str = "all"
    """``all`` as in the paper, or ``mixer`` (cheap)."""


@dataclass
class ScoreConfig:
    """Which importance score each stage uses."""

    first: str = "loo"
    later: str = "mmr"
    loo: LooConfig = field(default_factory=LooConfig)
    mmr: MmrConfig = field(default_factory=MmrConfig)


@dataclass
class ThroughputConfig:
    """Decode speed: batches x contexts, and the headline of 1 token in, N out."""

    batches: list[int] = field(default_factory=lambda: [1, 32])
    contexts: list[int] = field(default_factory=lambda: [256, 1024, 4096])
    repeats: int = 5
    output_tokens: int = 4096
    """N of the 1-in / N-out throughput (the paper: 16k)."""


@dataclass
class MeasureConfig:
    """Accuracy tasks (lm-eval names) and throughput."""

    generative: list[str] = field(default_factory=lambda: ["embedded_generative"])
    multiple_choice: list[str] = field(default_factory=lambda: ["embedded_choice"])
    limit: int = 0
    """Questions a task (0: all)."""
    batch_size: int = 64
    max_new_tokens: int = 0
    """Longest generation (0: as each task says)."""
    allow_code_execution: bool = False
    """Whether tasks that run what the model writes (humaneval, mbpp) may do so on this machine."""
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)


@dataclass
class SlurmConfig:
    """Resources of one job (``distill submit``)."""

    partition: str = ""
    account: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 2
    memory: str = "0"
    """``0`` is all of the node's."""
    time: str = "24:00:00"
    setup: list[str] = field(default_factory=list)
    """Shell lines run before the step (module load, activation of an environment)."""


@dataclass
class PlanConfig:
    """What ``distill plan`` assumes of a device."""

    device_tflops: float = 0.0
    """Peak TFLOP/s of one device (0: measure this machine)."""
    utilisation: float = 0.4
    """Share of the peak that training reaches."""


@dataclass
class RunConfig:
    """One run: a teacher taken through a schedule of hybrids."""

    name: str = "run"
    teacher: str = "embedded"
    """``embedded``, a model folder, or a hub name."""
    teacher_config: dict[str, Any] = field(default_factory=dict)
    """The teacher's config.json, for planning without it at hand."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the teacher (``auto_map`` in its config.json) may be run."""
    schedule: list[int] = field(default_factory=list)
    """Replaced blocks h after each stage; each stage more than what it starts from."""
    start_from: dict[str, str] = field(default_factory=dict)
    """Where a stage starts, if not from the stage before it: ``H1-5`` (an earlier stage), ``H1-5@200`` (its weights
    after 200 steps), ``teacher``, or the folder of a hybrid that another run made. ``{H1-7: H1-5@200}``."""
    run_dir: str = "runs/run"
    seed: int = 0
    threads: int = 0
    """CPU threads (0: one a core)."""
    dtype: str = "float32"
    """``float32`` or ``bfloat16``: the teacher, and what is computed in; the student trains on float32 weights."""
    kernels: str = "auto"
    """``auto``, ``reference`` or ``cpu``: the implementation of the scan."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class PretrainConfig:
    """A teacher trained from nothing on the embedded traces."""

    name: str = "teacher"
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of a Llama config.json."""
    start: str = ""
    """A model to go on from (``embedded``, a folder), in place of random weights."""
    output: str = "runs/teacher"
    seed: int = 0
    threads: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


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
        layer = _fill_list(merged, layer, key)
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


def _check_keys(kind: Any, layer: Any, where: str, prefix: str = "") -> None:
    """Refuse keys that the dataclass does not have; OmegaConf's own message does not name the nearest."""
    known = get_type_hints(kind)
    for key, value in (layer or {}).items():
        if key not in known:
            raise UserError(
                f"{where}: unknown key '{prefix}{key}'{nearest(str(key), known)}; allowed: {', '.join(known)}"
            )
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
