"""Activation functions whose output is divided by a scale, which AWQ moves out of the next linear layer's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SCALE_NAME = "activation_scale"  # the parameter's name


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
    """Whether a module is an activation function of PyTorch or transformers without parameters."""
    is_known = type(module).__module__ in (torch.nn.modules.activation.__name__, "transformers.activations")
    return is_known and not any(module.parameters())
