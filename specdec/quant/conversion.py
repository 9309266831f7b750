"""Checkpoints of other libraries' formats -> tensors in the canonical 4-bit form, with the names that a model loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from specdec.quant.activations import SCALE_NAME
from specdec.quant.empty_layers import check_activation_scale, named_parts
from specdec.quant.experts import PROJECTIONS
from specdec.quant.formats.layer import DOWNLOAD_AGAIN, Layer, Scheme
from specdec.quant.int4 import Int4Tensor
from specdec.quant.layers import linear_layers, shape_of, tensor_renamer, tied_weights, warn_of_full_precision


def convert_checkpoint(
    files: Mapping[str, Any], scheme: Scheme, skeleton: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a checkpoint, its quantized weights in the canonical form; one layer is read at a time.

    files: the open safetensors file of each tensor. skeleton: the model on meta. A quantized weight that is no linear
    layer of the model, or has other than 4 bits, is dequantized to `dtype` and keeps the checkpoint's name, from which
    transformers merges it. Raises ValueError where a tensor is damaged or does not fit the model.
    """
    conversion = _Conversion(files, scheme, skeleton, dtype)
    layers, others = _split_by_layer(files, scheme.suffixes)
    for name, suffixes in layers.items():
        conversion.add_quantized(name, suffixes)
    for name in others:
        conversion.add_unquantized(name, is_of_layer=name.removesuffix(".bias") in layers)
    warn_of_full_precision(conversion.dequantized)
    return conversion.tensors


def _split_by_layer(names: Mapping[str, Any], suffixes: tuple[str, ...]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """-> the tensors of each quantized layer by suffix, and the names of all other tensors."""
    layers: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None:
            others.append(name)
        else:
            layers.setdefault(name.removesuffix(suffix), {})[suffix] = name
    return layers, others


class _Conversion:
    """One checkpoint's conversion. tensors: the result so far. dequantized: layers in full precision, by reason."""

    def __init__(self, files: Mapping[str, Any], scheme: Scheme, skeleton: Any, dtype: torch.dtype) -> None:
        self.files, self.scheme, self.skeleton, self.dtype = files, scheme, skeleton, dtype
        self.rename = tensor_renamer(skeleton)
        self.linears, self.expected = linear_layers(skeleton), skeleton.state_dict()
        self.tied = tied_weights(skeleton)
        self.tensors: dict[str, Tensor] = {}
        self.dequantized: dict[str, list[str]] = {}
        self.ignored: list[str] = []  # layers that the model's class ignores on loading

    def add_quantized(self, name: str, suffixes: Mapping[str, str]) -> None:
        """Convert the layer of that name, whose tensors are given by suffix."""
        layer = Layer(name, {suffix: self.files[part].get_tensor(part) for suffix, part in suffixes.items()})
        key, is_merged = self.rename(f"{name}.weight")
        linear = None if is_merged else self.linears.get(key.removesuffix(".weight"))
        if self.scheme.has_activation_scales and suffixes.keys() == {".scales"} and linear is None:
            scale = _activation_scale(self.skeleton, suffixes[".scales"], layer.tensors[".scales"])
            self.tensors[f"{name}.{SCALE_NAME}"] = scale
            return
        weight, bits = self._read(layer)
        if isinstance(weight, Int4Tensor) and weight.codebook is not None:
            self.tensors |= _expert_parts(name, weight, self.expected)
        elif linear is not None:
            self._add_linear(name, key, linear, weight, bits)
        elif key in self.expected:
            weight = weight.dequantize(self.dtype) if isinstance(weight, Int4Tensor) else weight.to(self.dtype)
            self._add_dequantized(
                name, weight, "transformers has them with others in one tensor, which is no linear layer"
            )
        elif any(re.search(pattern, key) for pattern in self.skeleton._keys_to_ignore_on_load_unexpected or ()):
            self.ignored.append(name)
        else:
            raise ValueError(
                f"the checkpoint has 4-bit parts for {name}, where this model has no layer; is config.json its own?"
            )

    def add_unquantized(self, name: str, is_of_layer: bool) -> None:
        """Copy a tensor that is not quantized. is_of_layer: it is the bias of a quantized layer."""
        value = self.files[name].get_tensor(name)
        key, is_merged = self.rename(name)
        expected = self.expected.get(key)
        is_misfit = expected is not None and (value.shape != expected.shape or not value.is_floating_point())
        if expected is not None and is_misfit and not is_merged:
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)}, but this model has {list(expected.shape)} there"
            )
        layer = name.removesuffix(".bias")
        if expected is not None or layer == name or not is_of_layer:
            self.tensors[name] = value
        elif layer not in self.ignored and value.any():  # AutoGPTQ wrote a bias of zeros for every layer
            raise ValueError(
                f"the checkpoint has a bias {name}, this model has none there; is config.json the checkpoint's?"
            )

    def _read(self, layer: Layer) -> tuple[Int4Tensor | Tensor, int]:
        """-> the layer's weight, in full precision where it does not have 4 bits, and its bits."""
        scheme = self.scheme.for_layer(layer.name)
        if scheme is None:
            raise ValueError(
                f"{layer.name} has quantized tensors, but the checkpoint's config leaves it in full precision;"
                f" {DOWNLOAD_AGAIN}"
            )
        weight = scheme.read(layer, scheme)
        if not (weight.scale.float() if isinstance(weight, Int4Tensor) else weight).isfinite().all():
            raise ValueError(f"the scales of {layer.name} have NaN or infinite values; {DOWNLOAD_AGAIN}")
        return weight, scheme.bits

    def _add_linear(self, name: str, key: str, linear: Any, weight: Int4Tensor | Tensor, bits: int) -> None:
        """Add the weight of a linear layer, which is `key` in the model."""
        shape, expected = list(weight.shape), list(shape_of(linear))
        if shape != expected:
            raise ValueError(
                f"{name}{self.scheme.suffixes[0]} is of a weight {shape}, but this model has {expected} there"
            )
        if key in self.tied:
            raise ValueError(f"{name} is quantized, but config.json ties it to the embedding; untie them there")
        if isinstance(weight, Int4Tensor):
            self.tensors |= named_parts(key.removesuffix(".weight"), weight)
        else:
            weight = (weight.T if isinstance(linear, Conv1D) else weight).to(self.dtype).contiguous()
            self._add_dequantized(name, weight, f"of {bits} bits in the checkpoint; 4-bit layers hold 4")

    def _add_dequantized(self, name: str, weight: Tensor, reason: str) -> None:
        self.tensors[f"{name}.weight"] = weight
        self.dequantized.setdefault(reason, []).append(name)


def _activation_scale(skeleton: Any, name: str, scale: Tensor) -> Tensor:
    """AWQ's scale of an activation function, unchanged; raises ValueError where it cannot be one."""
    check_activation_scale(skeleton, name, scale)
    if not scale.float().isfinite().all() or not scale.all():
        raise ValueError(f"{name} has NaN, infinite or zero values; {DOWNLOAD_AGAIN}")
    return scale


def _expert_parts(name: str, int4: Int4Tensor, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an expert projection [E, N, K] by their names in Int4Experts."""
    parameter = expected.get(name)
    if parameter is None or parameter.ndim != 3 or name.rpartition(".")[2] not in PROJECTIONS:
        raise ValueError(f"{name}_blocks has no place in this model; MXFP4 is read for gpt_oss")
    if parameter.mT.shape != int4.shape:
        raise ValueError(
            f"{name}_blocks is of experts {list(int4.shape)}, but this model has {list(parameter.mT.shape)} there"
        )
    assert int4.codebook is not None
    return {name: int4.weight, f"{name}_scale": int4.scale, f"{name}_codebook": int4.codebook}
