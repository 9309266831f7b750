"""Lossless speculative decoding for Hugging Face causal language models.

Public names are imported when they are first used, so that `specdec --help` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec.utils.import_hook import after_import

if TYPE_CHECKING:
    from specdec.core.interfaces import Drafter
    from specdec.core.stats import Stats
    from specdec.core.steps import Draft, StepResult, Verdict
    from specdec.generation.enable import disable, enable, last_stats
    from specdec.quant.checkpoints import load_quantized
    from specdec.quant.quantizer import Int4Config, quantize

__all__ = [
    "Draft",
    "Drafter",
    "Int4Config",
    "Stats",
    "StepResult",
    "Verdict",
    "disable",
    "enable",
    "last_stats",
    "load_quantized",
    "quantize",
]
__version__ = "0.1.0"

_MODULES = {
    "Draft": "specdec.core.steps",
    "Drafter": "specdec.core.interfaces",
    "Int4Config": "specdec.quant.quantizer",
    "Stats": "specdec.core.stats",
    "StepResult": "specdec.core.steps",
    "Verdict": "specdec.core.steps",
    "disable": "specdec.generation.enable",
    "enable": "specdec.generation.enable",
    "last_stats": "specdec.generation.enable",
    "load_quantized": "specdec.quant.checkpoints",
    "quantize": "specdec.quant.quantizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# from_pretrained reads 4-bit checkpoints: this imports what registers their format and attention with transformers
after_import("transformers.modeling_utils", lambda: import_module("specdec.generation.enable"), package=__name__)
