"""What shares a training among processes: DDP, DeepSpeed ZeRO or FSDP2, as Hugging Face's Trainer takes them.

Everything that the run says itself (batch, clipping, precision, optimizer) is filled into the engine's own config, and
a file that says otherwise is refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from distill import distributed
from distill.config import EngineConfig, TrainConfig
from distill.errors import UserError, choose, nearest

ENGINES = ("auto", "none", "ddp", "deepspeed", "fsdp")
NEED_LAUNCHER = ("deepspeed", "fsdp")
"""Engines that train by a job's processes even where it has a single one."""
FSDP = {
    "full": {"reshard_after_forward": True},
    "grad_op": {"reshard_after_forward": False},
    "offload": {"reshard_after_forward": True, "cpu_offload": True},
}
ON_CPU = {"deepspeed": "DEEPSPEED", "fsdp": "MULTI_GPU"}
"""What Accelerate has to take a process for where there is no GPU, to use the engine at all."""
RUNS_OWN = {"optimizer": "train.learning_rate and train.beta2", "scheduler": "train.warmup_steps", "fp16": "dtype"}
"""Parts of a DeepSpeed config that the run has keys for."""


def presets() -> dict[str, Path]:
    """Name -> file of the DeepSpeed configs that we ship."""
    folder = Path(str(resources.files("configs"))) / "deepspeed"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def engine_of(engine: EngineConfig, world: int) -> str:
    """The engine that a training by ``world`` processes uses: ``none``, ``ddp``, ``deepspeed`` or ``fsdp``."""
    if engine.name == "auto":
        return "ddp" if world > 1 else "none"
    return engine.name


def zero_stage(engine: EngineConfig) -> int:
    """ZeRO's stage, 0 to 3; that which FSDP2 corresponds to; 0 for DDP."""
    if engine.name == "fsdp":
        return 2 if engine.config == "grad_op" else 3
    return int(read_deepspeed(engine)["zero_optimization"].get("stage", 0)) if engine.name == "deepspeed" else 0


def sharded(engine: EngineConfig) -> bool:
    """Whether DeepSpeed has the model in parts."""
    return engine.name == "deepspeed" and zero_stage(engine) == 3


TEACHER_MODES = ("auto", "whole", "offload", "sharded", "offline")


def check_teacher_mode(train: TrainConfig, engine: EngineConfig | None) -> None:
    """Raise UserError for a teacher that could not be where ``train.teacher_mode`` says."""
    choose("train.teacher_mode", train.teacher_mode, TEACHER_MODES)
    if engine is None and train.teacher_mode != "auto":
        raise UserError(f"train.teacher_mode={train.teacher_mode}: this training has no teacher")
    if engine is not None and train.teacher_mode == "sharded" and not sharded(engine):
        raise UserError(
            "train.teacher_mode=sharded has the teacher in parts as ZeRO-3 has the student: set engine.name=deepspeed "
            "with engine.config=zero3, or take train.teacher_mode=offload"
        )


def teacher_mode_of(train: TrainConfig, engine: EngineConfig) -> str:
    """Where the teacher of a training is: ``train.teacher_mode``, or what ``auto`` stands for."""
    if train.teacher_mode != "auto":
        return train.teacher_mode
    return "sharded" if sharded(engine) else "whole"


def offloaded(engine: EngineConfig) -> tuple[bool, bool]:
    """Whether the optimizer's state, and the weights, wait in the CPU's memory."""
    if engine.name == "fsdp":
        return (engine.config == "offload",) * 2
    if engine.name != "deepspeed":
        return False, False
    zero = read_deepspeed(engine)["zero_optimization"]
    optimizer, weights = (zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param"))
    return optimizer != "none", weights != "none"


def buffered(engine: EngineConfig, hidden: int) -> float:
    """How many gradients DeepSpeed's buffers hold on the way to the other processes, for a hidden size: one buffer, two
    where sending overlaps with computing. It takes their memory whatever the size of the model."""
    if engine.name != "deepspeed":
        return 0.0
    zero = read_deepspeed(engine)["zero_optimization"]
    size = zero.get("reduce_bucket_size", 5e8)  # its default; 2 GB
    two = zero.get("overlap_comm", False) and zero.get("stage", 0) < 3
    return (hidden**2 if size == "auto" else float(size)) * (1 + two)


def check_engine(engine: EngineConfig, train: TrainConfig, dtype: str, world: int, key: str = "train") -> None:
    """Raise UserError where an engine cannot be had, contradicts the run, or cannot share its batch (``key``: the part
    of the config that says how it is trained)."""
    choose("engine.name", engine.name, ENGINES)
    if not engine.timeout >= 1:
        raise UserError(f"engine.timeout={engine.timeout} must be at least 1 second")
    if engine.config and engine.name not in ("deepspeed", "fsdp"):
        raise UserError(
            f"engine.config={engine.config} with engine.name={engine.name}, which has none: set engine.name=deepspeed "
            "or fsdp, or remove engine.config"
        )
    if engine.name == "none" and world > 1:
        raise UserError(f"engine.name=none trains in one process, and {world} were started: set engine.name=ddp")
    if engine.name == "fsdp":
        choose("engine.config", engine.config or "full", FSDP)
    check_shares(train, world, key)
    if engine.name == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "engine.name=deepspeed needs the package deepspeed, which is not installed: "
                "pip install 'distill-hybrid[deepspeed]', or set engine.name=ddp or fsdp"
            )
        deepspeed_settings(engine, train, dtype, world)


def check_shares(train: TrainConfig, world: int, key: str = "train") -> None:
    """Raise UserError where the rows of a step cannot be shared out in equal micro-batches."""
    if train.batch_size % train.gradient_accumulation:
        raise UserError(
            f"{key}.batch_size={train.batch_size} is not divisible by "
            f"{key}.gradient_accumulation={train.gradient_accumulation}"
        )
    if train.batch_size % (train.gradient_accumulation * world):
        rows = train.gradient_accumulation * world
        lower = train.batch_size // rows * rows
        raise UserError(
            f"{key}.batch_size={train.batch_size} rows cannot be shared by {world} processes in "
            f"{key}.gradient_accumulation={train.gradient_accumulation} micro-batches: it must be a multiple of "
            f"{rows}, such as {lower or rows}{f' or {lower + rows}' if lower else ''}"
        )


def read_deepspeed(engine: EngineConfig) -> dict[str, Any]:
    """The JSON that ``engine.config`` names; UserError where it cannot be had."""
    name = engine.config or "zero3"
    path = presets().get(name, Path(name).expanduser())
    if not path.is_file():
        known = presets()
        raise UserError(
            f"engine.config={name} is no DeepSpeed config{nearest(name, known)}; give a JSON file or one of: "
            f"{', '.join(known)}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or not isinstance(settings.setdefault("zero_optimization", {}), dict):
            raise ValueError("no object with zero_optimization")
    except (OSError, ValueError) as error:
        raise UserError(f"engine.config={path} cannot be read as a DeepSpeed config: {error}") from error
    return settings


def deepspeed_settings(engine: EngineConfig, train: TrainConfig, dtype: str, world: int) -> dict[str, Any]:
    """DeepSpeed's config of a run, every ``auto`` that the run knows filled in.

    Raises UserError where the file says something else than the run.
    """
    settings, name = read_deepspeed(engine), engine.config or "zero3"
    for key, ours in RUNS_OWN.items():
        if settings.get(key, {}) and settings[key].get("enabled", True):
            raise UserError(f"engine.config={name} has '{key}', which is the run's own: remove it and set {ours}")
    micro = train.batch_size // train.gradient_accumulation // world
    owned = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (
            micro,
            "train.batch_size / train.gradient_accumulation / processes",
        ),
        "gradient_accumulation_steps": (train.gradient_accumulation, "train.gradient_accumulation"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
    }
    for key, (value, ours) in owned.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'engine.config={name} has {key}={settings[key]}, and the run {value} ({ours}): write "auto" there, '
                "or make them equal"
            )
        settings[key] = value
    half = dtype == "bfloat16"
    for part in ("bf16", "torch_autocast"):
        enabled = settings.get(part, {}).get("enabled", False)
        if enabled is True and not half:
            raise UserError(
                f"engine.config={name} computes in bfloat16 ({part}), and the run in dtype={dtype}: make them equal"
            )
        if enabled == "auto":
            settings[part]["enabled"] = half
    if half and not any(settings.get(part, {}).get("enabled") for part in ("bf16", "torch_autocast")):
        raise UserError(
            f"engine.config={name} computes in float32, and the run in dtype=bfloat16: "
            'add "torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}'
        )
    zero = settings["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("pin_memory") == "auto":
            zero[part]["pin_memory"] = torch.cuda.is_available()
    return settings


def arguments_of(engine: EngineConfig, train: TrainConfig, dtype: str, world: int) -> dict[str, Any]:
    """What the engine adds to (or changes in) the Trainer's arguments."""
    name = engine_of(engine, world)
    configured = {} if torch.cuda.is_available() else {"accelerator_config": {"use_configured_state": True}}
    if name == "deepspeed":
        settings = deepspeed_settings(engine, train, dtype, world)
        half = bool(settings.get("bf16", {}).get("enabled"))
        return {"deepspeed": settings, "bf16": half, "use_cpu": False, **configured}
    if name == "fsdp":
        parts = FSDP[engine.config or "full"]
        checkpointing = {"activation_checkpointing": True} if train.gradient_checkpointing else {}
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT", "version": 2}
        return {
            "fsdp": True,
            "fsdp_config": {**wrap, **parts, **checkpointing},
            "activation_checkpointing": False,
            **configured,
        }
    return {}


def prepare(engine: EngineConfig) -> None:
    """Make the engine ready in a process that has joined the others (``Job.together``)."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    on_gpu = torch.cuda.is_available()
    if engine.name in ON_CPU and not on_gpu:  # without a GPU Accelerate knows no engine but DDP
        state = PartialState(cpu=True, backend="gloo")
        state._shared_state["distributed_type"] = DistributedType[ON_CPU[engine.name]]
    if engine.name != "deepspeed":
        return
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if not on_gpu:  # it would compile an operator for its collectives (80 s); gloo serves without
        for name in deepspeed.ops.__compatible_ops__:
            deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def release() -> None:
    """After a training: libraries take this process for a single one again, and load models whole."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def wrapped_by(model: Any) -> str:
    """The engine that a model is trained by, seen from what it was wrapped in."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    names = {"DeepSpeedEngine": "deepspeed", "FSDPModule": "fsdp", "DistributedDataParallel": "ddp"}
    return next((names[kind] for kind in kinds if kind in names), "none")


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within, models are loaded whole though a training by ZeRO-3 is set up, which else has them in parts."""
    from transformers.integrations import deepspeed as integration

    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


@contextmanager
def sharing(engine: EngineConfig) -> Iterator[None]:
    """A training by all processes of the job; nothing but the training where this process is alone."""
    job = distributed.job()
    if job is None or (job.world == 1 and engine_of(engine, 1) in ("none", "ddp")):
        yield
        return
    with job.together(engine.timeout):
        prepare(engine)
        try:
            yield
        finally:
            release()
