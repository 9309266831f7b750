"""Lossless speculative decoding for Hugging Face causal language models."""

from specdec.generate import disable, enable, last_stats
from specdec.interfaces import Draft, Drafter, Outcome, Verdict
from specdec.quant.checkpoints import load_quantized
from specdec.quant.quantizer import Int4Config, quantize
from specdec.stats import Stats

__all__ = [
    "Draft",
    "Drafter",
    "Int4Config",
    "Outcome",
    "Stats",
    "Verdict",
    "disable",
    "enable",
    "last_stats",
    "load_quantized",
    "quantize",
]
__version__ = "0.1.0"
