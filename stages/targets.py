"""What a verb works on: finding configs and runs, and refusing values that no step could work with."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from distill.config import RunConfig, load_config
from distill.data.mixture import check_options
from distill.errors import UserError, choose, nearest
from distill.importance import available as scores
from distill.importance.mmr import TRAINABLE
from distill.init import available as initialisations
from distill.losses import LOSSES
from distill.mixers import available as mixers
from distill.teacher import DTYPES


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
    raise UserError(f"no config '{target}'{nearest(target, shipped)}; give a YAML file or one of: {', '.join(shipped)}")


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


def check(config: RunConfig) -> None:
    """Raise UserError for values that no step could work with."""
    choose("dtype", config.dtype, DTYPES)
    choose("kernels", config.kernels, ("auto", "reference", "cpu"))
    choose("mixer.name", config.mixer.name, mixers())
    choose("mixer.init", config.mixer.init, initialisations())
    choose("train.loss", config.train.loss, LOSSES)
    check_options(config.data)
    for name in (config.score.first, config.score.later):
        choose("score", name, scores())
    choose("score.mmr.trainable", config.score.mmr.trainable, TRAINABLE)
    train, sft, throughput = config.train, config.sft, config.measure.throughput
    positive = {
        "data.sequence_length": config.data.sequence_length,
        "train.batch_size": train.batch_size,
        "train.gradient_accumulation": train.gradient_accumulation,
        "train.temperature": train.temperature,
        "train.learning_rate": train.learning_rate,
        "train.eval_rows": train.eval_rows,
        "sft.steps": sft.steps,
        "sft.batch_size": sft.batch_size,
        "sft.gradient_accumulation": sft.gradient_accumulation,
        "sft.learning_rate": sft.learning_rate,
        "plan.utilisation": config.plan.utilisation,
        "score.mmr.steps": config.score.mmr.steps,
        "score.mmr.heldout_tokens": config.score.mmr.heldout_tokens,
        "measure.batch_size": config.measure.batch_size,
        "measure.throughput.repeats": throughput.repeats,
        **{f"train.steps_by_stage[{i}]": steps for i, steps in enumerate([*train.steps_by_stage, train.steps])},
        **{f"train.keep_steps[{i}]": step for i, step in enumerate(train.keep_steps)},
        **{f"measure.throughput.batches[{i}]": b for i, b in enumerate(throughput.batches)},
        **{f"measure.throughput.contexts[{i}]": c for i, c in enumerate(throughput.contexts)},
    }
    at_least_0 = {
        "seed": config.seed,
        "threads": config.threads,
        "train.warmup_steps": train.warmup_steps,
        "train.save_steps": train.save_steps,
        "train.mixer_learning_rate": train.mixer_learning_rate,
        "train.weight_decay": train.weight_decay,
        "train.max_grad_norm": train.max_grad_norm,
        "sft.warmup_steps": sft.warmup_steps,
        "sft.save_steps": sft.save_steps,
        "score.loo.questions": config.score.loo.questions,
        "measure.limit": config.measure.limit,
        "measure.max_new_tokens": config.measure.max_new_tokens,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{key}={value} must be above 0")
    for key, value in at_least_0.items():
        if not value >= 0:
            raise UserError(f"{key}={value} must be at least 0")
    if not 0 <= train.beta2 < 1:
        raise UserError(f"train.beta2={train.beta2} must be in [0, 1)")
    if not throughput.batches or throughput.output_tokens < 2:
        raise UserError("measure.throughput needs at least one batch and output_tokens of at least 2")
    if not 0 <= sft.alpha <= 1:
        raise UserError(f"sft.alpha={sft.alpha} must be in [0, 1]: merged = alpha * SFT + (1 - alpha) * H1-h")
    for key, part in (("train", train), ("sft", sft)):
        if part.batch_size % part.gradient_accumulation:
            raise UserError(
                f"{key}.batch_size={part.batch_size} is not divisible by "
                f"{key}.gradient_accumulation={part.gradient_accumulation}"
            )
