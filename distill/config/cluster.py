"""Where a run works, what is assumed of it, and who is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlurmConfig:
    """Where and how the jobs of a run work (``distill submit``); what a site sets once for all stands in a file of
    ``configs/cluster``."""

    cluster: str = ""
    """Such a file, by its short name or path; its keys are those of this section, and what a config sets itself stands
    above them."""
    partition: str = ""
    light_partition: str = ""
    """That of jobs that need no GPU (empty: ``partition``)."""
    account: str = ""
    qos: str = ""
    time: str = "24:00:00"
    """Limit of one job. A training is asked for a checkpoint before it and goes on in a new start."""
    light_time: str = "01:00:00"
    """That of jobs that need no GPU."""
    nodes: int = 1
    """Nodes of a training; every other job takes one."""
    gpus_per_node: int = 0
    """GPUs of a training on each node (0: it trains on the CPU); scoring and measuring take one."""
    gres: str = ""
    """GPUs as the site names them, ``gpu:h100``, asked for by ``--gres`` with their number (empty:
    ``--gpus-per-node``)."""
    cpus_per_task: int = 2
    """Cores of a training on each node; a job of one GPU takes its share of them."""
    memory: str = "0"
    """Of a training, a node (``0``: all of the node's)."""
    task_memory: str = ""
    """Of any other job that works on a model (empty: as the site gives it)."""
    light_memory: str = "8G"
    """Of jobs that work on none."""
    modules: list[str] = field(default_factory=list)
    """Loaded first: ``module load ...``."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before the step (activation of an environment, variables)."""
    container: str = ""
    """What a command is put behind to run in a container: ``apptainer exec --nv /images/distill.sif``."""
    python: str = ""
    """The Python of the jobs (empty: the one that submits; in a container ``python``)."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, for every job: ``--constraint=h100``."""
    srun: list[str] = field(default_factory=list)
    """Further options of the srun that starts a training."""
    grace: int = 300
    """Seconds before the limit (or, where the site sends it, before a preemption) at which a training is asked for a
    checkpoint: enough for one step and one checkpoint."""
    requeues: int = 100
    """How often a training may go on in a new start."""
    candidates_at_once: int = 0
    """Candidates of one importance score that are worked on side by side (0: as many as the cluster takes)."""


@dataclass
class TrackingConfig:
    """Who else gets the training logs (TensorBoard's files are always written, ``RUN/tensorboard``)."""

    wandb: str = ""
    """Project of Weights & Biases to log to (empty: none); needs the package ``wandb``."""


@dataclass
class PlanConfig:
    """What ``distill plan`` assumes of a device."""

    device_tflops: float = 0.0
    """Peak TFLOP/s of one device (0: measure this machine)."""
    utilisation: float = 0.4
    """Share of the peak that training reaches (MFU)."""
    device_memory: float = 0.0
    """GB of one device, which a step must fit in (0: of this machine's GPU, or without one not checked)."""
    device: str = ""
    """The device that ``target`` is predicted for, such as ``h100``; ``this`` is measured (empty: h100 for bfloat16,
    else this one)."""
    records: list[str] = field(default_factory=list)
    """Run folders whose measured speeds count for ``target`` before predicted ones."""
