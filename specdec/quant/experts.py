"""Mixture-of-experts weights in four bits: gpt_oss' experts in MXFP4."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.quant.int4 import Int4Tensor

PROJECTIONS = ("gate_up_proj", "down_proj")


class Int4Experts(nn.Module):
    """gpt_oss' experts on 4-bit weights [E, N, K], in the place of transformers' GptOssExperts.

    (hidden states [T, D], expert ids [T, k], their routing weights [T, k]) -> [T, D]. Only experts that a token is
    routed to are dequantized, one projection at a time.
    """

    def __init__(self, experts: Any, gate_up: Int4Tensor, down: Int4Tensor) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.apply_gate = type(experts)._apply_gate
        self.alpha, self.limit = experts.alpha, experts.limit
        for name, int4 in zip(PROJECTIONS, (gate_up, down), strict=True):
            assert int4.codebook is not None
            self.register_parameter(name, nn.Parameter(int4.weight, requires_grad=False))
            self.register_parameter(f"{name}_scale", nn.Parameter(int4.scale, requires_grad=False))
            self.register_parameter(f"{name}_codebook", nn.Parameter(int4.codebook, requires_grad=False))
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))

    def int4(self, projection: str) -> Int4Tensor:
        """The 4-bit weights [E, N, K] of "gate_up_proj" or "down_proj"."""
        weight, scale, codebook = (getattr(self, f"{projection}{part}") for part in ("", "_scale", "_codebook"))
        return Int4Tensor(weight, scale, codebook=codebook)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        if self.training:
            raise ValueError("4-bit experts cannot be trained and have no training mode; call model.eval()")
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(router_indices).tolist():
            token, choice = torch.where(router_indices == expert)
            gate_up = self._project("gate_up_proj", expert, hidden_states[token])
            down = self._project("down_proj", expert, self.apply_gate(self, gate_up))
            output.index_add_(0, token, (down * routing_weights[token, choice, None]).to(output.dtype))
        return output

    def _project(self, projection: str, expert: int, x: Tensor) -> Tensor:
        weight = self.int4(projection)[expert].stored(x.dtype)
        return F.linear(x, weight, getattr(self, f"{projection}_bias")[expert].to(x.dtype))
