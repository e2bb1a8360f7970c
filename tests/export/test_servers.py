"""What vLLM and SGLang ask of a GraniteMoeHybrid folder, read off their sources, of folders that we write.

Neither is installed here. Sources: vLLM 0.33.0, ``vllm/model_executor/models/granitemoehybrid.py`` with
``mamba_mixer2.py`` and ``granitemoeshared.py``; SGLang 0.5.23, ``sglang/srt/models/granitemoehybrid.py`` and
``sglang/srt/configs/granitemoehybrid.py``. What of them was run by hand: docs/export.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from distill.export import hf_native

SaveHybrid = Callable[..., Any]


def declared(keys: dict[str, Any]) -> dict[str, list[int]]:
    """Name -> shape of every tensor that the servers' loaders take, from ``config.json`` alone.

    Both fuse q, k and v, and call A_log A; their loaders rename what they read, and fail for a name that they have not.
    """
    hidden, vocabulary, heads = keys["hidden_size"], keys["vocab_size"], keys["num_attention_heads"]
    width = hidden // heads  # neither reads head_dim
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    if not keys["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [vocabulary, hidden]
    inner = keys["mamba_expand"] * hidden
    convolved = inner + 2 * keys["mamba_n_groups"] * keys["mamba_d_state"]
    kv = keys["num_key_value_heads"] * width
    attention = {"q_proj": [heads * width, hidden], "k_proj": [kv, hidden], "v_proj": [kv, hidden]}
    attention["o_proj"] = [hidden, hidden]
    mamba = {
        "in_proj.weight": [inner + convolved + keys["mamba_n_heads"], hidden],  # z, then x, B, C, then dt
        "conv1d.weight": [convolved, 1, keys["mamba_d_conv"]],
        "out_proj.weight": [hidden, inner],
        "norm.weight": [inner],
        **{name: [keys["mamba_n_heads"]] for name in ("A_log", "D", "dt_bias")},
    }
    if keys["mamba_conv_bias"]:
        mamba["conv1d.bias"] = [convolved]
    for block, kind in enumerate(keys["layer_types"]):
        inside = {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        inside["shared_mlp.input_linear.weight"] = [2 * keys["shared_intermediate_size"], hidden]
        inside["shared_mlp.output_linear.weight"] = [hidden, keys["shared_intermediate_size"]]
        if kind == "mamba":
            inside |= {f"mamba.{name}": shape for name, shape in mamba.items()}
        else:
            inside |= {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
            if keys["attention_bias"]:  # of all four
                inside |= {f"self_attn.{name}.bias": shape[:1] for name, shape in attention.items()}
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in inside.items()}
    return shapes


@pytest.fixture(params=range(24))
def native(request: pytest.FixtureRequest, saved_hybrid: SaveHybrid, tmp_path: Path) -> Path:
    """A folder that a random hybrid was exported to."""
    saved_hybrid(request.param, tmp_path / "hybrid")
    hf_native.export(tmp_path / "hybrid", tmp_path / "native")
    return tmp_path / "native"


def test_the_folder_has_what_servers_declare_and_read(native: Path) -> None:
    keys = json.loads((native / "config.json").read_text())
    with safe_open(native / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert found == declared(keys)
    # what SGLang's config class raises ValueError for
    assert len(keys["layer_types"]) == keys["num_hidden_layers"] and set(keys["layer_types"]) <= {"mamba", "attention"}
    inner = keys["mamba_expand"] * keys["hidden_size"]
    assert keys["mamba_d_head"] * keys["mamba_n_heads"] == inner and inner % keys["mamba_n_heads"] == 0
    # what they take for granted: as many query heads a key/value head, whole groups of SSM heads, SiLU, no experts
    assert keys["num_attention_heads"] % keys["num_key_value_heads"] == 0
    assert keys["mamba_n_heads"] % keys["mamba_n_groups"] == 0 and not keys["mamba_proj_bias"]
    assert keys["hidden_act"] == "silu" and keys["num_local_experts"] == 0
    # vLLM reads rope_parameters, SGLang rope_theta and rope_scaling; both only where the type says so
    assert keys["position_embedding_type"] == "rope"
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"]
    for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        assert isinstance(keys[name], float), name  # their defaults are those of Granite 4


def test_in_transformers_the_layers_are_called_what_vllm_looks_for(native: Path) -> None:
    """vLLM 0.33 looks ``layer_types`` up as transformers 5.16 and later rename them on loading."""
    written = json.loads((native / "config.json").read_text())["layer_types"]
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    assert AutoConfig.from_pretrained(native).layer_types == [names[kind] for kind in written]
