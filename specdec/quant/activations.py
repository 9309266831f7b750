"""Activation functions with a scale behind them, which AWQ moved out of the next linear layer's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SCALE = "activation_scale"  # the parameter's name


class ScaledActivation(nn.Module):
    """function(x) / scale: x [..., K] of any floating dtype -> [..., K] of the same. scale: [K], any floating dtype."""

    def __init__(self, function: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.function = function
        self.activation_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y / self.activation_scale.to(y.dtype)


def is_activation(module: Any) -> bool:
    """Whether a module is an activation function of PyTorch's or transformers' that has no parameters."""
    kind = type(module).__module__
    return kind in (torch.nn.modules.activation.__name__, "transformers.activations") and not any(module.parameters())
