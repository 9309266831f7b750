"""AWQ in the layout of its "gemm" kernel, as AutoAWQ writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.quant.formats.layer import FLOAT_DTYPES, Layer, Scheme, Settings, codes_of, zero_points
from specdec.quant.int4 import Int4Tensor, pack

SUFFIXES = (".qweight", ".qzeros", ".scales")
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of eight is nibble ORDER[i] of its word
OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


def scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config of method awq."""
    renamed = {new: values[old] for old, new in OLD_NAMES.items() if old in values} | dict(values)
    version = values.get("version") or values.get("format")
    renamed["version"] = version.lower() if isinstance(version, str) else version
    settings = Settings("this awq checkpoint", renamed, "transformers with the gptqmodel package")
    settings.one_of("version", "gemm")
    settings.one_of("backend", "auto", "autoawq", None)
    symmetric = not settings.flag("zero_point", True)
    return Scheme(SUFFIXES, read, symmetric=symmetric, has_activation_scales=True, **fields(settings))


def fields(settings: Settings) -> dict[str, Any]:
    """The fields of a Scheme that may differ between layers."""
    return {"bits": settings.one_of("bits", 4, default=None), "group_sizes": (settings.group_size(),)}


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """qweight [K, N/8] and qzeros [K/G, N/8], eight nibbles a word in ORDER; scales [K/G, N]."""
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = qweight.shape[0], 8 * qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOAT_DTYPES, groups, rows)
    zero = None
    if not scheme.symmetric or ".qzeros" in layer.tensors:
        zero = _codes(layer.take(".qzeros", (torch.int32,), groups, rows // 8))
    return Int4Tensor(pack(_codes(qweight)), scales.T.contiguous(), zero_points(zero))


def _codes(words: Tensor) -> Tensor:
    """int32 [R, C/8] -> uint8 [C, R]."""
    return codes_of(words).unflatten(1, (-1, 8))[..., ORDER].flatten(1).T
