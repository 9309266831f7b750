"""AWQ in the layout of its "gemm" kernel, as AutoAWQ writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.quant.formats.layer import FLOATS, Layer, Scheme, nibbles, require, zero_points
from specdec.quant.int4 import Int4Tensor, pack

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of eight lies in nibble AWQ_ORDER[i] of its word


def scheme(settings: Mapping[str, Any]) -> Scheme:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    require("awq", {"version": version}, version=("gemm",))
    require("awq", {"bits": None} | dict(settings), bits=(4,), backend=("autoawq", "auto", None))
    symmetric = settings.get("zero_point") is False
    return Scheme((".qweight", ".qzeros", ".scales"), read, (settings.get("group_size", -1),), symmetric)


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """qweight [K, N/8] and qzeros [K/G, N/8], eight nibbles a word in AWQ_ORDER; scales [K/G, N]."""
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = qweight.shape[0], 8 * qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOATS, groups, rows)
    zero = None
    if not scheme.symmetric or ".qzeros" in layer.tensors:
        qzeros = layer.take(".qzeros", (torch.int32,), groups, rows // 8)
        zero = nibbles(qzeros).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
    codes = nibbles(qweight).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
    return Int4Tensor(pack(codes), scales.T.contiguous(), zero_points(zero))
