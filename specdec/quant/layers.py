"""The linear layers of a model: which of them are quantized, and what checkpoints call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from specdec.quant.batch_invariant import BatchInvariantLinear
from specdec.quant.config import Int4Config
from specdec.quant.experts import Int4Experts
from specdec.quant.heads import head_name, head_to_quantize, why_not_quantized
from specdec.quant.int4 import GROUP_SIZES
from specdec.quant.linear import Int4Linear
from specdec.utils.warn import warn

# Classes whose forward is x W^T + b.
LINEAR_CLASSES = ("Linear", BatchInvariantLinear.__name__, "NonDynamicallyQuantizableLinear", "FalconLinear")


def is_4bit(model: PreTrainedModel) -> bool:
    """Whether any layer of the model is an Int4Linear or Int4Experts."""
    return any(isinstance(module, Int4Linear | Int4Experts) for module in model.modules())


def linear_layers(model: Any) -> dict[str, Any]:
    """The layers whose forward is x W^T + b, by name: those that can be quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module).__name__ in LINEAR_CLASSES and isinstance(module, nn.Linear)) or isinstance(module, Conv1D)
    }


def tied_weights(model: Any) -> set[str]:
    """Names of parameters that share the tensor of another one."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def shape_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def select_layers(model: Any, config: Int4Config) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The linear layers to quantize, by name, without the output head; and the names of all that stay, by reason.

    Raises ValueError where a name in skip_modules matches no layer, or nothing can be quantized.
    """
    layers = linear_layers(model)
    for pattern in config.skip_modules:
        if all(should_convert_module(name, [pattern]) for name in layers):
            raise ValueError(
                f"skip_modules names {pattern!r}, but no linear layer of this model is called that or lies below it"
            )
    head = head_name(model)
    chosen: dict[str, Any] = {}
    left_out: dict[str, list[str]] = {}
    for name, layer in layers.items():
        columns = shape_of(layer)[1]
        if name == head:
            if (why_not := why_not_quantized(model, config)) is None:
                continue
            reason = why_not
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
        why = (
            "; ".join(f"{abbreviate(names)}: {reason}" for reason, names in left_out.items())
            or "it has no linear layers"
        )
        raise ValueError(f"nothing in this model can be quantized ({why})")
    return chosen, left_out


def layers_to_quantize(model: Any, config: Int4Config) -> list[str]:
    """Names of the linear layers that `config` quantizes, the output head last; the model may be on meta."""
    head = head_to_quantize(model, config)
    return [*select_layers(model, config)[0], *([] if head is None else [head])]


def tensor_renamer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function: a tensor's name in a checkpoint -> its name in the model, whether it is merged with others there."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()

    def rename(name: str) -> tuple[str, bool]:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if key not in expected and name in expected:
            return name, False
        return key, pattern is not None

    return rename


def module_renamer(model: Any) -> Callable[[str], str]:
    """A function: a module's name in a checkpoint -> its name in the model.

    The checkpoint may be of the model with its head, or of its base model.
    """
    module_names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> str:
        matches = {name, name.removeprefix(prefix), prefix + name} & module_names
        return matches.pop() if matches else name

    return rename


def warn_of_full_precision(left_out: Mapping[str, Sequence[str]]) -> None:
    """Warn once of the layers that are not in four bits, by reason; no warning where there are none."""
    if left_out:
        layers = "; ".join(f"{abbreviate(names)} ({reason})" for reason, names in left_out.items())
        warn(f"specdec keeps in full precision: {layers}")


def abbreviate(names: Sequence[str]) -> str:
    """The first three names of a list and the number of the others, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
