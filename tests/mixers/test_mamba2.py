"""The mamba2 mixer against the equations and against GraniteMoeHybrid's own layer, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.config import mixer_options
from distill.hybrid.surgery import hybridize
from distill.mixers.mamba2 import Mixer

HEADS, KV_HEADS, HEAD_DIM, EPS = 4, 2, 16, 1e-2
INNER = HEADS * HEAD_DIM


def config(**changes: Any) -> Any:
    """What a mixer reads of a hybrid config; keys of the mixer's options go there."""
    options = {**mixer_options(MixerConfig()), "bc_norm": False}
    keys: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS,
    }
    for key, value in changes.items():
        (options if key in options else keys)[key] = value
    return SimpleNamespace(**keys, mixer_config=options)


def make(**changes: Any) -> Mixer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mixer = Mixer(config(**changes), 0)
        with torch.no_grad():  # away from the start, where D and the norm are 1
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def rms(values: Tensor, weight: Tensor) -> Tensor:
    return values / (values.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain(weights: dict[str, Tensor], inputs: Tensor, starts: Tensor | None) -> Tensor:
    """The mixer from the equations alone, one token and one head at a time. inputs [B, T, E]."""
    z, xbc, dt = (inputs @ weights["in_proj.weight"].T).split([INNER, 3 * INNER, HEADS], dim=-1)
    if "b_norm.weight" in weights:
        x, b, c = xbc.split(INNER, -1)
        b = torch.cat([rms(h, weights["b_norm.weight"]) for h in b.split(HEAD_DIM, -1)], -1)
        c = torch.cat([rms(h, weights["c_norm.weight"]) for h in c.split(HEAD_DIM, -1)], -1)
        xbc = torch.cat([x, b, c], -1)
    taps = weights["conv1d.weight"][:, 0]
    rows = []
    for row in range(len(inputs)):
        states = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM, dtype=inputs.dtype)
        first, outputs = 0, []
        for t in range(inputs.shape[1]):
            if starts is not None and starts[row, t]:
                states, first = torch.zeros_like(states), t
            window = [xbc[row, t - back] if t - back >= first else torch.zeros(3 * INNER) for back in range(4)]
            mixed = silu(sum(taps[:, 3 - back] * w for back, w in enumerate(window)) + weights["conv1d.bias"])
            x, b, c = mixed.split(INNER)
            step = softplus(dt[row, t] + weights["dt_bias"])
            ys = []
            for h in range(HEADS):
                part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
                decay = torch.exp(-step[h] * weights["A_log"][h].exp())
                states[h] = decay * states[h] + step[h] * torch.outer(x[part], b[part])
                y = states[h] @ c[part] + weights["D"][h] * x[part]
                ys.append(rms(y * silu(z[row, t, part]), weights["norm.weight"][part]))
            outputs.append(weights["out_proj.weight"] @ torch.cat(ys))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_whole_mixer_matches_the_equations(norm: bool, packed: bool) -> None:
    mixer = make(bc_norm=norm)
    inputs = torch.randn(2, 21, 48, generator=torch.Generator().manual_seed(0))
    starts = None
    if packed:
        starts = torch.zeros(2, 21, dtype=torch.bool)
        starts[0, [0, 5]] = starts[1, [0, 13, 14]] = True
    expected = plain({name: tensor.detach() for name, tensor in mixer.state_dict().items()}, inputs, starts)
    torch.testing.assert_close(mixer(inputs, document_starts=starts)[0], expected, rtol=1e-4, atol=1e-5)


def test_it_is_the_layer_that_the_container_holds() -> None:
    mixer = make(hidden_size=INNER)
    options: dict[str, Any] = {
        "hidden_size": INNER,
        "num_hidden_layers": 1,
        "layer_types": ["mamba"],
        "num_local_experts": 0,
        "mamba_n_heads": HEADS,
        "mamba_d_head": HEAD_DIM,
        "mamba_n_groups": HEADS,
        "mamba_d_state": HEAD_DIM,
        "mamba_expand": 1,
        "mamba_chunk_size": 16,
        "rms_norm_eps": EPS,
    }
    theirs = GraniteMoeHybridMambaLayer(GraniteMoeHybridConfig(**options), 0).eval()
    theirs.load_state_dict(mixer.state_dict())  # name by name, nothing left over
    inputs = torch.randn(2, 70, INNER, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(inputs)[0], theirs(inputs), rtol=1e-4, atol=1e-5)


def test_mil_gives_every_query_head_the_rows_of_its_key_value_head(llama: Any) -> None:
    hybrid = hybridize(llama, ["mamba2", *["attention"] * 3], MixerConfig())
    mixer, attention = hybrid.model.layers[0].self_attn, llama.model.layers[0].self_attn
    width = attention.head_dim
    _, x, b, c, _ = mixer.in_proj.weight.split([4 * width, 4 * width, 4 * width, 4 * width, 4])
    for head in range(4):
        own, served = slice(head * width, (head + 1) * width), slice(head // 2 * width, (head // 2 + 1) * width)
        assert torch.equal(x[own], attention.v_proj.weight[served])
        assert torch.equal(b[own], attention.k_proj.weight[served])
        assert torch.equal(c[own], attention.q_proj.weight[own])
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def test_a_bias_of_the_attention_acts_through_the_convolution(make_model: Callable[..., Any]) -> None:
    teacher, placement = make_model("qwen2"), ["mamba2", *["attention"] * 3]
    attention = teacher.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    mixers = []
    for start in (nn.init.zeros_, nn.init.normal_):
        for layer in projections:
            start(layer.bias)
        mixers.append(hybridize(teacher, placement, MixerConfig()).model.layers[0].self_attn)
    bare, mixer = mixers
    inner, repeat = mixer.d_inner, 2
    biases = [
        layer.bias.unflatten(0, (-1, attention.head_dim)).repeat_interleave(times, 0).flatten()
        for layer, times in ((attention.v_proj, repeat), (attention.k_proj, repeat), (attention.q_proj, 1))
    ]
    tokens = torch.randn(9, 3 * inner)
    taps = mixer.conv1d.weight[:, 0]
    window = tokens[3:7].T  # four tokens, all of one document
    with_bias = ((window + torch.cat(biases)[:, None]) * taps).sum(-1) + bare.conv1d.bias
    folded = (window * taps).sum(-1) + mixer.conv1d.bias
    torch.testing.assert_close(folded, with_bias, rtol=1e-4, atol=1e-4)


def test_start_of_the_recurrence() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = Mixer(config(num_attention_heads=64), 0)
    dt = softplus(mixer.dt_bias.detach())
    assert float(dt.min()) >= 1e-4 and float(dt.max()) <= 0.1 + 1e-6
    decay = mixer.A_log.detach()
    assert float(decay.min()) >= 0 and float(decay.max()) <= 2.78  # log 16
    assert torch.equal(mixer.D, torch.ones(64)) and torch.equal(mixer.norm.weight, torch.ones(64 * HEAD_DIM))


def test_conv_init_identity_passes_through() -> None:
    mixer = Mixer(config(conv_init="identity"), 0)
    assert torch.equal(mixer.conv1d.weight[:, 0], torch.tensor([0.0, 0, 0, 1]).expand(3 * INNER, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_conv": 1}, r"mixer.d_conv=1 must be in \[2, 8\]"),
        ({"conv_init": "identiy"}, "did you mean 'identity'"),
        ({"z_init": "identity"}, "needs a bias of the gate"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixer.check(config(**changes))
