"""The mamba1 mixer against the equations, its GQA layouts, and how it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from distill.config import MixerConfig
from distill.errors import UserError
from distill.hybrid.config import mixer_options
from distill.hybrid.surgery import hybridize
from distill.mixers.mamba1 import Mixer, norm_heads

HEADS, KV_HEADS, HEAD_DIM, STATES = 4, 2, 32, 16
REPEAT, CHUNKS = HEADS // KV_HEADS, HEAD_DIM // STATES
LAYOUT: dict[str, Callable[[int], int]] = {
    "faithful": lambda c: c // REPEAT,
    "aligned": lambda c: (c // CHUNKS // REPEAT) * (HEAD_DIM // STATES) + c % (HEAD_DIM // STATES),
}


def config(**changes: Any) -> Any:
    """What a mixer reads of a hybrid config; keys of the mixer's options go there."""
    options = mixer_options(MixerConfig())
    keys: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "attention_bias": False,
        "rms_norm_eps": 1e-2,
    }
    for key, value in changes.items():
        (options if key in options else keys)[key] = value
    return SimpleNamespace(**keys, mixer_config=options)


def make(**changes: Any) -> Mixer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mixer = Mixer(config(**changes), 0)
        with torch.no_grad():  # away from the start, where D = 1, and biases and A are all alike
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def expand(states: Tensor, layout: str) -> Tensor:
    """[B, T, d_xb] -> [B, T, d_inner], chunk by chunk, as DESIGN writes it."""
    chunks = [LAYOUT[layout](c) for c in range(HEADS * HEAD_DIM // STATES)]
    return torch.cat([states[..., c * STATES : (c + 1) * STATES] for c in chunks], dim=-1)


def plain(weights: dict[str, Tensor], inputs: Tensor, layout: str, starts: Tensor | None = None) -> Tensor:
    """The mixer from the equations alone: one channel vector and one token at a time. inputs [B, T, E]."""
    inner, xb = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    projected = inputs @ weights["in_proj.weight"].T
    if "in_proj.bias" in weights:
        projected = projected + weights["in_proj.bias"]
    ends = [inner, inner + xb, inner + 2 * xb, 2 * inner + 2 * xb]
    z, x, b, c, dt = projected.tensor_split(ends, dim=-1)
    if "b_norm.weight" in weights:
        b, c = (
            torch.cat([h / (h.square().mean(-1, keepdim=True) + 1e-2).sqrt() * w for h in v.split(HEAD_DIM, -1)], -1)
            for v, w in ((b, weights["b_norm.weight"]), (c, weights["c_norm.weight"]))
        )
    x, b = expand(x, layout), expand(b, layout)
    dt = softplus(dt @ weights["dt_proj.weight"].T + weights["dt_proj.bias"])
    a = -torch.exp(weights["A_log"])
    taps = weights["conv1d.weight"][:, 0]
    rows = []
    for row in range(len(inputs)):
        state, first, outputs = torch.zeros(inner, STATES, dtype=inputs.dtype), 0, []
        for t in range(inputs.shape[1]):
            if starts is not None and starts[row, t]:
                state, first = torch.zeros_like(state), t
            conv = weights["conv1d.bias"]
            for back in range(taps.shape[1]):
                if t - back >= first:
                    conv = conv + taps[:, -1 - back] * x[row, t - back]
            u, step = silu(conv), dt[row, t]
            b_t = b[row, t].view(-1, STATES).repeat_interleave(STATES, 0)  # N channels share one vector
            c_t = c[row, t].view(-1, STATES).repeat_interleave(STATES, 0)
            state = torch.exp(step[:, None] * a) * state + step[:, None] * b_t * u[:, None]
            outputs.append(((state * c_t).sum(-1) + weights["D"] * u) * silu(z[row, t]))
        rows.append(torch.stack(outputs))
    result = torch.stack(rows) @ weights["out_proj.weight"].T
    return result + weights["out_proj.bias"] if "out_proj.bias" in weights else result


def assert_near(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("layout", ["aligned", "faithful"])
def test_whole_mixer_matches_the_equations(layout: str, bias: bool, norm: bool, packed: bool, kernel: str) -> None:
    mixer = make(mil_layout=layout, attention_bias=bias, bc_norm=norm)
    mixer.kernels = kernel
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 11, 48, generator=rng)
    direction = torch.randn(2, 11, 48, generator=rng)
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[:, 0] = starts[0, 5] = starts[0, 6] = starts[1, 9] = True

    leaf = inputs.clone().requires_grad_()
    output, _ = mixer(leaf, document_starts=starts if packed else None)
    (output * direction).sum().backward()

    weights = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
    exact_leaf = inputs.double().requires_grad_()
    exact = plain(weights, exact_leaf, layout, starts if packed else None)
    (exact * direction.double()).sum().backward()

    assert_near(output.detach(), exact.detach(), "output", 1e-5)
    assert leaf.grad is not None and exact_leaf.grad is not None
    assert_near(leaf.grad, exact_leaf.grad, "input", 1e-4)
    assert set(weights) == {name for name, _ in mixer.named_parameters()}
    for name, parameter in mixer.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None and wanted is not None
        assert_near(parameter.grad, wanted, name, 1e-4)


def test_double_precision_agrees_to_the_precision_of_fp32_decay_rates() -> None:
    """In float64 nothing but A, which is held in fp32, may round."""
    mixer = make().double()
    inputs = torch.randn(1, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = {name: p.detach() for name, p in mixer.named_parameters()}
    assert_near(mixer(inputs)[0].detach(), plain(weights, inputs, "aligned"), "output", 1e-6)


@pytest.mark.parametrize("layout", ["aligned", "faithful"])
def test_chunk_map(layout: str) -> None:
    mixer = make(mil_layout=layout)
    numbered = torch.arange(KV_HEADS * HEAD_DIM).float()
    expanded = mixer._expand(numbered).flatten(-2)
    assert expanded.tolist() == expand(numbered, layout).tolist()
    # by hand: 8 query chunks, two a head, from 4 key/value chunks
    wanted = [0, 0, 1, 1, 2, 2, 3, 3] if layout == "faithful" else [0, 1, 0, 1, 2, 3, 2, 3]
    assert (expanded.view(-1, STATES)[:, 0] / STATES).tolist() == wanted


@pytest.mark.parametrize("head_dim", [16, 8])
def test_layouts_coincide_where_a_head_is_one_chunk(head_dim: int) -> None:
    aligned = Mixer(config(head_dim=head_dim, mil_layout="aligned"), 0)
    faithful = Mixer(config(head_dim=head_dim, mil_layout="faithful"), 0)
    assert aligned.d_state == faithful.d_state == head_dim
    numbered = torch.arange(KV_HEADS * head_dim)
    assert torch.equal(aligned._expand(numbered), faithful._expand(numbered))


def test_aligned_pairs_query_chunks_as_attention_does() -> None:
    """Chunk c of C comes from query head h; its B must come from the KV head of h, at the same place in the head."""
    keys = torch.arange(KV_HEADS * HEAD_DIM).float()
    by_attention = keys.view(KV_HEADS, HEAD_DIM).repeat_interleave(REPEAT, 0).flatten()
    assert torch.equal(make(mil_layout="aligned")._expand(keys).flatten(), by_attention)
    assert not torch.equal(make(mil_layout="faithful")._expand(keys).flatten(), by_attention)


@pytest.mark.parametrize("bias", [False, True])
def test_mil_copies_attention(make_llama: Callable[..., Any], bias: bool) -> None:
    teacher = make_llama(attention_bias=bias)
    attention = teacher.model.layers[1].self_attn
    if bias:  # they start at zero
        with torch.no_grad():
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection.bias.normal_()
    hybrid = hybridize(teacher, ["attention", "mamba1", "attention", "attention"], MixerConfig())
    mixer = hybrid.model.layers[1].self_attn
    inner, xb = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    slots = {"v_proj": (inner, xb), "k_proj": (inner + xb, xb), "q_proj": (inner + 2 * xb, inner)}
    for name, (start, count) in slots.items():
        source = getattr(attention, name)
        assert torch.equal(mixer.in_proj.weight[start : start + count], source.weight), name
        if bias:
            assert torch.equal(mixer.in_proj.bias[start : start + count], source.bias), name
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    if bias:
        assert torch.equal(mixer.out_proj.bias, attention.o_proj.bias)
        assert not mixer.in_proj.bias[:inner].any(), "the gate has no bias to copy"
        assert not mixer.in_proj.bias[2 * inner + 2 * xb :].any(), "dt has no bias to copy"
    else:
        assert mixer.in_proj.bias is None and mixer.out_proj.bias is None


def test_mil_copies_the_biases_that_qwen2_has(make_model: Callable[..., Any]) -> None:
    """q, k and v have them, o has none; z and dt have nothing to copy."""
    teacher = make_model("qwen2")
    mixer = hybridize(teacher, ["mamba1", *["attention"] * 3], MixerConfig()).model.layers[0].self_attn
    attention, inner, xb = teacher.model.layers[0].self_attn, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    biases = mixer.in_proj.bias.split(mixer.splits)
    for name, bias in zip(("v_proj", "k_proj", "q_proj"), biases[1:4], strict=True):
        assert bias.any() and torch.equal(bias, getattr(attention, name).bias), name
    assert [len(bias) for bias in biases[:4]] == [inner, xb, xb, inner]
    assert not biases[0].any() and not biases[4].any() and mixer.out_proj.bias is None


@torch.no_grad()
def test_mil_copies_the_norms_that_qwen3_has(make_model: Callable[..., Any]) -> None:
    """B and C are then what attention calls k and q before RoPE."""
    teacher, placement = make_model("qwen3", rms_norm_eps=1e-2), ["mamba1", *["attention"] * 3]
    hybrid = hybridize(teacher, placement, MixerConfig())
    mixer, attention = hybrid.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    hidden = torch.randn(2, 5, 48)
    _, _, b, c, _ = mixer.in_proj(hidden).split(mixer.splits, -1)
    k, q = (
        norm(proj(hidden).unflatten(-1, (-1, HEAD_DIM))).flatten(-2)
        for norm, proj in ((attention.k_norm, attention.k_proj), (attention.q_norm, attention.q_proj))
    )
    torch.testing.assert_close(norm_heads(b, mixer.b_norm), k)
    torch.testing.assert_close(norm_heads(c, mixer.c_norm), q)
    assert not torch.equal(mixer.c_norm.weight, torch.ones(HEAD_DIM))
    assert hybrid.config.mixer_config["bc_norm"] is True
    further = hybridize(hybrid, ["mamba1", "mamba1", "attention", "attention"], MixerConfig())
    assert torch.equal(further.model.layers[0].self_attn.b_norm.weight, mixer.b_norm.weight)
    without = hybridize(teacher, placement, MixerConfig(bc_norm="never"))
    assert without.model.layers[0].self_attn.b_norm is None
    with pytest.raises(UserError, match=r"mixer.bc_norm=True, but the mixers already there have bc_norm=False"):
        hybridize(without, ["mamba1", "mamba1", "attention", "attention"], MixerConfig())
    with pytest.raises(UserError, match="unknown mixer.bc_norm 'alway' .did you mean 'always'"):
        hybridize(teacher, placement, MixerConfig(bc_norm="alway"))


@pytest.mark.parametrize("init", ["mil", "fresh"])
def test_norms_can_be_asked_for_where_the_teacher_has_none(llama: Any, init: str) -> None:
    hybrid = hybridize(llama, ["mamba1", *["attention"] * 3], MixerConfig(bc_norm="always", init=init))
    mixer = hybrid.model.layers[0].self_attn
    assert mixer.b_norm.weight.eq(1).all() and mixer.c_norm.weight.eq(1).all()
    default = hybridize(llama, ["mamba1", *["attention"] * 3], MixerConfig(init=init)).model.layers[0].self_attn
    assert torch.equal(default.in_proj.weight, mixer.in_proj.weight), "the norms draw no random number"


def test_fresh_does_not_look_at_attention(llama: Any) -> None:
    placement = ["attention", "mamba1", "attention", "attention"]
    fresh = hybridize(llama, placement, MixerConfig(init="fresh")).model.layers[1].self_attn
    attention = llama.model.layers[1].self_attn
    assert fresh.out_proj.weight.shape == attention.o_proj.weight.shape
    assert not torch.isclose(fresh.out_proj.weight, attention.o_proj.weight).all(1).any()
    inner, xb = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    assert not torch.isclose(fresh.in_proj.weight[inner : inner + xb], attention.v_proj.weight).all(1).any()


def test_start_of_the_recurrence() -> None:
    mixer = Mixer(config(hidden_size=80, num_attention_heads=64, num_key_value_heads=2), 0)
    dt = softplus(mixer.dt_proj.bias.double())
    assert dt.min() >= 1e-3 * (1 - 1e-3) and dt.max() <= 1e-1 * (1 + 1e-3)
    assert dt.min() < 1.03e-3 and dt.max() > 0.97e-1, "with 2,048 channels, both ends are met"
    log = dt.log10()  # log-uniform over [-3, -1]: both halves are filled alike
    assert abs(log.mean() + 2) < 0.1 and 0.4 < (log < -2).double().mean() < 0.6
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(mixer.d_inner, 16))
    assert torch.equal(mixer.D, torch.ones(mixer.d_inner))
    bound = mixer.dt_rank**-0.5
    assert mixer.dt_rank == 5
    assert 0.9 * bound < mixer.dt_proj.weight.abs().max() <= bound


def test_z_init_identity_opens_the_gate() -> None:
    mixer = Mixer(config(z_init="identity"), 0)
    gate = silu(mixer.in_proj(torch.randn(2, 7, 48))[..., : mixer.d_inner])
    assert torch.allclose(gate, torch.ones_like(gate), atol=1e-6)
    assert not mixer.in_proj.bias[mixer.d_inner :].any()
    assert mixer.in_proj.weight[mixer.d_inner :].any()


def test_z_init_identity_survives_mil(llama: Any) -> None:
    options = MixerConfig(z_init="identity")
    hybrid = hybridize(llama, ["mamba1", "attention", "attention", "attention"], options)
    mixer = hybrid.model.layers[0].self_attn
    gate = silu(mixer.in_proj(torch.randn(1, 3, 48))[..., : mixer.d_inner])
    assert torch.allclose(gate, torch.ones_like(gate), atol=1e-6)
    xb = KV_HEADS * HEAD_DIM
    copied = mixer.in_proj.weight[mixer.d_inner : mixer.d_inner + xb]
    assert torch.equal(copied, llama.model.layers[0].self_attn.v_proj.weight)


def test_conv_init_identity_passes_through() -> None:
    identity = Mixer(config(conv_init="identity"), 0)
    x = torch.randn(2, 9, identity.d_inner)
    passed, _ = identity.conv1d(x)
    torch.testing.assert_close(passed, torch.nn.functional.silu(x))
    default = Mixer(config(), 0)
    assert not torch.allclose(default.conv1d(x)[0], passed)


def test_paper_shapes() -> None:
    """Apriel: E = 5120, 32 query and 8 KV heads of 128."""
    paper = config(hidden_size=5120, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        mixer = Mixer(paper, 0)
    assert (mixer.d_inner, mixer.d_xb, mixer.d_state, mixer.dt_rank) == (4096, 1024, 16, math.ceil(5120 / 16))
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "A_log": (4096, 16),
        "D": (4096,),
        "in_proj.weight": (4096 + 1024 + 1024 + 4096 + 320, 5120),
        "conv1d.weight": (4096, 1, 4),
        "conv1d.bias": (4096,),
        "dt_proj.weight": (4096, 320),
        "dt_proj.bias": (4096,),
        "out_proj.weight": (5120, 4096),
    }
    rows = [range(*place.indices(shapes["in_proj.weight"][0])) for _, place in list(mixer.mil_slots().values())[:3]]
    assert rows == [range(4096, 5120), range(5120, 6144), range(6144, 10240)]
    assert mixer.groups == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_state": 12}, "d_state=12 must divide head_dim=32"),
        ({"d_state": 0}, "d_state=0 must divide head_dim=32"),
        ({"d_conv": 1}, "d_conv=1 must be in"),
        (
            {"mil_layout": "aligne"},
            "unknown mixer.mil_layout 'aligne' .did you mean 'aligned'.*allowed: aligned, faithful",
        ),
        ({"z_init": "identiti"}, "mixer.z_init.*did you mean 'identity'"),
        ({"conv_init": "defalt"}, "mixer.conv_init.*did you mean 'default'"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixer(config(**changes), 0)
