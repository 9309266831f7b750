"""A call's logits processors and stopping criteria: which are known to specdec, and which have to be called in lockstep.

Known are transformers' own whose result for a row follows from its ids and scores alone, whatever was asked before. They are
called for several positions at once, or not at all. Everything else is called as plain decoding calls it: see lockstep.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from specdec.core.sampling import Processor

# The scores alone decide, row by row: these run on all positions of a window at once.
POINTWISE = (
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
    stock.MinPLogitsWarper,
    stock.SuppressTokensLogitsProcessor,
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.TypicalLogitsWarper,
)
# The ids before a position decide too: these run once for each prefix length.
BY_PREFIX = (
    stock.EncoderNoRepeatNGramLogitsProcessor,
    stock.EncoderRepetitionPenaltyLogitsProcessor,
    stock.ExponentialDecayLengthPenalty,
    stock.ForcedBOSTokenLogitsProcessor,
    stock.ForcedEOSTokenLogitsProcessor,
    stock.MinLengthLogitsProcessor,
    stock.MinNewTokensLengthLogitsProcessor,
    stock.NoBadWordsLogitsProcessor,
    stock.NoRepeatNGramLogitsProcessor,
    stock.RepetitionPenaltyLogitsProcessor,
    stock.SequenceBiasLogitsProcessor,
    stock.SuppressTokensAtBeginLogitsProcessor,
    stock.TopHLogitsWarper,
)


def known_processors(processors: Iterable[Any]) -> list[Processor]:
    """Those that drafts go through as well; the others are called with committed text alone."""
    return [
        Processor(function, needs_prefix=type(function) in BY_PREFIX)
        for function in processors
        if type(function) in (*POINTWISE, *BY_PREFIX)
    ]


def has_eos(criteria: StoppingCriteriaList) -> bool:
    """Whether plain decoding goes on with padding in a row that has ended; else the row goes on with ids of its own."""
    return any(hasattr(criterion, "eos_token_id") for criterion in criteria)


def need_lockstep(processors: Iterable[Any], criteria: StoppingCriteriaList, batch_size: int) -> bool:
    """Whether some callback has to be called for each committed position in order, with the full batch."""
    if any(type(function) not in (*POINTWISE, *BY_PREFIX) for function in processors):
        return True
    known: tuple[type, ...] = (EosTokenCriteria, MaxLengthCriteria)
    if batch_size == 1 or has_eos(criteria):
        known = (*known, StopStringCriteria)
    return any(type(criterion) not in known for criterion in criteria)


class KnownCriteria:
    """What known criteria come to.

    stop_ids: [S] int64, or None. max_length: of the padded text. stop_strings: criteria that take one row's text at a time.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        stop_ids = [c.eos_token_id.flatten() for c in criteria if type(c) is EosTokenCriteria]
        self.stop_ids: Tensor | None = torch.cat(stop_ids) if stop_ids else None
        self.max_length = min([2**62, *(c.max_length for c in criteria if type(c) is MaxLengthCriteria)])
        self.stop_strings = [c for c in criteria if type(c) is StopStringCriteria]

    def stops(self, text: Tensor) -> bool:
        """Whether a stop string ends this row's text [1, L]."""
        return any(bool(criterion(text, None)) for criterion in self.stop_strings)
