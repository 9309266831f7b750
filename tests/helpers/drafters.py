"""Drafters for tests: always right, always wrong, random, uneven, empty. All keep to the protocol."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from tests.helpers.families import VOCAB_SIZE


class AlwaysRight:
    """Proposes the model's own greedy continuation, without processors, from forwards of each row without a cache."""

    def __init__(self, model: PreTrainedModel, vocab_size: int = VOCAB_SIZE) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.greedy_ids: dict[tuple[int, ...], int] = {}  # by text: batches have thousands of equal rows

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        ids = limit.new_zeros(len(limit), int(limit.max()))
        for row, count in enumerate(limit.tolist()):
            text = sequences.ids[row, : sequences.lengths[row]].tolist()
            for index in range(count):
                text.append(self.choose(text))
                ids[row, index] = text[-1]
        return Draft(ids, None, limit)

    def observe(self, result: StepResult) -> None:
        pass

    def choose(self, text: list[int]) -> int:
        return self.greedy(text)

    @torch.no_grad()
    def greedy(self, text: list[int]) -> int:
        key = tuple(text)
        if key not in self.greedy_ids:
            ids = torch.tensor([text], device=self.model.device)
            self.greedy_ids[key] = int(self.model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        return self.greedy_ids[key]


class AlwaysWrong(AlwaysRight):
    """Proposes ids other than the model's greedy choice."""

    def choose(self, text: list[int]) -> int:
        return (self.greedy(text) + 1) % self.vocab_size


class Random:
    """Proposes uniform ids, with their probabilities where the call samples."""

    def __init__(self, seed: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.seed = seed
        self.vocab_size = vocab_size

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.do_sample = sampling.do_sample

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        shape = len(limit), int(limit.max())
        ids = torch.randint(self.vocab_size, shape, generator=self.generator).to(limit.device)
        probs = (
            torch.full((*shape, self.vocab_size), 1 / self.vocab_size, device=limit.device) if self.do_sample else None
        )
        return Draft(ids, probs, self.lengths(limit))

    def observe(self, result: StepResult) -> None:
        pass

    def lengths(self, limit: Tensor) -> Tensor:
        return limit


class Uneven(Random):
    """As Random, but each row drafts a random number of ids, from 0 to its limit."""

    def lengths(self, limit: Tensor) -> Tensor:
        share = torch.rand(len(limit), generator=self.generator, dtype=torch.float64).to(limit.device)
        return (share * (limit + 1)).long()


class Empty:
    """Proposes no ids, in a draft that is `width` columns wide; at most the call's num_draft_tokens."""

    def __init__(self, width: int = 2) -> None:
        self.width = width

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return Draft(limit.new_zeros(len(limit), self.width), None, torch.zeros_like(limit))

    def observe(self, result: StepResult) -> None:
        pass
