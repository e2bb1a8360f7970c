"""lm-eval's HFLM around a loaded model."""

from __future__ import annotations

from typing import Any

from distill.data.chat import undated


def lm(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """An lm-eval model around a loaded one, which is asked in the tokens that it was trained on: a chat template says
    itself whether a BOS begins the text, and knows no other day than in training."""
    from lm_eval.models.huggingface import HFLM

    model.config.use_cache = True
    return HFLM(
        pretrained=model,
        tokenizer=undated(tokenizer),
        batch_size=batch_size,
        device=str(model.device),
        add_bos_token=None if tokenizer.chat_template is None else False,
    )
