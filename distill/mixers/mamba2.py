"""Mamba-2 in the form that serving tools hold natively: scalar decay a head, every head its own B and C.

Legend: B = batch, T = tokens, E = hidden size, H = query heads, P = head_dim (channels a head, and N = P states a
channel), D = H * P, K = d_conv.

Source: Dao and Gu, arXiv:2405.21060, section 7; the container is GraniteMoeHybrid's Mamba layer (n_groups = H), so
that a trained mixer goes out weight by weight: no bias in the projections, no limits on dt, and the gated norm with
the model's own eps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill.errors import UserError, choose
from distill.mixers.mamba1 import DT_FLOOR, DT_MAX, DT_MIN, STARTS, norm_heads
from distill.ops.kernels import serves
from distill.ops.modules import CausalConv1d, GatedRMSNorm, HeadRMSNorm
from distill.ops.padding import padding_first
from distill.ops.ssd import ssd, ssd_update
from distill.ops.states import carried, keep

A_MIN, A_MAX = 1.0, 16.0


class Mixer(nn.Module):
    """State space duality: causal convolution of x, B and C, scan head by head, gated norm, output projection.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, output = out_proj(norm(y * SiLU(z))).
    """

    operators = ("causal_conv1d", "ssd")
    ignores = ("d_state", "mil_layout")

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.check(config)
        options = config.mixer_config
        self.layer_idx = layer_idx
        self.kernels = "auto"
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.d_inner = self.heads * self.head_dim
        self.conv_init = options["conv_init"]
        self.splits = [self.d_inner, 3 * self.d_inner, self.heads]  # z, (x, B, C), dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=False)
        self.conv1d = CausalConv1d(3 * self.d_inner, options["d_conv"])
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(self.d_inner, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(self.d_inner, config.hidden_size, bias=False)
        self.b_norm = self.c_norm = None
        if options["bc_norm"] is True:
            self.b_norm, self.c_norm = (HeadRMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        if self.in_proj.weight.numel():
            self.reset_parameters()
        else:  # ZeRO-3 takes a module apart as soon as it is made, so that only what is directly here is still whole
            self.reset_own()

    @staticmethod
    def check(config: Any) -> None:
        """Raise UserError where the options do not fit this mixer."""
        options = config.mixer_config
        if not 2 <= options["d_conv"] <= 8:
            raise UserError(f"mixer.d_conv={options['d_conv']} must be in [2, 8]")
        choose("mixer.conv_init", options["conv_init"], STARTS)
        if options["z_init"] != "default":
            raise UserError("mixer.z_init=identity needs a bias of the gate, which mamba2 has not; use default")

    def mil_slots(self) -> dict[str, tuple[str, slice]]:
        """MIL slot -> (parameter module, rows): x <- W_V, B <- W_K, C <- W_Q, out <- W_O, norms of B, C <- of k, q.

        Every query head has rows of its own for x and B, which start as those of the key/value head that serves it.
        """
        inner = self.d_inner
        slots = {slot: ("in_proj", slice(part * inner, (part + 1) * inner)) for part, slot in enumerate("xBC", 1)}
        slots["out"] = ("out_proj", slice(None))
        if self.b_norm is not None:
            slots |= {"B_norm": ("b_norm", slice(None)), "C_norm": ("c_norm", slice(None))}
        return slots

    @torch.no_grad()
    def fold_bias(self, slot: str, bias: torch.Tensor) -> None:
        """Take the bias [D] of a projection into the convolution's, times the sum of its taps: the same but for the
        first K - 1 tokens of a document. A bias of the output has no place in this form and is left to training."""
        if slot in "xBC":
            rows = slice("xBC".index(slot) * self.d_inner, ("xBC".index(slot) + 1) * self.d_inner)
            assert self.conv1d.bias is not None
            self.conv1d.bias[rows] += bias * self.conv1d.weight[rows, 0].sum(-1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's initialisation: A uniform in -[1, 16], D = 1, dt bias such that softplus(bias) is log-uniform."""
        for layer in (self.in_proj, self.conv1d, self.norm, self.out_proj, self.b_norm, self.c_norm):
            if layer is not None:
                layer.reset_parameters()
        self.reset_own()
        if self.conv_init == "identity":
            self.conv1d.weight.zero_()
            self.conv1d.weight[:, 0, -1].fill_(1.0)
            assert self.conv1d.bias is not None
            self.conv1d.bias.zero_()

    @torch.no_grad()
    def reset_own(self) -> None:
        """The part of ``reset_parameters`` that is in no module inside this one: A, D and the bias of dt."""
        self.A_log.uniform_(A_MIN, A_MAX).log_()
        self.D.fill_(1.0)
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.exp(torch.rand(self.heads, device=self.D.device) * (high - low) + low).clamp(min=DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

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
        [B, 3 D, K-1], recurrent state [B, H, P, N] in fp32; both are updated in place.
        """
        projected = self.in_proj(hidden_states)
        conv_state, scan_state = carried(past_key_values, self.layer_idx)
        one_token = conv_state is not None and hidden_states.shape[1] == 1 and document_starts is None
        one_token = one_token and not torch.is_grad_enabled()
        z, xbc, dt = projected.split(self.splits, dim=-1)
        if self.b_norm is not None:
            x, b, c = xbc.split(self.d_inner, dim=-1)
            xbc = torch.cat([x, norm_heads(b, self.b_norm), norm_heads(c, self.c_norm)], dim=-1)
        if one_token and serves(self.kernels, projected, conv_state, scan_state, self.A_log, self.conv1d.weight):
            if self.b_norm is not None:
                projected = torch.cat([z, xbc, dt], dim=-1)
            return self.out_proj(self.compiled_step(projected[:, 0], conv_state, scan_state)[:, None]), None
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)
        a = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        if one_token:
            x, b, c = self._heads(self.conv1d(xbc[:, 0], state=conv_state, kernel=self.kernels)[0])
            y = ssd_update(scan_state, x, dt[:, 0], a, b, c, self.D, kernel=self.kernels)
            return self.out_proj(self.norm(y.unsqueeze(1), z)), None
        xbc, conv_state = self.conv1d(xbc, reset=document_starts, initial_state=conv_state, kernel=self.kernels)
        x, b, c = self._heads(xbc)
        y, scan_state = ssd(
            x, dt, a, b, c, self.D, reset=document_starts, initial_state=scan_state, kernel=self.kernels
        )
        keep(past_key_values, self.layer_idx, conv_state, scan_state)
        return self.out_proj(self.norm(y, z)), None

    def step_weights(self) -> tuple[torch.Tensor, ...]:
        """What a token meets between the projections, as `chain_cpu.mamba2` takes it."""
        own, conv = self._parameters, self.conv1d._parameters
        weights = conv["weight"], conv["bias"], own["dt_bias"], own["A_log"], own["D"], self.norm._parameters["weight"]
        return weights  # type: ignore[return-value]

    def through(self, hidden: torch.Tensor, carry: torch.Tensor, blocks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """One token through blocks whose mixers are such as this one, see `chain_cpu`."""
        from distill.ops import chain_cpu  # only here: it needs numba

        return chain_cpu.mamba2(hidden, carry, blocks, self._eps())

    def compiled_step(self, projected: torch.Tensor, conv_state: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`forward` of one token between the projections; projected [B, sum(splits)], returns [B, D]."""
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        assert bias is not None
        from distill.ops import decode_cpu  # only here: it needs numba

        return decode_cpu.mamba2(
            projected, taps, bias, self.dt_bias, self.A_log, self.D, self.norm.weight, self._eps(), conv_state, state
        )

    def _eps(self) -> float:
        return self.norm.eps if self.norm.eps is not None else torch.finfo(torch.float32).eps

    def _heads(self, xbc: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., 3 D] to x, B and C, each [..., H, P]."""
        return xbc.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
