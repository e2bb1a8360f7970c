"""Surgery: what stays stays bit for bit, what is new depends on the seed and the block, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.config import mixer_options
from distill.hybrid.model import FAMILIES
from distill.hybrid.surgery import check_convertible, check_teacher, hybrid_config, hybridize

A, M = "attention", "mamba1"


def mixer_of(model: Any, block: int) -> dict[str, torch.Tensor]:
    return model.model.layers[block].self_attn.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_kept_weights_are_bit_identical(family: Any) -> None:
    hybrid = hybridize(family, [A, M, M, A], MixerConfig())
    weights, kept = hybrid.state_dict(), 0
    for name, tensor in family.state_dict().items():
        if not name.startswith(("model.layers.1.self_attn.", "model.layers.2.self_attn.")):
            assert torch.equal(weights[name], tensor), name
            assert weights[name].data_ptr() != tensor.data_ptr(), f"{name} is shared with the teacher"
            kept += 1
    assert kept > 20
    tied = hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
    assert tied == family.config.tie_word_embeddings


def test_new_mixers_depend_on_seed_and_block_alone(llama: Any) -> None:
    alone = hybridize(llama, [A, A, M, A], MixerConfig(), seed=5)
    torch.manual_seed(123)  # whatever the program drew before
    together = hybridize(llama, [M, A, M, M], MixerConfig(), seed=5)
    staged = hybridize(hybridize(llama, [M, A, A, M], MixerConfig(), seed=1), [M, A, M, M], MixerConfig(), seed=5)
    assert equal(mixer_of(alone, 2), mixer_of(together, 2))
    assert equal(mixer_of(alone, 2), mixer_of(staged, 2))
    other_seed = hybridize(llama, [A, A, M, A], MixerConfig(), seed=6)
    assert not torch.equal(mixer_of(alone, 2)["dt_proj.weight"], mixer_of(other_seed, 2)["dt_proj.weight"])
    assert not torch.equal(mixer_of(together, 0)["dt_proj.weight"], mixer_of(together, 2)["dt_proj.weight"])


def test_fresh_mixers_depend_on_seed_and_block_alone(llama: Any) -> None:
    torch.manual_seed(1)
    alone = hybridize(llama, [A, A, M, A], MixerConfig(init="fresh"), seed=5)
    torch.manual_seed(2)
    together = hybridize(llama, [M, A, M, M], MixerConfig(init="fresh"), seed=5)
    assert equal(mixer_of(alone, 2), mixer_of(together, 2))


@pytest.mark.parametrize("init", ["mil", "fresh"])
def test_global_random_state_is_untouched(llama: Any, init: str) -> None:
    before = torch.get_rng_state()
    hybridize(llama, [A, M, A, A], MixerConfig(init=init), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_source_is_untouched(family: Any) -> None:
    weights, config = snapshot(family), family.config.to_dict()
    hybrid = hybridize(family, [M, A, A, A], MixerConfig())
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(1)
    hybrid.config.use_cache = False
    assert equal(family.state_dict(), weights)
    assert family.config.to_dict() == config


def test_a_stage_keeps_the_mixers_distilled_before(hybrid: Any) -> None:
    """H1-2/4 -> H1-3/4: the two mixers, since changed by training, come along."""
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.01).add_(0.003)
    further = hybridize(hybrid, [M, M, A, M], MixerConfig())
    for block in (0, 3):
        assert equal(mixer_of(further, block), mixer_of(hybrid, block))
    assert torch.equal(further.model.embed_tokens.weight, hybrid.model.embed_tokens.weight)


def test_a_stage_keeps_fp32_parameters_of_a_bf16_hybrid(llama: Any) -> None:
    """A_log and D are fp32 whatever the rest is; another swap must not round what training gave them."""
    hybrid = hybridize(llama.to(torch.bfloat16), [M, A, A, A], MixerConfig())
    mixer = hybrid.model.layers[0].self_attn
    with torch.no_grad():
        mixer.A_log.add_(1e-4)
        mixer.D.add_(1e-4)
    further = hybridize(hybrid, [M, M, A, A], MixerConfig()).model.layers[0].self_attn
    assert further.A_log.dtype == further.D.dtype == torch.float32
    assert torch.equal(further.D, mixer.D)
    assert torch.equal(further.A_log, mixer.A_log)


def test_new_mixers_of_a_bf16_teacher_start_with_exact_decay_rates(llama: Any) -> None:
    hybrid = hybridize(llama.to(torch.bfloat16), [M, A, A, A], MixerConfig())
    rates = hybrid.model.layers[0].self_attn.A_log.exp()
    assert torch.allclose(rates, torch.arange(1.0, 17).expand_as(rates), rtol=1e-6)
    assert hybrid.model.layers[0].self_attn.in_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("option", [{"mil_layout": "faithful"}, {"d_state": 8}, {"z_init": "identity"}])
def test_a_stage_cannot_change_what_shapes_the_mixers_it_keeps(llama: Any, option: dict[str, Any]) -> None:
    """One mixer_config holds for all blocks: another one would reinterpret those already distilled."""
    hybrid = hybridize(llama, [M, A, A, A], MixerConfig(mil_layout="aligned"))
    with pytest.raises(UserError):
        hybridize(hybrid, [M, M, A, A], MixerConfig(**option))


def test_device_dtype_and_mode_are_the_sources(make_llama: Callable[..., Any]) -> None:
    teacher = make_llama(attention_bias=True)
    assert not hybridize(teacher, [A, M, A, A], MixerConfig()).training
    assert hybridize(teacher.train(), [A, M, A, A], MixerConfig()).training
    hybrid = hybridize(teacher.to(torch.bfloat16), [A, M, A, A], MixerConfig())
    dtypes = {name.split(".")[-1]: p.dtype for name, p in hybrid.model.layers[1].named_parameters()}
    assert dtypes.pop("A_log") == dtypes.pop("D") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("bert", {}, ["an encoder, whose attention looks both ways"]),
    ("modernbert", {}, ["an encoder, whose attention looks both ways"]),
    ("t5", {}, ["an encoder-decoder"]),
    ("whisper", {}, ["an encoder-decoder"]),
    ("mistral", {}, ["sliding-window attention (sliding_window=4096)"]),
    ("gemma2", {}, ["sliding-window attention", "logit softcapping (attn_logit_softcapping=50.0)"]),
    ("gemma3_text", {}, ["sliding-window attention"]),
    ("gemma3", {}, ["a multimodal model", "sliding-window attention"]),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, ["sliding-window attention (sliding_window=4096)"]),
    ("qwen3", {"layer_types": ["sliding_attention"] * 32}, ["sliding-window attention"]),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, ["sliding-window attention (sliding_window=9)"]),
    ("deepseek_v2", {}, ["multi-head latent attention (MLA)", "a mixture of experts"]),
    ("deepseek_v3", {}, ["multi-head latent attention (MLA)", "a mixture of experts"]),
    ("minicpm3", {}, ["multi-head latent attention (MLA)"]),
    ("mixtral", {}, ["a mixture of experts (MoE, num_local_experts=8)"]),
    ("qwen3_moe", {}, ["a mixture of experts (MoE, num_local_experts=128)"]),
    ("granitemoe", {}, ["a mixture of experts"]),
    ("jamba", {}, ["a hybrid already"]),
    ("bamba", {}, ["a hybrid already"]),
    ("granitemoehybrid", {}, ["a hybrid already"]),
    ("zamba2", {}, ["a hybrid already"]),
    ("falcon_h1", {}, ["a hybrid already"]),
    ("nemotron_h", {}, ["a hybrid already"]),
    ("qwen3_next", {}, ["a hybrid already"]),
    ("mamba", {}, ["a pure state-space model"]),
    ("mamba2", {}, ["a pure state-space model"]),
    ("rwkv", {}, ["a pure state-space model"]),
    ("mllama", {}, ["a multimodal model"]),
    ("qwen2_vl", {}, ["a multimodal model"]),
    ("gpt2", {}, ["its blocks are not of a kind that is known here"]),
    ("phi3", {}, ["its blocks are not of a kind that is known here"]),
    ("llama", {"per_layer_config": {1: {"num_key_value_heads": 8}}}, ["blocks that differ from each other"]),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised weights"]),
]


@pytest.mark.parametrize(
    ("architecture", "keys", "reasons"), REFUSED, ids=[f"{row[0]}-{i}" for i, row in enumerate(REFUSED)]
)
def test_what_cannot_be_converted_is_refused_by_its_config(
    architecture: str, keys: dict[str, Any], reasons: list[str]
) -> None:
    config = AutoConfig.for_model(architecture, **keys)
    with pytest.raises(UserError) as error:
        check_convertible(config)
    first, last = str(error.value).splitlines()
    assert first.startswith(f"architecture '{architecture}' cannot be converted: ")
    assert all(reason in first for reason in reasons), first
    assert (
        last
        == "supported: llama, mistral, qwen2, qwen3, granite, smollm3, dense and with full attention in every block"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_full_attention_are_taken(family: str) -> None:
    """A window that no block uses is none: Qwen names one in every config."""
    window = {"sliding_window": 4096 if family in ("qwen2", "qwen3", "smollm3") else None}
    assert check_convertible(AutoConfig.for_model(family, use_sliding_window=False, **window)) == family
    if family in ("qwen2", "qwen3"):
        beyond = AutoConfig.for_model(family, use_sliding_window=True, max_window_layers=99, **window)
        assert check_convertible(beyond) == family


def test_a_hybrid_with_a_window_is_refused_too() -> None:
    """Whatever its layer types say: Mistral's attention looks at the window alone."""
    with pytest.raises(UserError, match="sliding_window=16"):
        check_convertible(AutoConfig.for_model("hybrid_mistral", sliding_window=16))


def test_options_that_a_checkpoint_does_not_name_follow_from_its_family() -> None:
    shape = {"num_hidden_layers": 2, "mixers": [A, M], "layer_types": ["full_attention"] * 2}
    for family, norms in (("llama", False), ("qwen3", True)):
        config = AutoConfig.for_model(f"hybrid_{family}", mixer_config={"d_state": 8}, **shape)
        assert config.mixer_config == {**mixer_options(MixerConfig()), "d_state": 8, "bc_norm": norms}
        assert config.layer_types == ["full_attention", "linear_attention"], "whatever the file says"


def test_a_hybrid_of_ours_is_no_teacher(hybrid: Any, llama: Any) -> None:
    assert check_teacher(llama.config) == check_convertible(hybrid.config) == "llama"
    with pytest.raises(UserError, match=r"hybrid of ours already .hybrid_llama, 2 of 4 blocks(.|\n)*start_from"):
        check_teacher(hybrid.config)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([A, M, A], "placement has 3 mixers for 4 blocks"),
        ([A, M, A, A, A], "placement has 5 mixers for 4 blocks"),
        ([M, M, M, M], "at least one block must keep attention"),
        ([A, "mamba", A, A], "unknown mixer 'mamba'.*did you mean 'mamba2'"),
    ],
)
def test_placements_that_do_not_fit(llama: Any, placement: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hybridize(llama, placement, MixerConfig())
    with pytest.raises(UserError, match=message):  # and before any weight is there
        hybrid_config(llama.config, placement, MixerConfig())


def test_a_mixer_cannot_be_changed_back(hybrid: Any) -> None:
    with pytest.raises(UserError, match="block 0 has mixer 'mamba1' already"):
        hybridize(hybrid, [A, A, A, M], MixerConfig())


def test_unknown_initialisation_is_refused(llama: Any) -> None:
    with pytest.raises(UserError, match="'mill'.*did you mean 'mil'"):
        hybridize(llama, [A, M, A, A], MixerConfig(init="mill"))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taken_tensors_are_the_models_own(
    make_llama: Callable[..., Any], mixer: str, tied: bool, dtype: torch.dtype
) -> None:
    """The same hybrid, bit for bit, without a second model in memory."""
    model = make_llama(tie_word_embeddings=tied).to(dtype)
    placement = [mixer, "attention", "attention", mixer]
    copied = hybridize(model, placement, MixerConfig(), seed=3)
    taken = hybridize(model, placement, MixerConfig(), seed=3, take=True)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for name, tensor in copied.state_dict().items():
        found = taken.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert (found.data_ptr() in own) == (".0.self_attn" not in name and ".3.self_attn" not in name), name
    assert not any(tensor.is_meta for tensor in (*taken.parameters(), *taken.buffers()))
    ids = torch.arange(5, 29)[None]
    assert torch.equal(taken.eval()(ids).logits, copied.eval()(ids).logits)
    assert (taken.lm_head.weight is taken.model.embed_tokens.weight) == tied
