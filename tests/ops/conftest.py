"""Stand-ins for the CUDA packages: the signatures, layouts and checks of theirs, computed step by step on any device.

Written from the sources of mamba-ssm 2.3.2.post1, causal-conv1d 1.7.0 and fla-core 0.6.0: what these assert, or check
in C++, is asserted here, and what they compute differently from the textbook (a product with 0 where ours select, the
backward's ``h - delta u B``) is computed so here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill.ops import kernels

HALF = (torch.float16, torch.bfloat16)
KERNEL_MODULES = ("selective_scan_mamba_ssm", "ssd_mamba_ssm", "ssd_fla", "causal_conv1d_mamba_ssm")


class _SelectiveScan(torch.autograd.Function):
    """selective_scan_cuda.fwd and .bwd: u, delta [B, D, L], A [D, N], B and C [B, G, N, L], D [D]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Any:
        batch, dim, length = u.shape
        states, groups = A.shape[1], B.shape[1]
        assert u.dtype in (torch.float32, *HALF) and A.dtype == torch.float32 and states <= 256
        assert delta.dtype == B.dtype == C.dtype == u.dtype
        assert delta.shape == u.shape and A.shape == (dim, states) and dim % groups == 0
        assert B.shape == C.shape == (batch, groups, states, length)
        if D is not None:
            assert D.dtype == torch.float32 and D.shape == (dim,)
        uf, df = u.float(), delta.float()
        Bf, Cf = (tensor.float().repeat_interleave(dim // groups, dim=1) for tensor in (B, C))
        decay = torch.exp(df[:, :, None] * A[None, :, :, None])  # [B, D, N, L]
        inflow = (df * uf)[:, :, None] * Bf
        state, history = uf.new_zeros(batch, dim, states), []
        for t in range(length):
            state = decay[..., t] * state + inflow[..., t]
            history.append(state)
        h = torch.stack(history, -1)
        out = (h * Cf).sum(2) + (0 if D is None else D[:, None] * uf)
        ctx.save_for_backward(uf, df, A, Bf, Cf, D, decay, h)
        ctx.like, ctx.groups = u, groups
        ctx.mark_non_differentiable(state)
        return out.to(u.dtype), state

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        u, delta, A, B, C, D, decay, h = ctx.saved_tensors
        dtype, dout = ctx.like.dtype, dout.float()
        g, after = [], torch.zeros_like(h[..., 0])
        for t in range(u.shape[2] - 1, -1, -1):
            after = dout[:, :, None, t] * C[..., t] + after
            g.insert(0, after)
            after = decay[..., t] * after
        dh = torch.stack(g, -1)
        # As a fused multiply-add rounds it: not exactly 0 where the decay is.
        past = (h.double() - (delta * u).double()[:, :, None] * B.double()).float()
        du = (dh * B).sum(2) * delta + (0 if D is None else D[:, None] * dout)
        ddelta = (dh * B).sum(2) * u + (dh * past * A[None, :, :, None]).sum(2)
        dA = (dh * past * delta[:, :, None]).sum((0, 3))
        grouped = lambda tensor: tensor.unflatten(1, (ctx.groups, -1)).sum(2)  # noqa: E731
        dB, dC = grouped(dh * (delta * u)[:, :, None]), grouped(h * dout[:, :, None])
        dD = None if D is None else (dout * u).sum((0, 2))
        return du.to(dtype), ddelta.to(dtype), dA, dB.to(dtype), dC.to(dtype), dD


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: None = None,
    delta_bias: None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    assert z is None and delta_bias is None and not delta_softplus, "not modelled"
    out, last_state = _SelectiveScan.apply(u, delta, A, B, C, D)
    return (out, last_state) if return_last_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Any = None,
    z: None = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: None = None,
) -> Tensor:
    assert state.ndim == 4 and z is None and not dt_softplus and state_batch_indices is None, "not modelled"
    batch, heads, dim, states = state.shape
    assert x.shape == dt.shape == (batch, heads, dim) and A.shape == (heads, dim, states)
    assert B.shape == C.shape == (batch, B.shape[1], states) and heads % B.shape[1] == 0
    assert D.shape == (heads, dim) and dt_bias.shape == (heads, dim)  # the package asks them for strides
    step = (dt.float() + dt_bias.float())[..., None]
    Bf, Cf = (tensor.float().repeat_interleave(heads // tensor.shape[1], dim=1)[:, :, None] for tensor in (B, C))
    state.copy_(state * torch.exp(step * A.float()) + step * Bf * x.float()[..., None])
    return ((state * Cf).sum(-1) + D.float() * x.float()).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Any = None,
    z: None = None,
    dt_bias: None = None,
    initial_states: Tensor | None = None,
    seq_idx: None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    assert z is dt_bias is seq_idx is cu_seqlens is None and not dt_softplus and not return_varlen_states, (
        "not modelled"
    )
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    assert chunk_size & (chunk_size - 1) == 0 and heads % groups == 0 and x.dtype == B.dtype == C.dtype
    assert B.shape == C.shape == (batch, length, groups, states)
    assert dt.shape == (batch, length, heads) and A.shape == D.shape == (heads,)
    assert initial_states is None or initial_states.shape == (batch, heads, width, states)
    Bf, Cf = (tensor.float().repeat_interleave(heads // groups, dim=2) for tensor in (B, C))
    state = torch.zeros(batch, heads, width, states, device=x.device) if initial_states is None else initial_states
    out = []
    for t in range(length):
        decay = torch.exp(dt[:, t].float() * A)
        inflow = (dt[:, t].float()[..., None] * x[:, t].float())[..., None] * Bf[:, t, :, None]
        state = decay[..., None, None] * state + inflow
        out.append((state * Cf[:, t, :, None]).sum(-1) + D[:, None] * x[:, t].float())
    y = torch.stack(out, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Any = None,
    g_gamma: None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Any:
    assert g_gamma is None and state_v_first, "not modelled"
    batch, length, heads, dim_k = q.shape
    assert k.shape == q.shape and v.shape[:3] == g.shape == q.shape[:3] and q.dtype == k.dtype == v.dtype
    assert g.dtype == torch.float32
    if q.dtype in HALF:
        assert dim_k % 2 == v.shape[3] % 2 == 0
    edges = [row * length for row in range(batch + 1)]
    if cu_seqlens is not None:
        assert batch == 1 and cu_seqlens.dtype == torch.int64
        assert cu_seqlens_cpu is None or torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu.cpu())
        edges = cu_seqlens.tolist()
    sequences = len(edges) - 1
    assert edges[0] == 0 and edges[-1] == batch * length and sorted(set(edges)) == edges
    assert initial_state is None or initial_state.shape == (sequences, heads, v.shape[3], dim_k)
    scale = dim_k**-0.5 if scale is None else scale
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out, final = [], []
    for number in range(sequences):
        state = torch.zeros(heads, v.shape[2], dim_k, device=q.device)
        state = state if initial_state is None else initial_state[number].float()
        for t in range(edges[number], edges[number + 1]):
            decay = torch.exp(g.flatten(0, 1)[t])
            state = decay[:, None, None] * state + v[t].float()[..., None] * k[t].float()[:, None]
            out.append((state * (q[t].float() * scale)[:, None]).sum(-1))
        final.append(state)
    o = torch.stack(out).unflatten(0, (batch, length)).to(q.dtype)
    return o, torch.stack(final) if output_final_state else None


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Any = None,
    g_gamma: None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    assert not reverse
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert x.dtype in (torch.float32, *HALF) and weight.dtype in (torch.float32, *HALF)
    assert weight.shape == (x.shape[1], weight.shape[1]) and 2 <= weight.shape[1] <= 4
    if bias is not None:
        assert bias.dtype == weight.dtype and bias.stride(-1) == 1 and bias.shape == x.shape[1:2]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: None = None,
    activation: str | None = None,
) -> Any:
    _check_conv(x, weight, bias)
    batch, dim, length = x.shape
    width = weight.shape[1]
    assert not return_final_states and final_states_out is None and activation == "silu", "not modelled"
    assert x.stride(2) == 1 or x.stride(1) == 1
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if channel_last:
        assert dim % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        assert x.data_ptr() % 16 == 0, "a misaligned address"
    numbers = torch.zeros(batch, width - 1 + length, dtype=torch.int32, device=x.device)
    if seq_idx is not None:
        assert channel_last and seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length)
        numbers = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)  # the state is the first document's
    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, width - 1)
    else:
        assert channel_last and initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        assert initial_states.shape == (batch, dim, width - 1)
    windows = torch.cat([initial_states, x], 2).float().unfold(2, width, 1)  # [B, D, L, K]
    same = numbers.unfold(1, width, 1) == numbers[:, width - 1 :, None]
    out = (torch.where(same[:, None], windows, 0) * weight.float()[None, :, None]).sum(-1)
    out = functional.silu(out + (0 if bias is None else bias.float()[:, None])).to(x.dtype)
    if out.requires_grad:
        out.register_hook(lambda dout: _check_gradient(dout, channel_last))
    return out


def _check_gradient(dout: Tensor, channel_last: bool) -> None:
    if channel_last and dout.stride(1) == 1:  # otherwise the package copies it
        assert dout.stride(2) % 8 == 0 and dout.stride(0) % 8 == 0 and dout.data_ptr() % 16 == 0


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: str | None = None,
    cache_seqlens: None = None,
    conv_state_indices: None = None,
) -> Tensor:
    _check_conv(x[..., None], weight, bias)
    assert conv_state.dtype == x.dtype and conv_state.shape[2] >= weight.shape[1] - 1
    assert activation == "silu" and cache_seqlens is conv_state_indices is None, "not modelled"
    window = torch.cat([conv_state, x[..., None]], 2)
    conv_state.copy_(window[:, :, 1:])
    out = (window[:, :, -weight.shape[1] :].float() * weight.float()).sum(-1) + bias.float()
    return functional.silu(out).to(x.dtype)


CONTENTS: dict[str, dict[str, Callable[..., Any]]] = {
    "mamba_ssm": {},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update},
    "fla": {},
    "fla.ops": {},
    "fla.ops.simple_gla": {
        "chunk_simple_gla": chunk_simple_gla,
        "fused_recurrent_simple_gla": fused_recurrent_simple_gla,
    },
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA packages as stand-ins, and their kernels allowed on CPU tensors."""
    for name, functions in CONTENTS.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    for kernel in ("mamba_ssm", "fla"):
        monkeypatch.setitem(kernels.DEVICES, kernel, "cpu")
    forget()
    yield
    forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["stand_ins", "packages"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run; on CPU with stand-ins in the place of the packages."""
    if request.param == "cpu":
        request.getfixturevalue("stand_ins")
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def forget() -> None:
    """Have the kernels, and the packages under them, looked for anew."""
    kernels.kernel_of.cache_clear()
    package = importlib.import_module("distill.ops")
    for name in KERNEL_MODULES:
        sys.modules.pop(f"distill.ops.{name}", None)
        if hasattr(package, name):
            delattr(package, name)
