"""GPTQ, as AutoGPTQ (v1) and GPTQModel (v1, v2) write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.quant.formats.layer import FLOATS, Layer, Scheme, as_bytes, nibbles, require, zero_points
from specdec.quant.int4 import SYMMETRIC_ZERO, Int4Tensor


def scheme(settings: Mapping[str, Any]) -> Scheme:
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    require("gptq", {"checkpoint_format": version}, checkpoint_format=("gptq", "gptq_v2"))
    require("gptq", {"bits": None} | dict(settings), bits=(4,), pack_dtype=("int32",), is_marlin_format=(False, None))
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    sizes = (settings.get("group_size", -1),)
    return Scheme(suffixes, read, sizes, bool(settings.get("sym")), version, bool(settings.get("desc_act")))


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """qweight [K/8, N] and qzeros [K/G, N/8], eight nibbles a word; scales [K/G, N]; g_idx [K], the group of each column."""
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = 8 * qweight.shape[0], qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOATS, groups, rows)
    qzeros = layer.take(".qzeros", (torch.int32,), groups, -(-rows // 8))
    zero = nibbles(qzeros)[:, :rows]
    if scheme.version == "gptq":  # v1 stores them less one
        zero = (zero + 1) & 15
    # There are checkpoints with v2's zero points under v1's name; where all is symmetric, only one zero point can be meant.
    if scheme.symmetric and (zero == zero[0, 0]).all() and abs(int(zero[0, 0]) - SYMMETRIC_ZERO) == 1:
        zero = torch.full_like(zero, SYMMETRIC_ZERO)
    weight, perm = as_bytes(qweight.T), None
    if scheme.act_order or ".g_idx" in layer.tensors:
        weight, perm = layer.ordered(".g_idx", weight, groups)
    return Int4Tensor(weight, scales.T.contiguous(), zero_points(zero.T), perm)
