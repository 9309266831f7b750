"""4-bit weights for any transformers model: quantized while it loads, in memory, or loaded from a quantized checkpoint.

`from_pretrained(..., quantization_config=Int4Config())` quantizes tensor by tensor while loading, `quantize(model)` in
place. The config.json of a saved model lists the linear layers that are not quantized; loading raises where any other
layer is not in four bits.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from specdec.quant.activations import ScaledActivation
from specdec.quant.batch_invariant import make_batch_invariant
from specdec.quant.config import METHOD, Int4Config
from specdec.quant.empty_layers import count_parts, insert_empty_layers, meta_tensors, named_parts
from specdec.quant.experts import Int4Experts
from specdec.quant.formats import advice_on_fp8
from specdec.quant.fused_linear import link_fused_layers
from specdec.quant.heads import check_finite, head_to_quantize, quantize_head
from specdec.quant.int4 import Int4Tensor
from specdec.quant.int8 import Int8Linear
from specdec.quant.layers import (
    abbreviate,
    is_4bit,
    layers_to_quantize,
    select_layers,
    shape_of,
    warn_of_full_precision,
)
from specdec.quant.linear import CAST_ERROR, Int4Linear
from specdec.quant.rounding import round_to_nearest


class Quantize(ConversionOps):
    """Replace the full-precision weights of 4-bit layers by the tensors of an Int4Linear, one weight at a time."""

    def __init__(self, quantizer: Int4Quantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any,
        target_patterns: Any,
        *,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, name):
                parts[name] = weight
                continue
            module = name.removesuffix(".weight")
            weight = weight.T if module in self.quantizer.transposed else weight
            try:
                parts |= named_parts(module, _rounded(module, weight, self.quantizer.quantization_config))
            except ValueError as error:  # transformers would replace it by its own report; it is raised after loading
                self.quantizer.failures.append(error)
            if self.quantizer.on_layer is not None:
                self.quantizer.on_layer(module)
        return parts


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """What transformers calls while it loads a model with an Int4Config."""

    quantization_config: Int4Config

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.is_loading = False
        self.failures: list[ValueError] = []
        self.shapes: dict[str, torch.Size] = {}  # of the loaded parameters: not every transformers checks them
        self.head: str | None = None  # the name of an output head that is quantized once it is loaded
        self.transposed: set[str] = set()  # names of GPT-2's Conv1D layers, which store their weights [in, out]
        self.on_layer, self.tensors = quantization_config.on_layer, quantization_config.tensors
        self.quantization_config.on_layer = self.quantization_config.tensors = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.is_loading = True
        if self.pre_quantized:
            self._prepare_quantized(model, checkpoint_files)
        else:
            self._prepare_to_quantize(model)

    def _prepare_quantized(self, model: Any, checkpoint_files: Any) -> None:
        """Insert empty layers for a checkpoint's 4-bit tensors."""
        config = self.quantization_config
        tensors = meta_tensors(checkpoint_files) if self.tensors is None else self.tensors
        config.skip_modules = insert_empty_layers(model, tensors, config.skip_modules)
        parts = count_parts(model)
        if config.parts not in (None, parts):
            raise ValueError(
                f"the checkpoint lacks 4-bit tensors, or has too many: its config.json says {config.parts}, its files"
                f" have {parts}; download it again, or quantize the original again"
            )
        self.shapes = {name: value.shape for name, value in model.named_parameters()}

    def _prepare_to_quantize(self, model: Any) -> None:
        """Insert empty layers for the full-precision weights of a checkpoint, which Quantize fills."""
        config = self.quantization_config
        chosen, left_out = select_layers(model, config)
        self.transposed = {name for name, layer in chosen.items() if isinstance(layer, Conv1D)}
        for name, layer in chosen.items():
            rows, columns = shape_of(layer)
            size = columns if config.group_size == -1 else config.group_size
            with torch.device("meta"):
                scale = torch.empty(rows, columns // size, dtype=torch.bfloat16)
                zero = None if config.symmetric else torch.empty(scale.shape, dtype=torch.uint8)
                int4 = Int4Tensor(torch.empty(rows, columns // 2, dtype=torch.uint8), scale, zero)
                # Like the tensor in the file until it is quantized: some versions of transformers cast to the
                # parameter's dtype.
                weight = torch.empty(rows, columns, dtype=layer.weight.dtype)
            empty = Int4Linear(int4, layer.bias)
            empty.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, empty)
        self.shapes = {name: value.shape for name, value in model.named_parameters()}
        for name, layer in chosen.items():
            rows, columns = shape_of(layer)
            self.shapes[f"{name}.weight"] = torch.Size([rows, columns // 2])
        self.head = head_to_quantize(model, config)
        _record_left_out(config, left_out)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failures:
            raise self.failures[0]
        self._check_loaded(model)
        for module in model.modules():
            if isinstance(module, Int4Linear | Int8Linear | Int4Experts | ScaledActivation):
                for value in module.parameters(recurse=False):
                    value.requires_grad_(False)
        if self.head is not None:
            config = self.quantization_config
            quantize_head(model, self.head, config, lambda name: model.get_parameter(f"{name}.weight"))
            if self.on_layer is not None:
                self.on_layer(self.head)
        self.is_loading, self.on_layer, self.tensors, self.shapes, self.head = False, None, None, {}, None
        self.quantization_config.parts = count_parts(model)
        prepare_quantized_model(model, self.quantization_config)
        return model

    def _check_loaded(self, model: Any) -> None:
        """Raise ValueError where a 4-bit tensor is offloaded or missing, or a parameter has another shape."""
        missing, offloaded = [], []
        for name, module in model.named_modules():
            if isinstance(module, Int4Linear | Int8Linear | Int4Experts | ScaledActivation):
                for part, value in module.named_parameters(recurse=False):
                    if value.is_meta:
                        offloaded.append(f"{name}.{part}")
                    # transformers fills a missing tensor with random numbers.
                    elif self.is_loading and not getattr(value, "_is_hf_initialized", False):
                        missing.append(f"{name}.{part}")
        if offloaded:
            raise ValueError(
                f"device_map offloads {abbreviate(offloaded)}, to the disk or the CPU, which 4-bit weights do not"
                " support; give their layers a device to stay on, e.g. device_map={'': 'cpu'}"
            )
        if missing:
            raise ValueError(
                f"the checkpoint lacks {abbreviate(missing)}; without it the layer's weights would be garbage"
            )
        for name, value in model.named_parameters():
            if value.shape != (shape := self.shapes.get(name, value.shape)):
                raise ValueError(
                    f"the checkpoint has {name} {list(value.shape)} where the model has {list(shape)}; is config.json"
                    " its own?"
                )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module_name, _, part = param_name.rpartition(".")
        return not self.pre_quantized and part == "weight" and isinstance(model.get_submodule(module_name), Int4Linear)

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight after quantization, from which transformers computes device maps."""
        return 0.57

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def quantize(
    model: PreTrainedModel, config: Int4Config | None = None, *, on_layer: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """Quantize a model in memory, in place, layer by layer; returns it.

    on_layer: called with the name of each layer when it is quantized. Raises ValueError, and leaves the model
    unchanged, where it is quantized already, nothing in it can be quantized, or a weight is not finite.
    """
    config = Int4Config() if config is None else config
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"quantize() takes a transformers model, got {type(model).__name__}")
    if not isinstance(config, Int4Config):
        raise TypeError(f"config must be an Int4Config, got {type(config).__name__}")
    if is_4bit(model):
        raise ValueError("the model is in 4 bits already; quantizing twice would only lose more")
    if (
        getattr(model, "hf_quantizer", None) is not None
        or getattr(model.config, "quantization_config", None) is not None
    ):
        method = getattr(model.config.quantization_config, "quant_method", None) or model.config.quantization_config
        method = getattr(method, "value", method)
        advice = advice_on_fp8(method) or "quantize the original instead"
        raise ValueError(f"the model is quantized already, by {method}; {advice}")
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in layers_to_quantize(model, config)}
    for name, weight in weights.items():
        check_finite(name, weight)
    return quantize_from(weights.pop, model, config, on_layer=on_layer)


def quantize_from(
    weight_of: Callable[[str], Tensor],
    model: PreTrainedModel,
    config: Int4Config,
    *,
    on_layer: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """As quantize(), with weights that are computed one at a time.

    weight_of: a layer's name -> its weight, in the layer's own layout. The model's own weights are not read and may be
    on meta, so only one layer has to exist in full precision at any one time.
    """
    config = copy.copy(config)
    chosen, left_out = select_layers(model, config)
    for name, layer in chosen.items():
        weight = weight_of(name)
        replacement = Int4Linear(_rounded(name, weight.T if isinstance(layer, Conv1D) else weight, config), layer.bias)
        model.set_submodule(name, replacement.train(layer.training))
        if on_layer is not None:
            on_layer(name)
    head = head_to_quantize(model, config)
    if head is not None:
        quantize_head(model, head, config, weight_of)
        if on_layer is not None:
            on_layer(head)
    _record_left_out(config, left_out)
    quantizer = Int4Quantizer(config, pre_quantized=False)
    for attribute, value in (("hf_quantizer", quantizer), ("is_quantized", True), ("quantization_method", METHOD)):
        setattr(model, attribute, value)
    quantizer.postprocess_model(model)
    return model


def prepare_quantized_model(model: Any, config: Int4Config) -> None:
    """Make the rest of a 4-bit model batch-invariant, group layers with the same input, and refuse casts."""
    for module in model.modules():
        if isinstance(module, Int4Linear | Int8Linear):
            module.int8_inputs = config.activations == "int8"
    make_batch_invariant(model)
    link_fused_layers(model)
    model.__dict__["_apply"] = _CastGuard(model)


class _CastGuard:
    """A model's _apply, which every cast calls: raises before any layer is cast, which a single layer cannot do."""

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        model: Any = self.model()
        layers = (module for module in model.modules() if isinstance(module, Int4Linear | Int8Linear))
        for dtype in {layer.weight_scale.dtype for layer in layers}:
            cast = fn(torch.empty(0, dtype=dtype)).dtype
            if cast != dtype:
                raise ValueError(CAST_ERROR.format(cast))
        return type(model)._apply(model, fn, recurse)

    def __reduce__(self) -> Any:
        return _CastGuard, (self.model(),)


def _record_left_out(config: Int4Config, left_out: dict[str, list[str]]) -> None:
    """Warn of the layers left out, and store their full names in the config, which is saved with the model."""
    warn_of_full_precision(left_out)
    config.skip_modules = [name for names in left_out.values() for name in names]


def _rounded(name: str, weight: Tensor, config: Int4Config) -> Int4Tensor:
    check_finite(name, weight)
    return round_to_nearest(weight, config.group_size, config.symmetric)
