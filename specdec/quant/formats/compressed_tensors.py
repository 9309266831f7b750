"""compressed-tensors in its "pack-quantized" format, as llm-compressor writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.quant.formats.layer import (
    DOWNLOAD_AGAIN,
    FLOAT_DTYPES,
    Layer,
    Scheme,
    Settings,
    as_bytes,
    codes_of,
    zero_points,
)
from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor

SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


def scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config of method compressed-tensors."""
    settings = Settings(
        "this compressed-tensors checkpoint", values, "transformers with the compressed-tensors package"
    )
    settings.one_of("format", "pack-quantized")
    settings.one_of("kv_cache_scheme", None, {})
    settings.table("sparsity_config").one_of("format", "dense")
    settings.table("transform_config").one_of("config_groups", None, {})
    groups = settings.table("config_groups")
    if not groups.values:
        raise ValueError(
            f"{settings.subject} has no config_groups, so the layout of its weights is unknown; {DOWNLOAD_AGAIN}"
        )
    sizes: dict[int, None] = {}  # a set that keeps its order
    layouts = set()
    for name in groups.values:
        group = groups.table(name)
        group.one_of("format", "pack-quantized")
        group.one_of("input_activations", None)
        group.one_of("output_activations", None)
        weights = group.table("weights")
        weights.one_of("num_bits", 4, default=None)
        weights.one_of("type", "int")
        default = "channel" if weights.values.get("group_size") in (None, -1) else "group"
        has_groups = weights.one_of("strategy", "group", "channel", default=default) == "group"
        sizes[weights.one_of("group_size", *GROUP_SIZES, default=None) if has_groups else -1] = None
        order = weights.one_of("actorder", None, "weight", "static", "group", "dynamic", True, False)
        layouts.add((weights.flag("symmetric", True), order in ("group", "dynamic", True)))
    if len(layouts) > 1:
        raise ValueError(
            f"{settings.subject} has config_groups that differ in symmetric or actorder, which is not supported;"
            f" {settings.other_reader} reads them"
        )
    [(symmetric, act_order)] = layouts
    return Scheme(SUFFIXES, read, tuple(sizes), symmetric, act_order=act_order)


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """weight_packed [N, K/8], 8 nibbles a word; weight_scale [N, K/G]; weight_zero_point [N/8, K/G], packed along N."""
    rows, columns = layer.take(".weight_shape", (torch.int64, torch.int32), 2).tolist()
    packed = layer.take(".weight_packed", (torch.int32,), rows, -(-columns // 8))
    groups = layer.groups(scheme, ".weight_scale", columns, 1)
    scale = layer.take(".weight_scale", FLOAT_DTYPES, rows, groups)
    zero = None
    if not scheme.symmetric or ".weight_zero_point" in layer.tensors:
        if layer.tensors.get(".weight_zero_point", packed).dtype == torch.int8:  # early versions do not pack it
            signed = layer.take(".weight_zero_point", (torch.int8,), rows, groups)
            if signed.min() < -SYMMETRIC_ZERO or signed.max() >= SYMMETRIC_ZERO:
                raise ValueError(f"{layer.name}.weight_zero_point has numbers outside of four bits; {DOWNLOAD_AGAIN}")
            zero = (signed + SYMMETRIC_ZERO).to(torch.uint8)
        else:
            zero = codes_of(layer.take(".weight_zero_point", (torch.int32,), -(-rows // 8), groups).T)[:, :rows].T
    weight, perm = as_bytes(packed)[:, : columns // 2], None
    if scheme.act_order or ".weight_g_idx" in layer.tensors:
        group = layer.take(".weight_g_idx", (torch.int32, torch.int64), columns)
        if not (group == -1).all():  # which early versions write for no order
            weight, perm = layer.ordered(".weight_g_idx", weight, groups)
    return Int4Tensor(weight.contiguous(), scale, zero_points(zero), perm)
