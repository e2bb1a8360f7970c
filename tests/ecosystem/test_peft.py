"""PEFT's LoRA on hybrids: it attaches by our lists, trains, is saved, loaded and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from distill.errors import UserError
from distill.hybrid.surgery import keep_fp32
from distill.hybrid.targets import LORA_TARGETS, lora_targets

ALL = [name for names in LORA_TARGETS.values() for name in names]


def adapted(model: Any, *parts: str, **options: Any) -> Any:
    """A model with LoRA on the named parts, B away from zero so that it does something."""
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": lora_targets(model, *parts), **options}
    wrapped = get_peft_model(model, LoraConfig(**options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped


def train(model: Any, ids: Tensor, steps: int = 30) -> list[float]:
    """Losses of a few steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_lists_name_what_is_there(swapped: Any, llama: Any) -> None:
    assert lora_targets(swapped) == ALL
    assert lora_targets(swapped, "mixers") == ["in_proj", "out_proj"]
    assert lora_targets(llama) == [*LORA_TARGETS["attention"], *LORA_TARGETS["mlp"]]
    for part, names in LORA_TARGETS.items():
        wrapped = adapted(swapped, part)
        assert {name.rpartition(".")[2] for name in wrapped.targeted_module_names} == set(names)
        blocks = {name.split(".")[2] for name in wrapped.targeted_module_names}
        assert blocks == {"attention": {"1", "2"}, "mixers": {"0", "3"}, "mlp": {"0", "1", "2", "3"}}[part]
        swapped = wrapped.unload()


def test_what_is_not_there_is_refused(llama: Any) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has no mixers: none of its modules is named in_proj, out_pr"):
        lora_targets(llama, "mixers")
    with pytest.raises(UserError, match=r"unknown part of a block 'mixer' \(did you mean 'mixers'\?\)"):
        lora_targets(llama, "mixer")


@pytest.mark.parametrize("parts", [("mixers",), ("attention", "mixers", "mlp")], ids=["mixers", "all"])
def test_only_adapters_learn_and_the_loss_falls(swapped: Any, chain: Tensor, parts: tuple[str, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in swapped.state_dict().items()}
    model = adapted(swapped, *parts)
    model(input_ids=chain, labels=chain).loss.backward()
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == parameter.requires_grad == ("lora_" in name), name
    losses = train(model, chain)
    assert losses[-1] < 0.7 * losses[0]
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gradients_with_checkpointing_are_the_same(swapped: Any, chain: Tensor) -> None:
    """As trainers have it: inputs of the frozen embedding require gradients, blocks are computed again."""
    model = adapted(swapped).train()
    gradients = []
    for again in (False, True):
        if again:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=chain, labels=chain, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@torch.no_grad()
def test_saved_loaded_and_merged(swapped: Any, chain: Tensor, tmp_path: Path) -> None:
    swapped.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = adapted(base).eval()
    logits = model(chain).logits
    assert not torch.allclose(logits, swapped(chain).logits, atol=0.1), "the adapters do something"
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.suffix for path in (tmp_path / "adapter").iterdir()) == [".json", ".md", ".safetensors"]
    loaded = PeftModel.from_pretrained(swapped, tmp_path / "adapter").eval()
    assert torch.equal(loaded(chain).logits, logits)
    # the adapter's folder names its base, which the Auto classes follow
    assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(chain).logits, logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(chain).logits, logits)

    merged = model.merge_and_unload()
    assert type(merged) is type(swapped)
    torch.testing.assert_close(merged(chain).logits, logits, atol=2e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(chain).logits, merged(chain).logits)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["ours", "all-linear"])
def test_generation_through_the_wrapper(swapped: Any, chain: Tensor, targets: str) -> None:
    """Step by step from the cache as the adapted model says it all at once; a padded batch as each alone."""
    model = adapted(swapped, **({} if targets == "ours" else {"target_modules": targets})).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = model.generate(input_ids=chain[:, :9], **options)
    whole, cache = model(texts).logits, DynamicCache(config=swapped.config)
    assert torch.equal(whole[:, 8:-1].argmax(-1), texts[:, 9:])
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in texts.split([9, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(chain[:, :9])
    mask[0, :4] = 0
    padded = model.generate(input_ids=chain[:, :9], attention_mask=mask, **options)
    alone = model.generate(input_ids=chain[:1, 4:9], **options)
    assert torch.equal(padded[1:], texts[1:]) and torch.equal(padded[0, 9:], alone[0, 5:])


def test_packed_documents_stay_apart(swapped: Any, chain: Tensor) -> None:
    model = adapted(swapped)
    positions = torch.cat([torch.arange(11), torch.arange(13)]).expand(4, -1)

    def second(ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 11:]
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    logits, gradients = second(chain)
    other = torch.cat([chain[:, :11].flip(1), chain[:, 11:]], dim=1)
    changed, changed_gradients = second(other)
    assert torch.equal(logits, changed)
    assert all(torch.equal(one, two) for one, two in zip(gradients, changed_gradients, strict=True))


def test_bf16_keeps_the_exact_parameters(swapped: Any, chain: Tensor) -> None:
    """What is fp32 in a bf16 hybrid stays so inside the wrapper, and merged."""
    keep_fp32(swapped.to(torch.bfloat16))
    model = adapted(swapped)
    losses = train(model, chain)
    assert losses[-1] < 0.7 * losses[0]
    mixer = model.merge_and_unload().model.layers[0].self_attn
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32 and mixer.in_proj.weight.dtype == torch.bfloat16


def test_the_convolution_is_trained_whole_or_not_at_all(swapped: Any, chain: Tensor, tmp_path: Path) -> None:
    """PEFT refuses an adapter there; ``modules_to_save`` trains the module itself, and its new weight is used."""
    with pytest.raises(ValueError, match="Targeting a CausalConv1d with groups="):
        adapted(copy.deepcopy(swapped), target_modules=["in_proj", "conv1d"])
    base = copy.deepcopy(swapped)
    model = adapted(swapped, modules_to_save=["conv1d"])
    train(model, chain, steps=2)
    mixer, old = model.get_base_model().model.layers[0].self_attn, base.model.layers[0].self_attn
    assert not torch.equal(mixer.conv1d.weight, old.conv1d.weight)
    model.eval().save_pretrained(tmp_path)
    logits = model(chain).logits
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(chain).logits, logits)
    texts = model.generate(input_ids=chain[:, :9], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model(texts).logits[:, 8:-1].argmax(-1), texts[:, 9:])
    torch.testing.assert_close(model.merge_and_unload()(chain).logits, logits, atol=2e-4, rtol=1e-4)


def test_all_linear_finds_the_mixers(swapped: Any) -> None:
    model = get_peft_model(swapped, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    found = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert found - {"dt_proj"} == set(ALL)
