"""Trainings: the distillation, the engine that shares it among processes, fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.config.data import Origin


@dataclass
class TrainConfig:
    """How a model is trained (AdamW, warm-up, then linear decay)."""

    loss: str = "reverse_kl"
    """``reverse_kl``, ``forward_kl``, ``jsd``, ``annealed_kl`` (forward turning into reverse) or ``cross_entropy``; or
    several with weights: ``0.9 reverse_kl + 0.1 cross_entropy``."""
    temperature: float = 1.0
    """tau, applied to both sides."""
    teacher_mode: str = "auto"
    """Where the frozen teacher is: ``whole`` (on every device), ``offload`` (in the CPU's memory, its blocks brought to
    the device one ahead), ``sharded`` (in parts, as DeepSpeed's ZeRO-3 has the student), ``offline`` (its top-k logits
    are written once and read back: an approximation, whose gap is measured), ``auto`` (sharded under ZeRO-3, else
    whole). docs/distillation.md."""
    teacher_top_k: int = 64
    """Logits that ``offline`` keeps a target."""
    steps: int = 100
    """Optimizer steps a stage."""
    steps_by_stage: list[int] = field(default_factory=list)
    """One number a stage, in place of ``steps``."""
    batch_size: int = 8
    """Rows a step, over all processes and accumulation steps."""
    gradient_accumulation: int = 1
    """Micro-batches that a process's share of ``batch_size`` is cut into."""
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
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Rates of groups of parameters that are not to have ``learning_rate``: mixers, body (attention and MLPs),
    embeddings (and the LM head), norms. ``{mixers: 1.0e-3, embeddings: 1.0e-5}``."""
    freeze: list[str] = field(default_factory=list)
    """Groups that are not trained: ``[embeddings, norms]``."""
    keep_checkpoints: int = 2
    """How many checkpoints of a training under way are kept, the newest ones."""
    keep_best: bool = False
    """Keep the weights of the checkpoint with the lowest held-out loss, as a model of its own, in ``train/best``."""
    on_bad_loss: str = "stop"
    """What follows a loss or gradient that is not finite, or a spike: ``stop``, ``skip`` (that step's update is left
    out) or ``roll_back`` (to the newest checkpoint, and the update is left out). The rows are noted."""
    spike: float = 0.0
    """A loss above so many times the median of those before is a spike (0: none is)."""
    data_workers: int = 0
    """Processes that prepare rows beside each process that trains (0: it does so itself). The rows are the same."""


@dataclass
class EngineConfig:
    """What shares a training among the processes that torchrun starts (docs/distributed.md)."""

    name: str = "auto"
    """``auto`` (one process alone, several by ddp), ``none`` (refuses several), ``ddp``, ``deepspeed`` or ``fsdp``."""
    config: str = ""
    """Of deepspeed: ``zero1``, ``zero2``, ``zero3``, ``zero2_offload``, ``zero3_offload``, or a JSON file of its own
    keys (empty: zero3). Of fsdp: ``full`` (everything in parts), ``grad_op`` (weights stay whole between forward and
    backward) or ``offload`` (empty: full)."""
    timeout: float = 600.0
    """Seconds without progress after which a process counts as lost: it is named, and the job ends."""


@dataclass
class SftConfig(Origin):
    """Fine-tuning of a distilled stage on traces, and its merge with that stage (the paper's H1-30-SFT)."""

    source: str = ""
    """Traces, as in ``data.source``, with split, subset, revision and columns of their own (empty: the run's data)."""
    steps: int = 100
    """Optimizer steps; what is not set here (weight decay, clipping, ...) is as in ``train``."""
    batch_size: int = 8
    """Rows a step, over all processes and accumulation steps."""
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    warmup_steps: int = 10
    save_steps: int = 0
    """Checkpoint every so many steps (0: only at the end)."""
    alpha: float = 0.5
    """Weight of the fine-tuned model in the merge: alpha * SFT + (1 - alpha) * H1-h."""
