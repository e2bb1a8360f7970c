"""Which linear layers of a hybrid take a LoRA adapter, by part, as PEFT's ``target_modules`` wants them.

Mixers and attention stand at the same place (``model.layers.N.self_attn``), but no name of the one is a name of the
other, so a list of last names says which is meant.
"""

from __future__ import annotations

from typing import Any

from distill.errors import UserError, choose

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mixers": ("in_proj", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Part of a block -> names of its linear layers. Beside these, ``dt_proj`` of mamba1 can be adapted too.

``conv1d`` cannot: PEFT refuses depthwise convolutions. It is small: train it whole (``modules_to_save``). PEFT
attaches nothing to ``A_log``, ``D`` and ``dt_bias``, which are no modules.
"""


def lora_targets(model: Any, *parts: str) -> list[str]:
    """The names for ``LoraConfig(target_modules=...)``: those of ``parts`` (default: of all) that ``model`` has.

    Raises:
        UserError: an unknown part, or one of which the model has nothing (a teacher has no mixers).
    """
    for part in parts:
        choose("part of a block", part, LORA_TARGETS)
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = {part: [name for name in LORA_TARGETS[part] if name in there] for part in parts or LORA_TARGETS}
    empty = [part for part, names in found.items() if not names]
    if empty and (parts or len(empty) == len(found)):
        raise UserError(
            f"{type(model).__name__} has no {' and no '.join(empty)}: none of its modules is named "
            f"{', '.join(name for part in empty for name in LORA_TARGETS[part])}"
        )
    return [name for names in found.values() for name in names]
