"""Lossless speculative decoding for Hugging Face causal language models."""

from specdec.generate import disable, enable, last_stats
from specdec.interfaces import Draft, Drafter, Outcome, Verdict
from specdec.stats import Stats

__all__ = ["Draft", "Drafter", "Outcome", "Stats", "Verdict", "disable", "enable", "last_stats"]
__version__ = "0.1.0"
