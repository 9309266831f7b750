"""A call's logits processors and stopping criteria: which are known to specdec, and which must be called in lockstep.

Known ones are transformers' own whose result for a row depends on its ids and scores alone, not on earlier calls. They
are called for several positions at once, or not at all. All others are called as plain decoding calls them: see
specdec/core/lockstep.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as stock
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from specdec.core.sampling import Processor

# Their result depends on the scores alone, row by row: they run on all positions of a window at once.
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
# Their result depends on the ids before a position too: they run once for each prefix length.
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


KNOWN_PROCESSORS = (*POINTWISE, *BY_PREFIX)


@dataclass(frozen=True)
class Callbacks:
    """What a call has the decoding loop call: logits processors, stopping criteria, a streamer or None."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: Any = None

    def known_processors(self) -> list[Processor]:
        """The known processors. Drafts go through these too; the others are called with committed text alone."""
        return [
            Processor(function, needs_prefix=type(function) in BY_PREFIX)
            for function in self.processors
            if type(function) in KNOWN_PROCESSORS
        ]

    @property
    def has_eos(self) -> bool:
        """Whether plain decoding pads a row that has ended. Without an EOS id the row goes on with ids of its own."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    def need_lockstep(self, batch_size: int) -> bool:
        """Whether a callback has to be called once for each committed position, in order, with the full batch."""
        if any(type(function) not in KNOWN_PROCESSORS for function in self.processors):
            return True
        known: tuple[type, ...] = (EosTokenCriteria, MaxLengthCriteria)
        if batch_size == 1 or self.has_eos:
            known = (*known, StopStringCriteria)
        if any(type(criterion) not in known for criterion in self.criteria):
            return True
        return self.streamer is not None and batch_size > 1

    @property
    def stop_ids(self) -> Tensor | None:
        """Ids that end a row, int64 [S]; None where there are none."""
        stop_ids = [c.eos_token_id.flatten() for c in self.criteria if type(c) is EosTokenCriteria]
        return torch.cat(stop_ids) if stop_ids else None

    @property
    def max_length(self) -> int:
        """The largest length of the padded text."""
        return min([2**62, *(c.max_length for c in self.criteria if type(c) is MaxLengthCriteria)])

    def stop_at_string(self) -> Callable[[Tensor], bool] | None:
        """A function (one row's text [1, L]) -> whether a stop string ends it; None where there are no stop strings."""
        criteria = [c for c in self.criteria if type(c) is StopStringCriteria]
        return (lambda text: any(bool(criterion(text, None)) for criterion in criteria)) if criteria else None
