"""A run, and the training of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.config.cluster import PlanConfig, SlurmConfig, TrackingConfig
from distill.config.data import DataConfig
from distill.config.measure import MeasureConfig
from distill.config.mixer import MixerConfig
from distill.config.score import ScoreConfig
from distill.config.train import EngineConfig, SftConfig, TrainConfig


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
    target: str = ""
    """A speed in place of the last h: ``1.8x at 16k`` (so many times the teacher's, one token in and 16,384 out, at the
    largest of ``measure.throughput.batches``; ``..., batch 64`` and ``..., equal memory`` say otherwise). h is the
    smallest that reaches it; stages before it are those of ``schedule`` that are below."""
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
    """``auto``, ``reference``, ``cpu``, ``mamba_ssm`` or ``fla``: the implementation of the mixers' operators (which
    runs where: docs/kernels.md)."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class PretrainConfig:
    """A teacher trained from nothing on the embedded traces."""

    name: str = "teacher"
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of a config.json; ``model_type`` says of which family (by default ``llama``)."""
    start: str = ""
    """A model to go on from (``embedded``, a folder), in place of random weights."""
    output: str = "runs/teacher"
    seed: int = 0
    threads: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
