"""4-bit weights as a property of any transformers model: while it loads, in memory, or saved and loaded again.

`from_pretrained(..., quantization_config=Int4Config())` quantizes tensor by tensor while loading, `quantize(model)` does so in
place. A saved model says in its config.json which linear layers were left out; all others must be there in four bits, or loading
raises.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.quant.activations import SCALE, ScaledActivation, is_activation
from specdec.quant.batch_invariant import make_batch_invariant
from specdec.quant.cuda import FusedLinearGroup
from specdec.quant.experts import PROJECTIONS, Int4Experts
from specdec.quant.int4 import CAST, GROUP_SIZES, WEIGHT_TENSORS, Int4Linear, Int4Tensor
from specdec.quant.rounding import round_to_nearest

METHOD = "specdec_int4"
VERSION = 1
FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers that take the same input
LINEAR_CLASSES = (
    "Linear",
    "RowLinear",
    "NonDynamicallyQuantizableLinear",
    "FalconLinear",
)  # whose forward is x W^T + b


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """How to quantize: round to nearest, with a search for the scale of each group (see rounding.py).

    group_size: columns that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row (per channel). For groups of 16 only the
        compiled CPU kernel exists; elsewhere such a layer multiplies by slabs in full precision.
    symmetric: codes stand for -8 … 7 times the scale; False gives each group a zero point.
    skip_modules: names of linear layers to keep in their own precision; a whole name, its beginning or its end, up to a dot.
    quantize_head: the output head too; by default it is left out, as is a head that shares the embedding's weights always.
    """

    def __init__(
        self,
        group_size: int = 128,
        symmetric: bool = True,
        skip_modules: Sequence[str] = (),
        quantize_head: bool = False,
    ) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size={group_size!r} is none of {', '.join(map(str, GROUP_SIZES))} (-1: one scale a row)"
            )
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric={symmetric!r} must be True or False")
        if isinstance(skip_modules, str):
            raise ValueError(f"skip_modules={skip_modules!r} must be a list of names, not one string")
        self.quant_method: Any = METHOD
        self.version = VERSION
        self.group_size = group_size
        self.symmetric = symmetric
        self.skip_modules = list(skip_modules)
        self.quantize_head = quantize_head
        self.parts: dict[str, int] | None = (
            None  # a quantized model's 4-bit tensors by kind, so that a lost one is noticed
        )
        # No settings, and taken by the quantizer: who wants to know of each layer done; the tensors, where there are no files.
        self.on_layer: Callable[[str], None] | None = None
        self.tensors: Mapping[str, Tensor] | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """transformers looks a config up as if it were the dict of a config.json."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in ("on_layer", "tensors")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        values = {key: value for key, value in config_dict.items() if key not in ("quant_method", "version")}
        if config_dict.get("version") != VERSION:
            raise ValueError(
                f"this checkpoint's 4-bit format has version {config_dict.get('version')!r}, this specdec reads {VERSION};"
                " install the specdec that wrote it, or quantize the original again"
            )
        parts = values.pop("parts", None)
        unknown = set(values) - {"group_size", "symmetric", "skip_modules", "quantize_head"}
        if unknown:
            raise ValueError(f"Int4Config does not know {sorted(unknown)}")
        config = cls(**values)
        config.parts = parts
        return (config, kwargs) if return_unused_kwargs else config


class Quantize(ConversionOps):
    """Full-precision weights of 4-bit layers -> their parts, one tensor at a time."""

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
            except (
                ValueError
            ) as error:  # transformers would hide it behind a report of its own; it is raised after loading
                self.quantizer.failures.append(error)
            if self.quantizer.on_layer is not None:
                self.quantizer.on_layer(module)
        return parts


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """transformers' door to all this; see Int4Config."""

    quantization_config: Int4Config

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.is_loading = False
        self.failures: list[ValueError] = []
        self.shapes: dict[
            str, torch.Size
        ] = {}  # of the parameters, once they are loaded; not every transformers checks them
        self.transposed: set[str] = set()  # GPT-2's Conv1D layers keep their weights [in, out]
        self.on_layer, self.tensors = quantization_config.on_layer, quantization_config.tensors
        self.quantization_config.on_layer = self.quantization_config.tensors = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self.is_loading = True
        if self.pre_quantized:
            tensors = _meta_tensors(checkpoint_files) if self.tensors is None else self.tensors
            self.quantization_config.skip_modules = place_parts(model, tensors, self.quantization_config.skip_modules)
            parts = _count_parts(model)
            if self.quantization_config.parts not in (None, parts):
                raise ValueError(
                    f"the checkpoint lacks 4-bit tensors, or has too many: its config.json says {self.quantization_config.parts},"
                    f" its files have {parts}; get it whole, or quantize the original again"
                )
            self.shapes = {name: value.shape for name, value in model.named_parameters()}
            return
        chosen, left_out = _choose(model, self.quantization_config)
        self.transposed = {name for name, layer in chosen.items() if isinstance(layer, Conv1D)}
        for name, layer in chosen.items():
            rows, columns = shape_of(layer)
            size = columns if self.quantization_config.group_size == -1 else self.quantization_config.group_size
            with torch.device("meta"):
                scale = torch.empty(rows, columns // size, dtype=torch.bfloat16)
                zero = None if self.quantization_config.symmetric else torch.empty(scale.shape, dtype=torch.uint8)
                int4 = Int4Tensor(torch.empty(rows, columns // 2, dtype=torch.uint8), scale, zero)
            empty = Int4Linear(int4, layer.bias)
            # As what comes from the file, until it is quantized: some transformers cast a tensor to the dtype that waits for it.
            empty.weight = nn.Parameter(
                torch.empty(rows, columns, dtype=layer.weight.dtype, device="meta"), requires_grad=False
            )
            model.set_submodule(name, empty)
        self.shapes = {name: value.shape for name, value in model.named_parameters()}
        for name, layer in chosen.items():
            rows, columns = shape_of(layer)
            self.shapes[f"{name}.weight"] = torch.Size([rows, columns // 2])
        _settle(self.quantization_config, left_out)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failures:
            raise self.failures[0]
        missing, offloaded = [], []
        for name, module in model.named_modules():
            if isinstance(module, Int4Linear | Int4Experts | ScaledActivation):
                for part, value in module.named_parameters(recurse=False):
                    if value.is_meta:
                        offloaded.append(f"{name}.{part}")
                    elif self.is_loading and not getattr(value, "_is_hf_initialized", False):  # made up by transformers
                        missing.append(f"{name}.{part}")
                    value.requires_grad_(False)
        if offloaded:
            raise ValueError(
                f"device_map offloads {some(offloaded)}, to the disk or the CPU, which 4-bit weights do not support; give their"
                " layers a device to stay on, e.g. device_map={'': 'cpu'}"
            )
        if missing:
            raise ValueError(f"the checkpoint lacks {some(missing)}; without it the layer's weights would be garbage")
        for name, value in model.named_parameters():
            if value.shape != (shape := self.shapes.get(name, value.shape)):
                raise ValueError(
                    f"the checkpoint has {name} {list(value.shape)} where the model has {list(shape)}; is config.json its own?"
                )
        self.is_loading, self.on_layer, self.tensors, self.shapes = False, None, None, {}
        self.quantization_config.parts = _count_parts(model)
        finish(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module_name, _, part = param_name.rpartition(".")
        return not self.pre_quantized and part == "weight" and isinstance(model.get_submodule(module_name), Int4Linear)

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight that waits to be quantized will have, for device maps."""
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

    on_layer: called with the name of each layer done. Raises ValueError, leaving the model as it was, where it is quantized
    already or nothing in it can be.
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
        raise ValueError(
            f"the model is quantized already, by {getattr(method, 'value', method)}; quantize the original instead"
        )
    chosen, _ = _choose(model, config)
    for name, layer in chosen.items():
        _check_finite(name, layer.weight)
    return quantize_from(lambda name: chosen[name].weight.detach(), model, config, on_layer=on_layer)


def quantize_from(
    weight_of: Callable[[str], Tensor],
    model: PreTrainedModel,
    config: Int4Config,
    *,
    on_layer: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """The same with weights made when their turn comes: weight_of(layer) -> the weight, in the layer's own layout.

    The layers' own weights are not read and may be on meta, so no two in full precision need ever be there at once.
    """
    config = copy.copy(config)
    chosen, left_out = _choose(model, config)
    for name, layer in chosen.items():
        weight = weight_of(name)
        replacement = Int4Linear(_rounded(name, weight.T if isinstance(layer, Conv1D) else weight, config), layer.bias)
        model.set_submodule(name, replacement.train(layer.training))
        if on_layer is not None:
            on_layer(name)
    _settle(config, left_out)
    quantizer = Int4Quantizer(config, pre_quantized=False)
    for attribute, value in (("hf_quantizer", quantizer), ("is_quantized", True), ("quantization_method", METHOD)):
        setattr(model, attribute, value)
    quantizer.postprocess_model(model)
    return model


def layers_to_quantize(model: Any, config: Int4Config) -> list[str]:
    """Names of the linear layers that `config` would bring to four bits; the model may be on meta."""
    return list(_choose(model, config)[0])


def is_4bit(model: PreTrainedModel) -> bool:
    """Whether any layer of the model runs on 4-bit weights of ours."""
    return any(isinstance(module, Int4Linear | Int4Experts) for module in model.modules())


def place_parts(model: Any, tensors: Mapping[str, Tensor], left_out: Iterable[str]) -> list[str]:
    """Put empty 4-bit layers where a checkpoint has their tensors: -> the names of the linear layers that stay as they are.

    Raises where model and tensors don't fit, and where a layer is neither there in four bits nor said to be left out.
    """
    linears, own = linear_layers(model), own_names(model)
    layers, experts, activations = set(), set(), set()
    place = placing(model)
    tensors = {place(name)[0]: value for name, value in tensors.items()}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == f"{PROJECTIONS[0]}_scale":
            experts.add(module)
        elif part in WEIGHT_TENSORS[1:]:
            layers.add(module)
        elif part == SCALE:
            activations.add(module)
    stay = [name for name in linears if name not in {own(module) for module in layers}]
    excused = {own(module) for module in left_out} | {name.removesuffix(".weight") for name in tied_weights(model)}
    if missing := [name for name in stay if name not in excused]:
        raise ValueError(
            f"the checkpoint lacks the 4-bit parts of {some(missing)}, and does not say that they were left out"
        )
    for module in activations:
        scale = torch.empty_like(tensors[f"{module}.{SCALE}"], device="meta")
        check_activation_scale(model, f"{module}.{SCALE}", scale)
        model.set_submodule(own(module), ScaledActivation(model.get_submodule(own(module)), scale))
    for module in layers:
        layer = linears.get(own(module))
        if layer is None:
            raise ValueError(f"the checkpoint has 4-bit parts for {module}, where this model has no linear layer")
        model.set_submodule(own(module), Int4Linear(_empty_layer(module, tensors, *shape_of(layer)), layer.bias))
    for module in experts:
        old = model.get_submodule(own(module))
        model.set_submodule(
            own(module), Int4Experts(old, *(_empty_experts(f"{module}.{p}", tensors) for p in PROJECTIONS))
        )
    return stay


def placing(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function from a checkpoint's name of a tensor to the model's own, and whether it is merged with others there."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()

    def place(name: str) -> tuple[str, bool]:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if key not in expected and name in expected:
            return name, False
        return key, pattern is not None

    return place


def own_names(model: Any) -> Callable[[str], str]:
    """A function from a checkpoint's name of a module to the model's: it may be of the model with its head, or of its base."""
    module_names = {name for name, _ in model.named_modules()}
    below = f"{model.base_model_prefix}."

    def own(name: str) -> str:
        known = {name, name.removeprefix(below), below + name} & module_names
        return known.pop() if known else name

    return own


def check_activation_scale(model: Any, name: str, scale: Tensor) -> None:
    """Raise ValueError where a tensor "MODULE.PART" cannot be the scale [K] behind an activation function of the model."""
    module = own_names(model)(name.rpartition(".")[0])
    modules = dict(model.named_modules())
    if not is_activation(modules.get(module)):
        raise ValueError(
            f"the checkpoint has {name}, where this model has no activation function; is config.json its own?"
        )
    widths = sorted({shape_of(layer)[1] for layer in linear_layers(modules[module.rpartition(".")[0]]).values()})
    if scale.ndim != 1 or len(scale) not in widths or not scale.is_floating_point():
        raise ValueError(
            f"{name} is {scale.dtype} {list(scale.shape)}, but must be floating [K], with K of {widths} as its neighbours' inputs"
        )


def _empty_layer(module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Int4Tensor:
    """The shapes and dtypes of a layer's parts, on meta; raises where they are not those of a weight [rows, columns]."""
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
                f"{module}.{part} is {value.dtype} {list(value.shape)}, but a 4-bit weight [{rows}, {columns}] of this model has"
                f" {dtype or 'floating'} {shape} there"
            )
    if groups == 0 or columns % groups or columns // groups % 2:
        raise ValueError(f"{module}.weight_scale has {groups} groups, which do not divide in_features={columns}")
    return Int4Tensor(*(_empty(value) for value in found.values()))  # type: ignore[arg-type]


def _empty_experts(name: str, tensors: Mapping[str, Tensor]) -> Int4Tensor:
    weight, scale, codebook = (_empty(tensors.get(f"{name}{part}")) for part in ("", "_scale", "_codebook"))
    if weight is None or scale is None or codebook is None:
        raise ValueError(f"the checkpoint lacks a part of {name}: its codes, its scales or its codebook")
    return Int4Tensor(weight, scale, codebook=codebook)


def _empty(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.empty(like.shape, dtype=like.dtype, device="meta")


def finish(model: Any) -> None:
    """What every 4-bit model gets: row-invariant rooms, layers that share a launch, and a guard against casting it."""
    make_batch_invariant(model)
    link_fused_layers(model)
    model.__dict__["_apply"] = _CastGuard(model)


def link_fused_layers(model: Any) -> None:
    """Tell the 4-bit layers that take the same input, by their names, of each other."""
    for module in model.modules():
        for names in FUSED_LAYERS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), Int4Linear)]
            if len(layers) == len(names):
                siblings = FusedLinearGroup(layers)
                for layer in layers:
                    layer.siblings = siblings


class _CastGuard:
    """Stands for a model's _apply, through which every cast goes: a layer could object only when others are cast already."""

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        model: Any = self.model()
        for dtype in {module.weight_scale.dtype for module in model.modules() if isinstance(module, Int4Linear)}:
            cast = fn(torch.empty(0, dtype=dtype)).dtype
            if cast != dtype:
                raise ValueError(CAST.format(cast))
        return type(model)._apply(model, fn, recurse)

    def __reduce__(self) -> Any:
        return _CastGuard, (self.model(),)


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers whose forward is x W^T + b, by name: what can be in four bits."""
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module).__name__ in LINEAR_CLASSES and isinstance(module, nn.Linear)) or isinstance(module, Conv1D)
    }


def tied_weights(model: Any) -> set[str]:
    """Names of parameters that are another one's."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _count_parts(model: Any) -> dict[str, int]:
    """How many 4-bit tensors of each kind the model's layers have."""
    modules = [module for module in model.modules() if isinstance(module, Int4Linear | Int4Experts | ScaledActivation)]
    return dict(
        Counter(name for module in modules for name, _ in module.named_parameters(recurse=False) if name != "bias")
    )


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _choose(model: Any, config: Int4Config) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The linear layers to quantize by name, and those left out by reason."""
    tied = tied_weights(model)
    layers = linear_layers(model)
    for pattern in config.skip_modules:
        if all(should_convert_module(name, [pattern]) for name in layers):
            raise ValueError(
                f"skip_modules names {pattern!r}, but no linear layer of this model is called that or lies below it"
            )
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    chosen: dict[str, Any] = {}
    left_out: dict[str, list[str]] = {}
    for name, layer in layers.items():
        columns = shape_of(layer)[1]
        if name in head and f"{name}.weight" in tied:
            reason = "the output head shares the embedding's weights"
        elif name in head and not config.quantize_head:
            reason = "the output head; quantize_head=True takes it along"
        elif not should_convert_module(name, config.skip_modules):
            reason = "named in skip_modules"
        elif columns % (config.group_size if config.group_size > 0 else 2):
            divisors = [size for size in GROUP_SIZES if size > 0 and columns % size == 0]
            advice = f"; group_size={max(divisors)} would" if divisors else "; no group size does"
            reason = f"group_size={config.group_size} does not divide in_features={columns}{advice}"
        else:
            chosen[name] = layer
            continue
        left_out.setdefault(reason, []).append(name)
    stacked = [name for name, value in model.named_parameters() if value.ndim == 3]
    if stacked:
        left_out["experts in one tensor stay in their own precision"] = stacked
    if not chosen:
        why = "; ".join(f"{some(names)}: {reason}" for reason, names in left_out.items()) or "it has no linear layers"
        raise ValueError(f"nothing in this model can be quantized ({why})")
    return chosen, left_out


def _settle(config: Int4Config, left_out: dict[str, list[str]]) -> None:
    """Say what was left out, and note it in the config, by full name, for whoever loads the result."""
    warn_of_full_precision(left_out, stacklevel=3)
    config.skip_modules = [name for names in left_out.values() for name in names]


def warn_of_full_precision(left_out: Mapping[str, Sequence[str]], stacklevel: int) -> None:
    """One warning that names, by reason, what is not in four bits; none where there is nothing."""
    if left_out:
        said = "; ".join(f"{some(names)} ({reason})" for reason, names in left_out.items())
        warnings.warn(f"specdec keeps in full precision: {said}", stacklevel=stacklevel)


def some(names: Sequence[str]) -> str:
    """The first names of a list that may be long, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_finite(name: str, weight: Tensor) -> None:
    if not all(bool(chunk.isfinite().all()) for chunk in torch.split(weight, 64)):
        raise ValueError(f"the weight of {name} has NaN or infinite values; nothing sensible can be rounded from them")


def _rounded(name: str, weight: Tensor, config: Int4Config) -> Int4Tensor:
    _check_finite(name, weight)
    return round_to_nearest(weight, config.group_size, config.symmetric)


def named_parts(module: str, int4: Int4Tensor) -> dict[str, Tensor]:
    """The parts of a 4-bit weight under the names that Int4Linear gives them."""
    values = (int4.weight, int4.scale, int4.zero, int4.perm, int4.codebook)
    return {f"{module}.{part}": value for part, value in zip(WEIGHT_TENSORS, values, strict=True) if value is not None}


def _meta_tensors(files: Iterable[str]) -> dict[str, Tensor]:
    """Shapes and dtypes of all tensors in safetensors files, as tensors on meta."""
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                tensors[name] = torch.empty(
                    part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.float32), device="meta"
                )
    return tensors


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
