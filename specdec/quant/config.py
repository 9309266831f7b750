"""The settings of 4-bit weights, as a transformers quantization config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.quant.int4 import GROUP_SIZES

METHOD = "specdec_int4"
VERSION = 1
HEADS = ("int8", "int4", None)
ACTIVATIONS = ("int8", None)


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """How to quantize: round to nearest, with a search for the scale of each group (see rounding.py).

    group_size: columns that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row (per channel). Groups of 16 have
    a kernel on
        CPUs only; on other devices such a layer is dequantized tile by tile for each product.
    symmetric: codes represent -8 … 7 times the scale; False gives each group a zero point.
    skip_modules: names of linear layers that keep their precision; a whole name, its beginning or its end, up to a dot.
    head: "int8" stores the output head in 8 bits with a scale a row, "int4" as the other layers, None in its own
        precision. An embedding that shares the head's weights reads the same codes.
    activations: "int8" rounds the inputs of quantized layers to 8 bits, by group of up to 64 columns, where specdec's
        CPU kernels run; None keeps 16 bits. Other devices always keep 16 bits.
    """

    def __init__(
        self,
        group_size: int = 128,
        symmetric: bool = True,
        skip_modules: Sequence[str] = (),
        head: str | None = "int8",
        activations: str | None = "int8",
    ) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size={group_size!r} is none of {', '.join(map(str, GROUP_SIZES))} (-1: one scale a row)"
            )
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric={symmetric!r} must be True or False")
        if head not in HEADS:
            raise ValueError(f"head={head!r} must be 'int8', 'int4', or None to keep its precision")
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations={activations!r} must be 'int8', or None to keep 16 bits")
        if isinstance(skip_modules, str):
            raise ValueError(f"skip_modules={skip_modules!r} must be a list of names, not one string")
        self.quant_method: Any = METHOD
        self.version = VERSION
        self.group_size = group_size
        self.symmetric = symmetric
        self.skip_modules = list(skip_modules)
        self.head = head
        self.activations = activations
        self.parts: dict[str, int] | None = (
            None  # number of 4-bit tensors by kind: a saved model shows where one is missing
        )
        # Not settings; the quantizer takes them over: a callback for each quantized layer, and tensors that are in no
        # file.
        self.on_layer: Callable[[str], None] | None = None
        self.tensors: Mapping[str, Tensor] | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """A setting by name: transformers reads a config as if it were the dict of a config.json."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in ("on_layer", "tensors")}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        values = {key: value for key, value in config_dict.items() if key not in ("quant_method", "version")}
        if config_dict.get("version") != VERSION:
            raise ValueError(
                f"this checkpoint's 4-bit format has version {config_dict.get('version')!r}, this specdec reads"
                f" {VERSION}; install the specdec that wrote it, or quantize the original again"
            )
        parts = values.pop("parts", None)
        if "quantize_head" in values:  # written before there were 8-bit heads
            values["head"] = "int4" if values.pop("quantize_head") else None
        unknown = set(values) - {"group_size", "symmetric", "skip_modules", "head", "activations"}
        if unknown:
            raise ValueError(
                f"Int4Config has no settings {sorted(unknown)}; install the specdec that wrote this config"
            )
        config = cls(**values)
        config.parts = parts
        return (config, kwargs) if return_unused_kwargs else config
