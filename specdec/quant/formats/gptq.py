"""GPTQ, as AutoGPTQ (v1) and GPTQModel (v1, v2) write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdec.quant.formats.layer import FLOAT_DTYPES, Layer, Override, Scheme, Settings, as_bytes, codes_of, zero_points
from specdec.quant.int4 import Int4Tensor

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
BITS = (4, 2, 8)  # of single layers; those of 2 and 8 bits are dequantized


def scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config of method gptq."""
    settings = Settings("this gptq checkpoint", values, "transformers with the gptqmodel package")
    version = settings.one_of("checkpoint_format" if values.get("checkpoint_format") else "format", "gptq", "gptq_v2")
    settings.one_of("is_marlin_format", False)
    overrides = [_override(settings, pattern) for pattern in settings.table("dynamic").values]
    return Scheme(SUFFIXES, read, version=version, overrides=overrides, **fields(settings, 4))


def fields(settings: Settings, *bits: int) -> dict[str, Any]:
    """The fields of a Scheme that may differ between layers."""
    settings.one_of("pack_dtype", "int32")
    return {
        "bits": settings.one_of("bits", *bits, default=None),
        "group_sizes": (settings.group_size(),),
        "symmetric": settings.flag("sym", False),
        "act_order": settings.flag("desc_act", False),
    }


def _override(settings: Settings, pattern: str) -> Override:
    """One entry of GPTQModel's `dynamic`: a regular expression for the start of names; "-:" in front: not quantized."""
    dynamic = settings.table("dynamic")
    changed = settings.changed_by(dynamic.table(pattern))
    is_quantized = not pattern.startswith("-:")
    matches = dynamic.pattern(pattern[2:] if pattern.startswith(("-:", "+:")) else pattern).match
    return Override(matches, fields(changed, *BITS) if is_quantized else None)


def read(layer: Layer, scheme: Scheme) -> Int4Tensor | Tensor:
    """qweight [K/C, N] and qzeros [K/G, N/C], C codes a word; scales [K/G, N]; g_idx [K], the group of each column."""
    codes_per_word, largest = 32 // scheme.bits, (1 << scheme.bits) - 1
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = codes_per_word * qweight.shape[0], qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOAT_DTYPES, groups, rows).T
    qzeros = layer.take(".qzeros", (torch.int32,), groups, -(-rows // codes_per_word))
    zero = codes_of(qzeros, scheme.bits)[:, :rows].T
    if scheme.version == "gptq":  # v1 stores them less one
        zero = (zero + 1) & largest
    # Some checkpoints have v2's zero points under v1's name; symmetric codes have one possible zero point.
    middle = 1 << scheme.bits - 1
    if scheme.symmetric and (zero == zero[0, 0]).all() and abs(int(zero[0, 0]) - middle) == 1:
        zero = torch.full_like(zero, middle)
    if scheme.act_order:
        layer.take(".g_idx", (torch.int32, torch.int64), columns)
    if scheme.bits != 4:
        group = layer.group_of_columns(".g_idx", columns, groups)
        return (codes_of(qweight.T, scheme.bits).float() - zero.float()[:, group]) * scales.float()[:, group]
    weight, perm = layer.ordered(".g_idx", as_bytes(qweight.T), groups)
    return Int4Tensor(weight, scales.contiguous(), zero_points(zero), perm)
