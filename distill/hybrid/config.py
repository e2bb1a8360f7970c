"""Hybrid configs: a teacher family's config plus the mixer of every block.

``layer_types`` follows from ``mixers``, so transformers' own caches give each block the slot that it needs.
"""

from __future__ import annotations

from typing import Any

from distill.config import MixerConfig
from distill.errors import UserError, choose
from distill.mixers import ATTENTION, mixer_class

MIXER_KEYS = ("d_state", "d_conv", "mil_layout", "z_init", "conv_init", "bc_norm")


def mixer_options(config: MixerConfig) -> dict[str, Any]:
    """The part of the mixer's config that shapes the module; it is saved with the checkpoint."""
    return {key: getattr(config, key) for key in MIXER_KEYS}


def head_dim(config: Any) -> int:
    """Channels of an attention head: as the config says, or hidden size / heads where a family leaves that open."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class HybridConfigMixin:
    """Adds ``mixers`` (a mixer name per block) and ``mixer_config`` to a family's config.

    ``qkv_bias``: q, k and v have biases, o has none, without a key that says so (Qwen2). ``qk_norm``: q and k have
    norms per head (Qwen3), which a mixer then keeps unless ``mixer_config["bc_norm"]`` says otherwise.
    """

    qkv_bias = False
    qk_norm = False
    mixers: list[str] | None
    mixer_config: dict[str, Any] | None
    num_hidden_layers: int

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixer_config = self.resolved({**mixer_options(MixerConfig()), **(self.mixer_config or {})})
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.head_dim = head_dim(self)

    @classmethod
    def resolved(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Mixer options with ``bc_norm`` as True or False, as a checkpoint keeps it.

        Raises UserError for a choice that there is not.
        """
        chosen = options["bc_norm"]
        if isinstance(chosen, str):
            choices = {"auto": cls.qk_norm, "always": True, "never": False}
            chosen = choices[choose("mixer.bc_norm", chosen, choices)]
        return {**options, "bc_norm": chosen}

    @property
    def layer_types(self) -> list[str]:
        """transformers' name for what each block caches: keys and values, or a state of fixed size."""
        return [
            "full_attention" if mixer == ATTENTION else "linear_attention"
            for mixer in self.mixers or [ATTENTION] * self.num_hidden_layers
        ]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        """Some families have a key of this name; here it always follows from ``mixers``."""

    @property
    def auto_map(self) -> dict[str, Any]:
        """Auto class -> code that came with the config; {} where none did. TRL reads it of every model whose class
        transformers itself has not, and does not expect it to be missing."""
        return self.__dict__.get("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict[str, Any]) -> None:
        """Kept by a class that came with a folder's code (``_auto_class`` is transformers' mark), which is saved beside
        it; by our own only where it names a repository (``owner/name--file.Class``), or what is saved would ask for
        files that are not there."""
        if self._auto_class is not None or all("--" in str(place) for place in value.values()):  # type: ignore[attr-defined]
            self.__dict__["auto_map"] = value

    def check_mixers(self) -> None:
        """Raise UserError where the placement has the wrong length or a mixer does not fit the shapes."""
        assert self.mixers is not None
        if len(self.mixers) != self.num_hidden_layers:
            raise UserError(f"placement has {len(self.mixers)} mixers for {self.num_hidden_layers} blocks")
        if ATTENTION not in self.mixers:
            raise UserError("at least one block must keep attention (transformers' cache counts tokens there)")
        for name in sorted(set(self.mixers) - {ATTENTION}):
            mixer_class(name).check(self)


def hybrid_config_class(teacher: Any, **traits: bool) -> Any:
    """The hybrid config of a family whose own is ``teacher``: ``hybrid_llama`` of ``llama``.

    ``traits`` are the attributes of ``HybridConfigMixin`` in which the family differs.
    """
    keys = {
        "__module__": __name__,
        "__doc__": f"{teacher.__name__} with replaced mixers.",
        "__annotations__": {"mixers": list[str] | None, "mixer_config": dict[str, Any] | None},
        "model_type": f"hybrid_{teacher.model_type}",
        "mixers": None,
        "mixer_config": None,
        **traits,
    }
    made = globals()[f"Hybrid{teacher.__name__}"] = type(
        f"Hybrid{teacher.__name__}", (HybridConfigMixin, teacher), keys
    )
    return made
