"""What replaces attention."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MixerConfig:
    """What replaces attention, and how it starts."""

    name: str = "mamba1"
    blocks: dict[int, str] = field(default_factory=dict)
    """Blocks that get another mixer than ``name`` when they are converted: ``{8: mamba2, 9: mamba2}``."""
    d_state: int = 16
    """State size N (at most head_dim)."""
    d_conv: int = 4
    """Taps of the causal convolution."""
    init: str = "mil"
    """``mil`` (from the attention that is replaced), ``aligned`` (from there regressed to the attention's outputs, as
    ``score.aligned`` says) or ``fresh`` (random)."""
    mil_layout: str = "aligned"
    """``aligned`` or ``faithful``: how keys and values meet queries under GQA."""
    z_init: str = "default"
    """``default`` (random) or ``identity`` (the gate starts at about 1)."""
    conv_init: str = "default"
    """``default`` (random) or ``identity`` (the convolution starts as a pass-through)."""
    bc_norm: str = "auto"
    """RMSNorm per head on B and C: ``auto`` (where the teacher has such norms on k and q), ``always`` or ``never``."""

    def of(self, block: int) -> str:
        """The mixer that ``block`` gets when it is converted."""
        return self.blocks.get(block, self.name)
