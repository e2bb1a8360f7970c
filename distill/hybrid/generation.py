"""Hybrids in transformers' ``generate``: the masks that it makes ahead, and a refusal of what cannot work."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask

ROLLING_BACK = {
    GenerationMode.ASSISTED_GENERATION: "assisted generation (assistant_model, prompt_lookup_num_tokens)",
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search (penalty_alpha)",
}


class Generation:
    """Mixed into the model class before the family's own."""

    config: Any
    device: Any

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, position_ids: Any = None, **_: Any
    ) -> Any:
        """Masks that ``generate`` makes ahead of forward for a static cache: one ready for attention, and for the
        mixers the padding mask as it is, until every row has begun and they need it no more."""
        ready = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if "linear_attention" not in config.layer_types:
            return ready
        read = getattr(past_key_values, "hybrid_read", None)
        decodes = inputs_embeds.shape[1] == 1 and read is not None and read.begun
        return {"full_attention": ready, "linear_attention": None if decodes else attention_mask}

    def _validate_generation_mode(self, generation_mode: Any, generation_config: GenerationConfig, kwargs: Any) -> None:
        """Raise ValueError, before any work, for what a hybrid cannot do."""
        name, replaced = type(self).__name__, "linear_attention" in self.config.layer_types
        mode = ROLLING_BACK.get(generation_mode)
        if replaced and (mode or generation_config.is_assistant):
            raise ValueError(
                f"{name} cannot do {mode or 'the drafts of assisted generation'}: that takes tokens back, and a "
                "recurrent state cannot forget one; leave it out (greedy, sampling and beams work)"
            )
        cache = generation_config.cache_implementation
        if replaced and cache == "quantized":
            raise ValueError(
                f"cache_implementation='quantized' has no place for the recurrent states of {name}; allowed: dynamic, "
                "static, offloaded, offloaded_static"
            )
        if cache in ("offloaded", "offloaded_static") and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation='{cache}' keeps the cache of a model on a GPU in the CPU's memory, but this "
                f"model is on the CPU; use {'static' if 'static' in cache else 'dynamic'}"
            )
        super()._validate_generation_mode(generation_mode, generation_config, kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own, where every block has attention; otherwise ValueError."""
        if "linear_attention" in self.config.layer_types:
            raise ValueError(
                "continuous batching (generate_batch, cache_implementation='paged') keeps keys and values in pages and "
                f"has no place for the recurrent states of {type(self).__name__}; use generate with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
