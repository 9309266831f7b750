"""MXFP4, the format of gpt_oss' experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.quant.formats.layer import Layer, Scheme
from specdec.quant.int4 import Int4Tensor

FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config of method mxfp4, which has no settings."""
    return Scheme(("_blocks", "_scales"), read, (32,), True)


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """blocks [E, N, K/32, 16], the even column in the low nibble; scales [E, N, K/32], exponents of two plus 127."""
    blocks = layer.take("_blocks", (torch.uint8,), None, None, None, 16)
    scales = layer.take("_scales", (torch.uint8,), *blocks.shape[:3])
    codebook = torch.tensor(FP4_VALUES + [-value for value in FP4_VALUES])
    return Int4Tensor(blocks.flatten(-2), scales.view(torch.float8_e8m0fnu), codebook=codebook)
