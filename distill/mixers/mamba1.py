"""The M1 variant of Mamba-1 that Apriel-H1 uses: B, C and x come from projections the size of attention's.

Legend: B = batch, T = tokens, E = hidden size, D = d_inner = heads * head_dim, X = d_xb = kv_heads * head_dim,
N = d_state, G = D / N groups (channels of a group share one B and one C vector), K = d_conv, R = dt_rank.

Source: Gu and Dao, arXiv:2312.00752; M1, arXiv:2504.10449; Apriel-H1, section 2 and equations (1)-(3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill.errors import UserError, choose
from distill.ops.kernels import serves
from distill.ops.modules import CausalConv1d, HeadRMSNorm
from distill.ops.padding import padding_first
from distill.ops.selective_scan import selective_scan, selective_scan_update
from distill.ops.states import carried, keep

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
OPEN_GATE = 1.2784645  # SiLU of it is 1: the gate of z_init="identity"
LAYOUTS = ("aligned", "faithful")
STARTS = ("default", "identity")


class Mixer(nn.Module):
    """Selective state-space mixer: gate, grouped causal convolution of x, selective scan, output projection.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, output = out_proj(y * SiLU(z)).
    """

    operators = ("causal_conv1d", "selective_scan")
    ignores: tuple[str, ...] = ()

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.check(config)
        options = config.mixer_config
        self.layer_idx = layer_idx
        self.kernels = "auto"
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.d_state = min(options["d_state"], config.head_dim)
        self.d_inner = self.heads * config.head_dim
        self.d_xb = self.kv_heads * config.head_dim
        self.dt_rank = math.ceil(config.hidden_size / 16)
        self.groups = self.d_inner // self.d_state
        self.options = {name: options[name] for name in ("mil_layout", "z_init", "conv_init")}
        self.splits = [self.d_inner, self.d_xb, self.d_xb, self.d_inner, self.dt_rank]  # z, x, B, C, dt
        out_bias = bool(getattr(config, "attention_bias", False))
        bias = out_bias or getattr(config, "qkv_bias", False) or options["z_init"] == "identity"
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=bias)
        self.conv1d = CausalConv1d(self.d_inner, options["d_conv"])
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.d_inner, dtype=torch.float32))
        self.out_proj = nn.Linear(self.d_inner, config.hidden_size, bias=out_bias)
        self.b_norm = self.c_norm = None
        if options["bc_norm"] is True:
            self.b_norm, self.c_norm = (HeadRMSNorm(config.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        if self.in_proj.weight.numel():
            self.reset_parameters()
        else:  # ZeRO-3 takes a module apart as soon as it is made, so that only what is directly here is still whole
            self.reset_own()

    @staticmethod
    def check(config: Any) -> None:
        """Raise UserError where the teacher's shape or the options do not fit this mixer."""
        options = config.mixer_config
        d_state, head_dim = options["d_state"], config.head_dim
        if d_state < 1 or head_dim % min(d_state, head_dim):
            fits = [str(n) for n in range(2, min(head_dim, 32) + 1) if head_dim % n == 0]
            raise UserError(f"mixer.d_state={d_state} must divide head_dim={head_dim}: set it to {', '.join(fits)}")
        if not 2 <= options["d_conv"] <= 8:
            raise UserError(f"mixer.d_conv={options['d_conv']} must be in [2, 8]")
        choose("mixer.mil_layout", options["mil_layout"], LAYOUTS)
        choose("mixer.z_init", options["z_init"], STARTS)
        choose("mixer.conv_init", options["conv_init"], STARTS)

    def mil_slots(self) -> dict[str, tuple[str, slice]]:
        """MIL slot -> (parameter module, rows): x <- W_V, B <- W_K, C <- W_Q, out <- W_O, norms of B, C <- of k, q."""
        z, x, b, c = self.splits[:4]
        slots = {
            "x": ("in_proj", slice(z, z + x)),
            "B": ("in_proj", slice(z + x, z + x + b)),
            "C": ("in_proj", slice(z + x + b, z + x + b + c)),
            "out": ("out_proj", slice(None)),
        }
        if self.b_norm is not None:
            slots |= {"B_norm": ("b_norm", slice(None)), "C_norm": ("c_norm", slice(None))}
        return slots

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initialisation: A = -(1..N), D = 1, dt bias such that softplus(bias) is log-uniform."""
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            layer.reset_parameters()
        self.reset_own()
        self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.exp(torch.rand(self.d_inner, device=self.D.device) * (high - low) + low).clamp(min=DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        for layer in (self.in_proj, self.out_proj):
            if layer.bias is not None:
                layer.bias.zero_()
        for norm in (self.b_norm, self.c_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.options["z_init"] == "identity":
            self.in_proj.weight[: self.d_inner].zero_()
            self.in_proj.bias[: self.d_inner].fill_(OPEN_GATE)
        if self.options["conv_init"] == "identity":
            self.conv1d.weight.zero_()
            self.conv1d.weight[:, 0, -1].fill_(1.0)
            assert self.conv1d.bias is not None
            self.conv1d.bias.zero_()

    @torch.no_grad()
    def reset_own(self) -> None:
        """The part of ``reset_parameters`` that is in no module inside this one: A and D."""
        steps = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(steps.log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def _expand(self, states: torch.Tensor) -> torch.Tensor:
        """Key/value-sized states [..., X] to query-sized [..., G, N] under GQA.

        ``faithful`` repeats consecutive N-wide chunks, as M1 does; ``aligned`` gives a chunk of query head h the
        chunk of the same place in the key/value head that attention paired h with.
        """
        chunks = states.unflatten(-1, (-1, self.d_state))
        if self.heads == self.kv_heads:
            return chunks
        if self.options["mil_layout"] == "faithful":
            return chunks.repeat_interleave(self.heads // self.kv_heads, dim=-2)
        head = chunks.unflatten(-2, (self.kv_heads, -1))  # [..., kv_heads, chunks, N]
        return head.repeat_interleave(self.heads // self.kv_heads, dim=-3).flatten(-3, -2)

    @padding_first
    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        document_starts: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Mix tokens. hidden_states [B, T, E]; document_starts bool [B, T], where states begin anew.

        ``past_key_values`` is a transformers cache whose layer here is a LinearAttentionLayer: conv state
        [B, D, K-1], recurrent state [B, D, N] in fp32; both are updated in place.
        """
        projected = self.in_proj(hidden_states)
        conv_state, scan_state = carried(past_key_values, self.layer_idx)
        one_token = conv_state is not None and hidden_states.shape[1] == 1 and document_starts is None
        one_token = one_token and not torch.is_grad_enabled()
        z, x, b, c, dt = projected.split(self.splits, dim=-1)
        if self.b_norm is not None:
            b, c = norm_heads(b, self.b_norm), norm_heads(c, self.c_norm)
        if one_token and serves(self.kernels, projected, conv_state, scan_state, self.A_log, self.conv1d.weight):
            if self.b_norm is not None:
                projected = torch.cat([z, x, b, c, dt], dim=-1)
            return self.out_proj(self.compiled_step(projected[:, 0], conv_state, scan_state)[:, None]), None
        x, b = self._expand(x).flatten(-2), self._expand(b)
        c = c.unflatten(-1, (self.groups, self.d_state))
        dt = F.softplus(self.dt_proj(dt))
        a = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        if one_token:
            u, _ = self.conv1d(x[:, 0], state=conv_state, kernel=self.kernels)
            y = selective_scan_update(scan_state, u, dt[:, 0], a, b[:, 0], c[:, 0], self.D, kernel=self.kernels)
            return self.out_proj(y.unsqueeze(1) * F.silu(z)), None
        u, conv_state = self.conv1d(x, reset=document_starts, initial_state=conv_state, kernel=self.kernels)
        y, scan_state = selective_scan(
            u, dt, a, b, c, self.D, reset=document_starts, initial_state=scan_state, kernel=self.kernels
        )
        keep(past_key_values, self.layer_idx, conv_state, scan_state)
        return self.out_proj(y * F.silu(z)), None

    def step_weights(self) -> tuple[torch.Tensor, ...]:
        """What a token meets between the projections, as `chain_cpu.mamba1` takes it."""
        own, conv, dt = self._parameters, self.conv1d._parameters, self.dt_proj._parameters
        return conv["weight"], conv["bias"], dt["weight"], dt["bias"], own["A_log"], own["D"]  # type: ignore[return-value]

    def through(self, hidden: torch.Tensor, carry: torch.Tensor, blocks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One token through blocks whose mixers are such as this one, see `chain_cpu`."""
        from distill.ops import chain_cpu  # only here: it needs numba

        faithful = self.options["mil_layout"] == "faithful"
        return chain_cpu.mamba1(hidden, carry, blocks, (self.heads, self.kv_heads), faithful)

    def compiled_step(self, projected: torch.Tensor, conv_state: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`forward` of one token between the projections; projected [B, sum(splits)], returns [B, D]."""
        dt = F.softplus(self.dt_proj(projected[:, -self.dt_rank :]))  # called, for it may have an adapter
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert bias is not None
        heads, faithful = (self.heads, self.kv_heads), self.options["mil_layout"] == "faithful"
        from distill.ops import decode_cpu  # only here: it needs numba

        return decode_cpu.mamba1(
            projected, dt, taps, bias, self.A_log, self.D, conv_state, state, heads, faithful=faithful
        )


def norm_heads(states: torch.Tensor, norm: HeadRMSNorm | None) -> torch.Tensor:
    """States [..., heads * head_dim] with every head normed, where there is a norm."""
    return states if norm is None else norm(states)
