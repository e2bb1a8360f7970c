"""Mixers whose weights wait elsewhere (``device_map`` with ``cpu`` or ``disk``): loaded whole, not child by child.

Accelerate loads a module's own weights for the time of its call. A mixer reads those of its convolution and norms
without calling them, so it needs what Accelerate calls ``preload_module_classes``, which ``from_pretrained`` does not
pass on.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def preload_mixers(backbone: nn.Module, args: Any) -> None:
    """Hook before the forward of a backbone: every mixer that Accelerate offloads is loaded with all that is in it."""
    for block in backbone.layers:  # type: ignore[union-attr]
        mixer = block.self_attn
        if hasattr(mixer, "_hf_hook") and hasattr(mixer, "mil_slots"):
            load_whole(mixer)


def load_whole(mixer: nn.Module) -> None:
    """As if Accelerate had been given the mixer's class as one to preload; nothing changes the second time."""
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules

    hook: Any = mixer._hf_hook
    for part in getattr(hook, "hooks", (hook,)):
        if isinstance(part, AlignDevicesHook) and part.offload and not part.place_submodules:
            for child in mixer.children():
                remove_hook_from_submodules(child)
            part.place_submodules = True
