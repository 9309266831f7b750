"""Suffix decoding with a draft model: each row takes the drafts of whichever is expected to have more accepted.

Oliaro and others, SuffixDecoding (2024, arXiv 2411.04975), describe the combination: suffix decoding where texts repeat
themselves, a draft model where they don't.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from specdec.core.verification import one_hot
from specdec.drafters.model import MIN_CATCH_UP, ModelDrafter
from specdec.drafters.suffix import SuffixDecoding
from specdec.runtime.runner import ModelRunner


@dataclass
class ExpectedAcceptance:
    """How many draft ids of each drafter are expected to be accepted, from what was accepted before.

    A draft model: each id with the same chance, accepted / tried. Suffix decoding: its score, which counts what has
    followed before, times accepted / promised. Both begin at 1/2, with the weight of two ids.
    """

    accepted_of_model: float = 1
    tried_of_model: float = 2
    accepted_of_suffix: float = 1
    promised_by_suffix: float = 2

    def of_model(self, num_ids: int) -> float:
        """Of num_ids draft ids of the model."""
        chance = self.accepted_of_model / self.tried_of_model
        return sum(chance**count for count in range(1, num_ids + 1))

    def of_suffix(self, score: float) -> float:
        """Of a proposal of suffix decoding with this score."""
        return score * self.accepted_of_suffix / self.promised_by_suffix

    def observe_model(self, drafted: int, accepted: int) -> None:
        self.accepted_of_model += accepted
        self.tried_of_model += min(accepted + 1, drafted)

    def observe_suffix(self, score: float, accepted: int) -> None:
        self.accepted_of_suffix += accepted
        self.promised_by_suffix += score


class SuffixHybrid:
    """Suffix decoding and a draft model; in each step a row takes the proposal that promises more accepted ids.

    The draft model runs in steps in which some row takes its drafts. num_read: the number of leading ids of each row
    that its KV cache covers. Where ids are on a GPU, each step waits for them.
    """

    remembers_calls = True  # so the same seed may give another text

    def __init__(self, model_drafter: ModelDrafter, suffix: SuffixDecoding | None = None) -> None:
        self.model_drafter = model_drafter
        self.suffix = SuffixDecoding() if suffix is None else suffix
        self.expected = ExpectedAcceptance()

    @property
    def runner(self) -> ModelRunner:
        """The draft model's."""
        return self.model_drafter.runner

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """What a draft head reads of the target."""
        return self.model_drafter.feature_layers

    def match_target(self, target: ModelRunner) -> None:
        """Take the target of the call that begins."""
        self.model_drafter.match_target(target)

    def spare(self) -> SuffixHybrid:
        """Another one with the same settings, model, finished answers and expectations, for a call at the same time."""
        other = SuffixHybrid(self.model_drafter.spare(), self.suffix.spare())
        other.expected = self.expected
        return other

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.suffix.begin(sequences, sampling)
        self.model_drafter.begin(sequences, sampling)
        self.num_read = [0] * sequences.batch_size
        self._drop_proposal()

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        proposal, self.scores = self.suffix.propose_with_scores(sequences, limit)
        lengths, limits = sequences.lengths.tolist(), limit.tolist()
        if (context := self.runner.context) is not None:
            limits = [min(most, max(context - length, 0)) for most, length in zip(limits, lengths, strict=True)]
        takes_model = [
            self.expected.of_model(most) > self.expected.of_suffix(score)
            for most, score in zip(limits, self.scores, strict=True)
        ]
        if not any(takes_model):
            return proposal
        self.takes_model = takes_model
        unread = [length - num_read for length, num_read in zip(lengths, self.num_read, strict=True)]
        width = max(MIN_CATCH_UP, *(count for count, is_model in zip(unread, takes_model, strict=True) if is_model))
        self.model_drafter.num_catch_up = width
        is_model = torch.tensor(takes_model, device=limit.device)
        drafted = self.model_drafter.propose(sequences, limit.masked_fill(~is_model, 0))
        for row, count in enumerate(unread):
            if count <= width:
                self.num_read[row] = lengths[row]
        return _by_row(is_model, drafted, proposal)

    def observe(self, result: StepResult) -> None:
        self.suffix.observe(result)
        if any(self.takes_model) or any(self.scores):
            for row, step in enumerate(result.steps):
                if step is None or step.drafted == 0:
                    continue
                if self.takes_model[row]:
                    self.expected.observe_model(step.drafted, step.accepted)
                    self.num_read[row] += self.model_drafter.num_kept(step.drafted, step.accepted)
                else:
                    self.expected.observe_suffix(self.scores[row], step.accepted)
        self._drop_proposal()

    def _drop_proposal(self) -> None:
        """Forget which rows took the model's drafts, and the scores of suffix decoding, until the next proposal."""
        self.takes_model, self.scores = [False] * len(self.num_read), [0.0] * len(self.num_read)


def _by_row(is_first: Tensor, first: Draft, second: Draft) -> Draft:
    """Rows of `first` where is_first [B] bool, else of `second`, whose ids are one-hot."""
    width = max(first.ids.shape[1], second.ids.shape[1])
    first_ids, second_ids = (F.pad(draft.ids, (0, width - draft.ids.shape[1])) for draft in (first, second))
    ids = torch.where(is_first[:, None], first_ids, second_ids)
    lengths = torch.where(is_first, first.lengths, second.lengths)
    if first.probs is None:
        return Draft(ids, None, lengths)
    probs = F.pad(first.probs, (0, 0, 0, width - first.probs.shape[1]))
    probs = torch.where(is_first[:, None, None], probs, one_hot(second_ids, probs.shape[-1]))
    return Draft(ids, probs, lengths)
