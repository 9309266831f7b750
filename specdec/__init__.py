"""Lossless speculative decoding for Hugging Face causal language models."""

from specdec.core.interfaces import Drafter
from specdec.core.stats import Stats
from specdec.core.steps import Draft, StepResult, Verdict
from specdec.generation.enable import disable, enable, last_stats
from specdec.quant.checkpoints import load_quantized
from specdec.quant.config import Int4Config
from specdec.quant.quantizer import quantize

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
