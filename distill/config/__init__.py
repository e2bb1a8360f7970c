"""Typed configuration: every key, what it means and its default; a file for each part.

``RunConfig`` is one distillation run, ``PretrainConfig`` the training of a teacher from nothing. How files and the
command line are laid over the defaults stands in ``distill/config_merge.py``.
"""

from __future__ import annotations

from distill.config.cluster import PlanConfig, SlurmConfig, TrackingConfig
from distill.config.data import DataConfig, Origin, SourceConfig
from distill.config.measure import MeasureConfig, ThroughputConfig
from distill.config.mixer import MixerConfig
from distill.config.run import PretrainConfig, RunConfig
from distill.config.score import AlignedConfig, LooConfig, MmrConfig, RecallDropConfig, ScoreConfig
from distill.config.train import EngineConfig, SftConfig, TrainConfig

__all__ = [
    "VERSION",
    "AlignedConfig",
    "DataConfig",
    "EngineConfig",
    "LooConfig",
    "MeasureConfig",
    "MixerConfig",
    "MmrConfig",
    "Origin",
    "PlanConfig",
    "PretrainConfig",
    "RecallDropConfig",
    "RunConfig",
    "ScoreConfig",
    "SftConfig",
    "SlurmConfig",
    "SourceConfig",
    "ThroughputConfig",
    "TrackingConfig",
    "TrainConfig",
]

VERSION = 1
"""Format of ``run.yaml``: raised when a program that knows only the one before could not go on with a run."""
