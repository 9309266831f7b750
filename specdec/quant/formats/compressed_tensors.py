"""compressed-tensors in its "pack-quantized" format, as llm-compressor writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.quant.formats.layer import FLOATS, Layer, Scheme, as_bytes, nibbles, require, zero_points
from specdec.quant.int4 import SYMMETRIC_ZERO, Int4Tensor


def scheme(settings: Mapping[str, Any]) -> Scheme:
    method = "compressed-tensors"
    require(method, settings, format=("pack-quantized",), kv_cache_scheme=(None, {}))
    require(method, settings.get("sparsity_config") or {}, format=("dense",))
    require(method, settings.get("transform_config") or {}, config_groups=({},))
    groups = list((settings.get("config_groups") or {}).values())
    if not groups:
        raise ValueError("this compressed-tensors checkpoint has no config_groups, so nothing says how its weights lie")
    for group in groups:
        require(method, group, format=("pack-quantized", None), input_activations=(None,), output_activations=(None,))
        require(method, group.get("weights") or {"num_bits": None}, num_bits=(4,), type=("int",), strategy=("group", "channel"))
    weights = [group["weights"] for group in groups]
    sizes = {(args.get("group_size") if args.get("strategy") == "group" else -1): None for args in weights}
    symmetric = {bool(args.get("symmetric", True)) for args in weights}
    act_order = {args.get("actorder") in ("group", "dynamic", True) for args in weights}
    if len(symmetric) > 1 or len(act_order) > 1:
        raise ValueError(f"this {method} checkpoint has config_groups that differ in symmetric or actorder; that is not read")
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
    return Scheme(suffixes, read, tuple(sizes), symmetric.pop(), act_order=act_order.pop())


def read(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """weight_packed [N, K/8], eight nibbles a word; weight_scale [N, K/G]; weight_zero_point [N/8, K/G], packed along N."""
    rows, columns = layer.take(".weight_shape", (torch.int64, torch.int32), 2).tolist()
    packed = layer.take(".weight_packed", (torch.int32,), rows, -(-columns // 8))
    groups = layer.groups(scheme, ".weight_scale", columns, 1)
    scale = layer.take(".weight_scale", FLOATS, rows, groups)
    zero = None
    if not scheme.symmetric or ".weight_zero_point" in layer.tensors:
        if layer.tensors.get(".weight_zero_point", packed).dtype == torch.int8:  # early versions did not pack it
            zero = (layer.take(".weight_zero_point", (torch.int8,), rows, groups) + SYMMETRIC_ZERO).to(torch.uint8)
        else:
            zero = nibbles(layer.take(".weight_zero_point", (torch.int32,), -(-rows // 8), groups).T)[:, :rows].T
    weight, perm = as_bytes(packed)[:, : columns // 2], None
    unset = (layer.tensors.get(".weight_g_idx", torch.tensor(0)) == -1).all()
    if (scheme.act_order or ".weight_g_idx" in layer.tensors) and not unset:
        weight, perm = layer.ordered(".weight_g_idx", weight, groups)
    return Int4Tensor(weight.contiguous(), scale, zero_points(zero), perm)
