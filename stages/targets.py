"""What a verb works on: finding configs and runs, and refusing values that no step could work with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from distill.config import DataConfig, MmrConfig, Origin, PretrainConfig, RunConfig, ScoreConfig, SftConfig
from distill.config_merge import load_config, merge_config
from distill.data.examples import check_columns
from distill.data.mixture import check_options
from distill.data.sources import EMBEDDED
from distill.data.tokenizer import VOCAB_SIZE
from distill.engine import ENGINES, check_teacher_mode
from distill.errors import UserError, brief, choose, nearest
from distill.groups import check_groups
from distill.guards import check_guards
from distill.hybrid.config import mixer_options
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import check_convertible
from distill.importance import COMBINED, taken
from distill.importance import available as scores
from distill.importance.comparison import entries
from distill.importance.mmr import TRAINABLE
from distill.init import available as initialisations
from distill.losses import terms_of
from distill.mixers import available as mixers
from distill.mixers import check_used, mixer_class
from distill.ops.kernels import CHOICES, DEVICES, check_kernel
from distill.teacher import DTYPES, check_shape

ABOVE_0 = math.ulp(0.0)  # the smallest number above 0
LOWEST: dict[str, float] = {
    r"data\.sequence_length": 2,  # one token has no next one to learn
    r"(train|sft)\.(steps|batch_size|gradient_accumulation|learning_rate|eval_rows|temperature)": ABOVE_0,
    r"train\.((steps_by_stage|keep_steps)\[.*|teacher_top_k)": ABOVE_0,
    r"mixer\..*|score\.mmr\.(steps|heldout_tokens)|plan\.utilisation|measure\.batch_size": ABOVE_0,
    r"score\.aligned\.(steps|learning_rate|heldout_tokens)": ABOVE_0,
    r"measure\.throughput\.(repeats|batches.*|contexts.*|lengths.*)": ABOVE_0,
    r"measure\.(samples|top_p)": ABOVE_0,
    r"score\.loo\.few_shot": -1,
    r"slurm\.(nodes|cpus_per_task)|train\.keep_checkpoints|engine\.timeout": ABOVE_0,
}
"""Dotted key (the first pattern that fits) -> the least value, else 0; ``ABOVE_0``: any above 0."""
UNSET = vars(SftConfig())
GIVEN = "given"
LARGE = 2**31 - 1  # of any number; it keeps infinity out, too
FROM_TOKENIZER = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Keys of a model's config that are not the user's to choose."""
HIGHEST = {"seed": 2**32 - 1, "threads": 1024, "plan.utilisation": 1}


def shipped_configs() -> dict[str, Path]:
    """Short name -> path of the configs that we ship."""
    folder = Path(str(resources.files("configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(target: str) -> Path:
    """The file that CONFIG names: a path, or the short name of one we ship."""
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = shipped_configs()
    if path.stem in shipped and (target == path.stem or path == Path("configs") / f"{path.stem}.yaml"):
        return shipped[path.stem]
    near, why = nearest(target, [*shipped, *(str(found) for found in path.parent.glob("*.yaml"))]), ""
    if path.is_file():
        near, why = "", ": the name of a YAML file ends in .yaml"
    elif path.suffix in (".yaml", ".yml"):
        why = ": there is no such file"
    raise UserError(f"no config '{target}'{why}{near}; give a YAML file or one of: {', '.join(shipped)}")


def read_config(target: str, overrides: list[str]) -> RunConfig:
    """The checked config that CONFIG or RUN names; for a RUN, ``run_dir`` is where it lies now.

    Raises UserError for anything that cannot be read or could not work.
    """
    folder = Path(target).expanduser()
    if folder.is_dir():
        if not (folder / "run.yaml").is_file():
            raise UserError(f"{target} is no run folder: it has no run.yaml")
        config = load_config(RunConfig, folder / "run.yaml", overrides)
        if not any(text.startswith("run_dir=") for text in overrides):
            config.run_dir = str(folder)
    else:
        config = load_config(RunConfig, config_path(target), overrides)
    check(config)
    return config


def default_config(overrides: list[str]) -> RunConfig:
    """The checked config that ``key=value`` alone make of the defaults."""
    config = merge_config(RunConfig, [], overrides)
    check(config)
    return config


def is_run(target: str) -> bool:
    """Whether a verb's target names a CONFIG or RUN, rather than a CHECKPOINT."""
    path = Path(target).expanduser()
    return (
        (path / "run.yaml").is_file()
        or path.suffix in (".yaml", ".yml")
        or (target in shipped_configs() and not (path / "config.json").is_file())
    )


def check(config: RunConfig) -> None:
    """Raise UserError for values that no step could work with."""
    _check_texts(config)
    check_name(config.name)
    if not config.run_dir.strip():
        raise UserError("run_dir is empty: name the folder that the run is to write")
    choose("dtype", config.dtype, DTYPES)
    choose("kernels", config.kernels, CHOICES)
    choose("mixer.name", config.mixer.name, mixers())
    for block, mixer in config.mixer.blocks.items():
        choose(f"mixer.blocks.{block}", mixer, mixers())
    check_used({config.mixer.name, *config.mixer.blocks.values()}, mixer_options(config.mixer))
    _check_kernels(config)
    choose("mixer.init", config.mixer.init, initialisations())
    check_scores(config.score)
    every = entries(config.score, config.score.later)
    for entry in every:
        check_mmr(entry.options.mmr)
    _check_training(config)
    for entry in every[1:]:
        _check_numbers(entry.options, f"score.compare: '{entry.name}': ", "score.")
    choose("engine.name", config.engine.name, ENGINES)
    check_outside("run_dir", config.run_dir, config.data, config.sft)
    check_columns(config.sft.columns, "sft.columns")
    set_alone = [f"sft.{key.name}" for key in fields(Origin) if getattr(config.sft, key.name) != UNSET[key.name]]
    if set_alone and not config.sft.source:
        raise UserError(f"{set_alone[0]} is set, but not sft.source, whose it is: set both or neither")
    throughput, sft = config.measure.throughput, config.sft
    if not throughput.batches or throughput.output_tokens < 2:
        raise UserError("measure.throughput needs at least one batch and output_tokens of at least 2")
    if not 0 <= sft.alpha <= 1:
        raise UserError(f"sft.alpha={sft.alpha} must be in [0, 1]: merged = alpha * SFT + (1 - alpha) * H1-h")


def check_scores(score: ScoreConfig) -> None:
    """Refuse scores that there are not, and options of theirs that say nothing."""
    for name in (score.first, score.later):
        choose("score", name, scores())
    for name in score.combine:
        choose("score in score.combine", name, set(scores()) - {COMBINED})
    every = taken(score, score.first, score.later)
    if COMBINED in every and len(set(score.combine)) < max(2, len(score.combine)):
        raise UserError(f"score.combine={score.combine} must be two or more different scores: [loo, mmr]")
    if GIVEN in every and (not score.given or len(set(score.given)) < len(score.given)):
        raise UserError(
            f"score.given={score.given} must be blocks, each once, in the order in which to replace them: [7, 8, 9]"
        )


def check_mmr(mmr: MmrConfig) -> None:
    """Refuse what MMR does not know, and halving with candidates that are not compared with each other."""
    choose("score.mmr.trainable", mmr.trainable, TRAINABLE)
    if mmr.halving and mmr.halving_check:
        raise UserError(
            "score.mmr.halving drops candidates, score.mmr.halving_check says what that would have changed: set one"
        )
    if mmr.halving and mmr.candidates_at_once:
        raise UserError(
            f"score.mmr.candidates_at_once={mmr.candidates_at_once} with halving, which compares all of them at each "
            "rung: leave it at 0, or set score.mmr.halving=false"
        )


def _check_kernels(config: RunConfig) -> None:
    """Refuse kernels that lack an operator of a mixer, or a package."""
    for mixer in sorted({config.mixer.name, *config.mixer.blocks.values()}):
        try:
            for operator in mixer_class(mixer).operators:
                check_kernel(operator, config.kernels)
        except ValueError as error:
            raise UserError(f"kernels={config.kernels} with mixer {mixer}: {error}") from error


def check_device(config: RunConfig) -> None:
    """Refuse kernels of a device that this machine lacks. Only where a model is to run: a cluster's login node has
    no GPU, and may still plan and submit."""
    if config.kernels == "cpu" and torch.cuda.is_available():
        raise UserError("kernels=cpu runs on the CPU alone, and this machine has a GPU: kernels=auto or reference")
    if DEVICES.get(config.kernels) == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"kernels={config.kernels} runs on a GPU alone, and PyTorch finds none here: kernels=auto, cpu or reference"
        )


def check_pretrain(config: PretrainConfig) -> None:
    """Raise UserError for values that no teacher could be trained with."""
    _check_texts(config)
    if not config.output.strip():
        raise UserError("output is empty: name the folder that the teacher is to be written to")
    _check_training(config)
    check_outside("output", config.output, config.data)
    model = model_config(config.model)
    check_shape("model", model)
    check_convertible(model)


def model_config(keys: Mapping[str, Any], **tokens: int | None) -> Any:
    """The config of a model of the embedded vocabulary from ``keys`` of a config.json (``model_type`` among them, by
    default ``llama``) and its ``tokens``; UserError for a key or a value that its family has not."""
    family = choose("model.model_type", str(keys.get("model_type", "llama")), FAMILIES)
    given = {key: value for key, value in keys.items() if key != "model_type"}
    known = AutoConfig.for_model(family).to_dict().keys() - FROM_TOKENIZER
    for key in given:
        if key not in known:
            raise UserError(
                f"unknown key 'model.{key}'{nearest(key, known)}; allowed: those of the config.json of a {family} model"
            )
    try:
        return AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **tokens, **given)
    except Exception as error:  # transformers' validators raise errors of many kinds; each means a bad value
        raise UserError(f"model is no config of a {family} model: {brief(error)}") from error


def _check_training(config: RunConfig | PretrainConfig) -> None:
    """Numbers in their ranges, and the parts that both kinds of config share."""
    terms_of(config.train.loss, "train.loss")
    check_teacher_mode(config.train, config.engine if isinstance(config, RunConfig) else None)
    check_groups(config.train)
    check_guards(config.train, config.engine.name if isinstance(config, RunConfig) else "none")
    check_options(config.data)
    _check_numbers(config)
    if not 0 <= config.train.beta2 < 1:
        raise UserError(f"train.beta2={config.train.beta2} must be in [0, 1)")
    for name in ("train", "sft"):
        part = getattr(config, name, None)
        if part is not None and part.batch_size % part.gradient_accumulation:
            raise UserError(
                f"{name}.batch_size={part.batch_size} is not divisible by "
                f"{name}.gradient_accumulation={part.gradient_accumulation}"
            )


def _check_numbers(config: Any, where: str = "", prefix: str = "") -> None:
    """Refuse numbers out of their ranges; ``where`` begins an error, ``prefix`` is where in a config this part is."""
    for key, value in _leaves(config, prefix):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        low = next((low for pattern, low in LOWEST.items() if re.fullmatch(pattern, key)), 0)
        high = HIGHEST.get(key, LARGE)
        if not value >= low:
            raise UserError(f"{where}{key}={value} must be {'above 0' if low == ABOVE_0 else f'at least {low}'}")
        if not value <= high:
            raise UserError(f"{where}{key}={value} must be at most {high}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every text and number in a config but those of a model's own config."""
    if is_dataclass(config):
        parts = {prefix + field.name: getattr(config, field.name) for field in fields(config)}
    elif isinstance(config, dict):
        parts = {f"{prefix}{key}": value for key, value in config.items()}
    else:
        parts = {f"{prefix.rstrip('.')}[{place}]": value for place, value in enumerate(config)}
    for key, value in parts.items():
        if key in ("model", "teacher_config"):
            continue
        if is_dataclass(value) or isinstance(value, (dict, list)):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _check_texts(config: RunConfig | PretrainConfig) -> None:
    """Refuse control characters: in a path or a name they are never meant, and could end a line of a job script."""
    for key, value in _leaves(config):
        if isinstance(value, str) and not key.startswith("slurm.setup") and not value.isprintable():
            raise UserError(f"{key}={value!r} holds characters that cannot be printed, such as a line break")


def check_outside(key: str, place: str, *read: DataConfig | SftConfig) -> None:
    """Refuse to write to ``place`` (that ``key`` names) where it lies in a folder that data are read from: logs and
    records would be taken for data."""
    target = Path(place).expanduser().resolve()
    for origin in [entry for data in read for entry in getattr(data, "mixture", None) or [data]]:
        folder = Path(origin.source or EMBEDDED).expanduser()
        if origin.source not in ("", EMBEDDED) and folder.is_dir() and target.is_relative_to(folder.resolve()):
            raise UserError(
                f"{key}={place} lies in the folder of data {origin.source}, where what is written would be read as "
                "data: give another place, or keep the data in a folder of their own"
            )


def check_name(name: str) -> None:
    """Raise UserError for a name that could not stand in a file name, as those of jobs and their logs do."""
    if not name.strip() or "/" in name or "\\" in name or name.startswith((".", "-")) or len(name) > 100:
        raise UserError(
            f"name={name[:120]!r} cannot be part of a file name: give 1 to 100 characters without / and \\, "
            "not beginning with a dot or a dash"
        )
