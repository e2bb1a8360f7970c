"""The tensors of a GGUF file, beside transformers' own classes in the place of llama.cpp: no GGUF is written here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from distill.config import MixerConfig
from distill.errors import UserError
from distill.export import available, gguf, obstacles
from distill.export.gguf_weights import SSM, architecture, interleaved, rope_factors, to_gguf
from distill.export.granite import container_config
from distill.hybrid.surgery import hybridize
from stages.cli import main

NAMES = {
    "ssm_in.weight": "in_proj.weight", "ssm_conv1d.weight": "conv1d.weight", "ssm_conv1d.bias": "conv1d.bias",
    "ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_d": "D", "ssm_norm.weight": "norm.weight",
    "ssm_out.weight": "out_proj.weight",
}  # fmt: skip


def test_twice_the_heads_give_the_same_layer() -> None:
    heads, width, tokens = 3, 8, 50
    keys = {
        "hidden_size": heads * width, "mamba_n_groups": heads, "mamba_d_head": width, "mamba_d_state": width,
        "mamba_conv_bias": True, "mamba_proj_bias": False, "num_attention_heads": heads, "num_key_value_heads": heads,
        "layer_types": ["mamba"], "num_hidden_layers": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    one = GraniteMoeHybridMambaLayer(GraniteMoeHybridConfig(**keys, mamba_n_heads=heads, mamba_expand=1), 0).eval()
    two = GraniteMoeHybridMambaLayer(GraniteMoeHybridConfig(**keys, mamba_n_heads=2 * heads, mamba_expand=2), 0).eval()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    wanted = two.state_dict()
    filled = {}
    for name, tensor in one.state_dict().items():
        theirs, value = SSM[name](tensor, heads, width)
        value = torch.log(-value) if theirs == "ssm_a" else value
        filled[NAMES[theirs]] = value.reshape(wanted[NAMES[theirs]].shape)
    two.load_state_dict(filled)
    x = torch.randn(2, tokens, heads * width)
    torch.testing.assert_close(two(x), one(x), rtol=1e-4, atol=1e-5)


def test_rows_of_queries_and_keys_turn_alike() -> None:
    heads, width = 2, 8
    rows = torch.randn(heads * width, 5)
    angles = torch.rand(width // 2)
    split = rows.unflatten(0, (heads, width))
    first, second = split[:, : width // 2], split[:, width // 2 :]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    halves = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
    pairs = interleaved(rows, heads).unflatten(0, (heads, width // 2, 2))
    turned = torch.stack([pairs[:, :, 0] * cos - pairs[:, :, 1] * sin, pairs[:, :, 1] * cos + pairs[:, :, 0] * sin], 2)
    torch.testing.assert_close(interleaved(halves.flatten(0, 1), heads), turned.flatten(0, 2))


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_the_frequencies_of_llama3_are_those_of_transformers(make_llama: Callable[..., Any]) -> None:
    config = make_llama(rope_parameters=LLAMA3).config
    plain = 50_000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(config)
    assert factors is not None and factors.max() == 4 and factors.min() == 1 and 1 < factors[1] < 4
    torch.testing.assert_close(plain / factors, theirs)
    assert rope_factors(make_llama().config) is None


def test_every_tensor_has_the_shape_that_llama_cpp_asks_for(make_llama: Callable[..., Any]) -> None:
    teacher = make_llama(hidden_size=192, tie_word_embeddings=False, rope_parameters=LLAMA3)  # 4 heads where 6 fit
    hybrid = hybridize(teacher, ["mamba2", "attention", "attention", "mamba2"], MixerConfig(name="mamba2"))
    config, state = hybrid.config, hybrid.state_dict()
    found = {name: list(tensor.shape) for name, tensor in to_gguf(config, state.__getitem__)}
    keys = container_config(config)
    embed, heads, width, kv = 192, keys["mamba_n_heads"], keys["mamba_d_head"], 2
    assert (heads, width, architecture(config)) == (6, 32, "granitehybrid")
    inner, groups = 2 * embed, heads * width  # llama.cpp: d_inner == 2 * n_embd; B and C of every group
    expected = {
        "ssm_in.weight": [2 * inner + 2 * groups + 2 * heads, embed], "ssm_conv1d.weight": [inner + 2 * groups, 4],
        "ssm_conv1d.bias": [inner + 2 * groups], "ssm_dt.bias": [2 * heads], "ssm_a": [2 * heads, 1],
        "ssm_d": [2 * heads, 1], "ssm_norm.weight": [heads, inner // heads], "ssm_out.weight": [embed, inner],
    }  # fmt: skip
    assert {name: found[f"blk.0.{name}"] for name in expected} == expected
    assert found["blk.1.attn_q.weight"] == [heads * width, embed]
    assert found["blk.1.attn_k.weight"] == found["blk.1.attn_v.weight"] == [kv * width, embed]
    assert found["output.weight"] == found["token_embd.weight"] == [teacher.config.vocab_size, embed]
    assert found["rope_freqs.weight"] == [width // 2] and not any("None" in name for name in found)


def test_attention_alone_goes_out_under_another_name(make_llama: Callable[..., Any]) -> None:
    hybrid = hybridize(make_llama(hidden_size=128), ["attention"] * 4, MixerConfig(name="mamba2"))
    assert architecture(hybrid.config) == "granite" and "gguf" in available()


def test_what_llama_cpp_has_not_is_refused(make_llama: Callable[..., Any]) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    hybrid = hybridize(
        make_llama(hidden_size=128, rope_parameters=rope), ["mamba2", *["attention"] * 3], MixerConfig(name="mamba2")
    )
    assert obstacles(hybrid.config, "hf-native") == []
    assert "rotary positions scaled by yarn" in obstacles(hybrid.config, "gguf")[0]


def test_without_the_package_it_is_said_what_to_install(
    make_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hybrid = hybridize(make_llama(hidden_size=128), ["mamba2", *["attention"] * 3], MixerConfig(name="mamba2"))
    hybrid.save_pretrained(tmp_path / "hybrid")
    find = importlib.util.find_spec
    missing = ("gguf", "llama_cpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    assert main(["export", str(tmp_path / "hybrid"), "--to", "gguf", "--output", str(tmp_path / "out.gguf")]) == 2
    assert "pip install 'distill-hybrid[gguf]'" in capsys.readouterr().err
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["measure", str(tmp_path / "model.gguf")]) == 2
    assert "pip install 'distill-hybrid[gguf]'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"\[gguf\]"):
        gguf.check_installed()
