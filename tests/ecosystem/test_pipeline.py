"""``pipeline("text-generation")`` on a saved hybrid: prompts, batches, chats, and what generate would say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from distill.config import MixerConfig
from distill.hybrid.surgery import hybridize

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=["mamba1", "mamba2"])
def folder(request: pytest.FixtureRequest, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    hybrid = hybridize(make_model("llama"), [request.param, "attention", "attention", "mamba1"], MixerConfig(), seed=0)
    hybrid.generation_config.eos_token_id = None  # a random model would end where it likes
    hybrid.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_prompts_batches_and_chats(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder))
    prompts = ["3 + 4 =", "12 + 5 + 6 ="]
    alone = []
    for prompt in prompts:
        ids = generator.tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = generator.model.generate(ids, **OPTIONS)[0, ids.shape[1] :]
        text = generator(prompt, return_full_text=False, **OPTIONS)[0]["generated_text"]
        assert text == generator.tokenizer.decode(made, skip_special_tokens=True)
        alone.append(text)
    generator.tokenizer.padding_side = "left"
    batch = generator(prompts, batch_size=2, return_full_text=False, **OPTIONS)
    assert [made[0]["generated_text"] for made in batch] == alone
    chat = [{"role": "user", "content": "3 + 4 ="}]
    answer = generator(chat, **OPTIONS)[0]["generated_text"]
    assert answer[:1] == chat and answer[1]["role"] == "assistant" and answer[1]["content"]
    ids = generator.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = generator.model.generate(ids, **OPTIONS)[0, ids.shape[1] :]
    assert answer[1]["content"] == generator.tokenizer.decode(made, skip_special_tokens=True)


def test_options_reach_the_model(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder), device_map="cpu", dtype=torch.bfloat16)
    assert generator.model.dtype == torch.bfloat16
    several = generator("3 + 4 =", num_beams=3, num_return_sequences=3, max_new_tokens=4)
    assert len({made["generated_text"] for made in several}) == 3
    with pytest.raises(ValueError, match="takes tokens back"):
        generator("3 + 4 =", prompt_lookup_num_tokens=2)
