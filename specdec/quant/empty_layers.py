"""Empty 4-bit layers on the meta device, which transformers fills from a checkpoint, and the tensors that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specdec.quant.activations import SCALE_NAME, ScaledActivation, is_activation
from specdec.quant.experts import PROJECTIONS, Int4Experts
from specdec.quant.heads import QuantizedHead, head_name, insert_head
from specdec.quant.int4 import Int4Tensor
from specdec.quant.int8 import Int8Linear
from specdec.quant.layers import abbreviate, linear_layers, module_renamer, shape_of, tensor_renamer, tied_weights
from specdec.quant.linear import WEIGHT_TENSORS, Int4Linear


def insert_empty_layers(model: Any, tensors: Mapping[str, Tensor], left_out: Iterable[str]) -> list[str]:
    """Replace a model's modules by empty 4-bit ones where a checkpoint has their tensors.

    left_out: names of the linear layers that the checkpoint has in full precision. -> the names of the linear layers
    that stay. Raises ValueError where model and tensors don't fit, or a layer is neither in four bits nor in left_out.
    """
    linears, module_name = linear_layers(model), module_renamer(model)
    layers, experts, activations = set(), set(), set()
    tensor_name = tensor_renamer(model)
    tensors = {tensor_name(name)[0]: value for name, value in tensors.items()}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == f"{PROJECTIONS[0]}_scale":
            experts.add(module)
        elif part in WEIGHT_TENSORS[1:]:
            layers.add(module)
        elif part == SCALE_NAME:
            activations.add(module)
    quantized = {module_name(module) for module in layers}
    unquantized = [name for name in linears if name not in quantized]
    expected = {module_name(module) for module in left_out}
    expected |= {name.removesuffix(".weight") for name in tied_weights(model)}
    if missing := [name for name in unquantized if name not in expected]:
        raise ValueError(
            f"the checkpoint lacks the 4-bit parts of {abbreviate(missing)}, and its config does not list them as"
            " left out; download it again, or quantize the original again"
        )
    for module in activations:
        scale = torch.empty_like(tensors[f"{module}.{SCALE_NAME}"], device="meta")
        check_activation_scale(model, f"{module}.{SCALE_NAME}", scale)
        name = module_name(module)
        model.set_submodule(name, ScaledActivation(model.get_submodule(name), scale))
    for module in layers:
        name = module_name(module)
        layer = linears.get(name)
        if layer is None:
            raise ValueError(f"the checkpoint has 4-bit parts for {module}, where this model has no linear layer")
        is_head = name == head_name(model)
        if is_head and tensors[f"{module}.weight"].dtype == torch.int8:
            empty: QuantizedHead = Int8Linear(*_empty_int8(module, tensors, *shape_of(layer)), layer.bias)
        else:
            empty = Int4Linear(_empty_layer(module, tensors, *shape_of(layer)), layer.bias)
        if is_head:
            insert_head(model, empty)
        else:
            model.set_submodule(name, empty)
    for module in experts:
        name = module_name(module)
        projections = (_empty_experts(f"{module}.{projection}", tensors) for projection in PROJECTIONS)
        model.set_submodule(name, Int4Experts(model.get_submodule(name), *projections))
    return unquantized


def check_activation_scale(model: Any, name: str, scale: Tensor) -> None:
    """Raise ValueError where a tensor "MODULE.PART" cannot be the scale [K] of an activation function of the model."""
    module = module_renamer(model)(name.rpartition(".")[0])
    modules = dict(model.named_modules())
    if not is_activation(modules.get(module)):
        raise ValueError(
            f"the checkpoint has {name}, where this model has no activation function; is config.json its own?"
        )
    widths = sorted({shape_of(layer)[1] for layer in linear_layers(modules[module.rpartition(".")[0]]).values()})
    if scale.ndim != 1 or len(scale) not in widths or not scale.is_floating_point():
        raise ValueError(
            f"{name} is {scale.dtype} {list(scale.shape)}, but must be floating [K], with K of {widths}, the input"
            " widths of the layers next to it"
        )


def _empty_layer(module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Tensor:
    """A layer's weight on meta; raises ValueError where its tensors are not those of a weight [rows, columns]."""
    found = {part: tensors.get(f"{module}.{part}") for part in WEIGHT_TENSORS}
    scale = found["weight_scale"]
    groups = 0 if scale is None or scale.ndim != 2 else scale.shape[1]
    if scale is None:
        raise ValueError(f"the checkpoint lacks {module}.weight_scale; without it the layer's weights would be garbage")
    expected = {
        "weight": ([rows, columns // 2], torch.uint8),
        "weight_scale": ([rows, groups], scale.dtype),
        "weight_zero": ([rows, groups], torch.uint8),
        "weight_perm": ([columns], torch.int32),
        "weight_codebook": ([16], None),
    }
    for part, (shape, dtype) in expected.items():
        value = found[part]
        if value is None and part == "weight":
            raise ValueError(f"the checkpoint lacks {module}.weight; its scales are there")
        if value is not None and (list(value.shape) != shape or value.dtype != (dtype or value.dtype)):
            raise ValueError(
                f"{module}.{part} is {value.dtype} {list(value.shape)}, but a 4-bit weight [{rows}, {columns}] of this"
                f" model has {dtype or 'floating'} {shape} there"
            )
    if groups == 0 or columns % groups or columns // groups % 2:
        raise ValueError(f"{module}.weight_scale has {groups} groups, which do not divide in_features={columns}")
    return Int4Tensor(*(_empty(value) for value in found.values()))  # type: ignore[arg-type]


def _empty_int8(module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of an 8-bit weight [rows, columns] on meta; raises ValueError where they are others."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if list(weight.shape) != [rows, columns] or list(scale.shape) != [rows] or not scale.is_floating_point():
        raise ValueError(
            f"{module} has codes {list(weight.shape)} and scales {scale.dtype} {list(scale.shape)}, but an 8-bit weight"
            f" of this model has {[rows, columns]} and floating {[rows]}"
        )
    return torch.empty_like(weight, device="meta"), torch.empty_like(scale, device="meta")


def _empty_experts(name: str, tensors: Mapping[str, Tensor]) -> Int4Tensor:
    weight, scale, codebook = (_empty(tensors.get(f"{name}{part}")) for part in ("", "_scale", "_codebook"))
    if weight is None or scale is None or codebook is None:
        raise ValueError(f"the checkpoint lacks a part of {name}: its codes, its scales or its codebook")
    return Int4Tensor(weight, scale, codebook=codebook)


def _empty(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.empty(like.shape, dtype=like.dtype, device="meta")


def count_parts(model: Any) -> dict[str, int]:
    """The number of quantized tensors of the model, by their name in a layer."""
    kinds = Int4Linear | Int8Linear | Int4Experts | ScaledActivation
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    return dict(
        Counter(name for module in modules for name, _ in module.named_parameters(recurse=False) if name != "bias")
    )


def named_parts(module: str, int4: Int4Tensor) -> dict[str, Tensor]:
    """The tensors of a 4-bit weight by their names in an Int4Linear at `module`."""
    values = (int4.weight, int4.scale, int4.zero, int4.perm, int4.codebook)
    return {f"{module}.{part}": value for part, value in zip(WEIGHT_TENSORS, values, strict=True) if value is not None}


def meta_tensors(files: Iterable[str]) -> dict[str, Tensor]:
    """All tensors in safetensors files, on meta: shapes and dtypes alone."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                tensors[name] = torch.empty(
                    part.get_shape(), dtype=_SAFETENSORS_DTYPES.get(part.get_dtype(), torch.float32), device="meta"
                )
    return tensors


_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
