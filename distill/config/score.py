"""Importance scores."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LooConfig:
    """Leave-one-out: accuracy lost when a block is the identity."""

    task: str = "embedded_choice"
    """A log-likelihood task of lm-eval."""
    questions: int = 500
    """How many questions (0: all); of a real suite drawn over its subjects, the same for every block and run."""
    few_shot: int = -1
    """Examples before each question (-1: as the task says)."""


@dataclass
class MmrConfig:
    """MIL-Mamba-replacement: loss after a short distillation with one more block swapped."""

    steps: int = 100
    heldout_tokens: int = 16384
    """Fixed held-out tokens on which the loss is taken at 0 steps and after the last."""
    trainable: str = "all"
    """``all`` as in the paper; or cheap: ``block`` (the swapped mixer with its block's MLP and norms) or ``mixer``
    (that alone)."""
    lockstep: bool = True
    """Train all candidates of a cheap variant batch by batch, from one pass of the teacher and one of the current
    model; otherwise one after the other. The scores are the same."""
    candidates_at_once: int = 0
    """Candidates in lockstep (0: as many as fit in the free memory)."""
    halving: bool = False
    """Drop the worse half of the candidates at a quarter and at half of the steps."""
    halving_check: bool = False
    """Drop none, but take the losses then as well, and say what halving would have chosen."""


@dataclass
class RecallDropConfig:
    """What a block costs on recall, over what it costs elsewhere."""

    recall: list[str] = field(default_factory=lambda: ["embedded_choice_recall", "embedded_choice_chase"])
    """Log-likelihood tasks that look something up in their context."""
    rest: list[str] = field(
        default_factory=lambda: ["embedded_choice_add", "embedded_choice_mod", "embedded_choice_sort"]
    )
    """Log-likelihood tasks that do not."""
    questions: int = 500
    """How many questions of each kind (0: all)."""


@dataclass
class AlignedConfig:
    """Aligned mixers: regressed, all at once, to the outputs of the attention that they replace. What ``aligned``,
    ``greedy`` and ``kl_restore`` score with, and what a stage starts from with ``mixer.init: aligned``."""

    steps: int = 100
    learning_rate: float = 3e-3
    """Of AdamW, after a tenth of the steps of warm-up, then falling to 0. A wide model wants less (1e-3 for 3B in the
    code of arXiv:2512.20569), a narrow one bears more."""
    batch_size: int = 0
    """Rows a step (0: ``train.batch_size``)."""
    at_once: int = 0
    """Mixers that are trained together, of which the optimizer's state is held (0: all). It changes no bit of them,
    only how often the current model runs."""
    heldout_tokens: int = 16384
    """Fixed held-out tokens on which the KL of every candidate is taken."""


@dataclass
class ScoreConfig:
    """Which importance score each stage uses (docs/importance.md says which at which cost)."""

    first: str = "loo"
    """Of stages that start from the teacher."""
    later: str = "mmr"
    """Of all others."""
    blocks: list[int] = field(default_factory=list)
    """Candidates (empty: every block that still has attention)."""
    compare: list[str] = field(default_factory=list)
    """Other scores to take of the same candidates, which choose nothing; their rank correlation with the one that does
    is recorded. A score, with options of its own: ``[loo, mmr trainable=mixer]``."""
    loo: LooConfig = field(default_factory=LooConfig)
    mmr: MmrConfig = field(default_factory=MmrConfig)
    aligned: AlignedConfig = field(default_factory=AlignedConfig)
    recall_drop: RecallDropConfig = field(default_factory=RecallDropConfig)
    given: list[int] = field(default_factory=list)
    """Of ``given``: blocks in the order in which to replace them, at least as many as the last stage replaces."""
    combine: list[str] = field(default_factory=list)
    """Of ``combine``: the scores whose ranks are averaged, at least two: ``[loo, mmr]``."""
