"""A draft model, with a KV cache of its own."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.core.sampling import Sampling, draw, greedy_ids, uniforms
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from specdec.drafters.shared_vocabulary import SharedVocabulary
from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.runtime.executors import DraftInputs
from specdec.runtime.runner import ModelRunner

MIN_CATCH_UP = 2  # committed ids that a step feeds at least: after full acceptance the last draft id was never fed


class ModelDrafter:
    """Drafts with a causal language model that shares the target's tokenizer.

    vocab_size: V, the width of the target's logits; the draft model's logits are cut to it, or padded with -inf.
    num_text_ids: the number of different ids that a text may hold.
    num_catch_up: the number of last committed ids of each row that a step feeds before it drafts, so that the KV cache
    is right up to the draft. After a step that drafted these are num_after_draft, after any other one more than before.
    shared: what two tokenizers have in common, where the draft model has one of its own; see OtherTokenizerDrafter.
    feature_layers: the hidden states of the target that it reads, see ModelForward. num_extra_slots: positions that a
    step may feed behind those that it drafts.
    """

    shared: SharedVocabulary | None = None
    feature_layers: tuple[int, ...] = ()
    num_extra_slots = 0

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.runner = ModelRunner(model)
        self.vocab_size = self.num_text_ids = vocab_size

    def match_target(self, target: ModelRunner) -> None:
        """Take the target of the call that begins, whose head and embeddings may have changed."""
        self.vocab_size, self.num_text_ids = target.vocab_size, max(target.vocab_size, target.num_embeddings)

    def spare(self) -> Self:
        """Another drafter of the same model, with a cache of its own, for a call at the same time."""
        spare = copy(self)
        spare.runner = self.runner.spare()
        return spare

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.sampling = sampling
        self.has_begun = False  # the runner begins with the first draft: a call may draft nothing
        self.num_catch_up, self.num_after_draft = max(sequences.longest, MIN_CATCH_UP), 0

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        context = self.runner.context
        num_ids = sequences.num_requested
        if context is not None:
            num_ids = min(num_ids, context - sequences.shortest)
        if num_ids <= 0:
            return sequences.no_draft
        if not self.has_begun:
            self.runner.begin(sequences.batch_size, sequences.length_limit + self.num_extra_slots)
            self.has_begun = True
        self.runner.reserve(sequences.longest + self.num_extra_slots)
        width, is_usual = self.num_catch_up, self.num_catch_up == self.num_after_draft
        self.num_catch_up = self.num_after_draft = self._catch_up_after(num_ids)
        draft = partial(self._draft, sequences, width, num_ids)
        if not is_usual or self.sampling.needs_prefix:
            return Draft(*draft(limit))
        return Draft(*self.runner.run((self, width, num_ids, self.sampling.cache_key), draft, limit))

    def observe(self, result: StepResult) -> None:
        if result.draft.ids.shape[1] == 0:
            self.num_catch_up += 1

    def num_kept(self, drafted: int, accepted: int) -> int:
        """How many accepted draft ids of a step the KV cache covers: the last draft id was never fed."""
        return min(accepted, drafted - 1)

    def _catch_up_after(self, num_ids: int) -> int:
        """How many committed ids are fed after a step that drafted num_ids."""
        return MIN_CATCH_UP

    def _read_text(self, sequences: Sequences, width: int, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> the text that is fed, [B, L]; its last position in each row [B], of which `width` are fed; the limit."""
        return sequences.ids, sequences.lengths - 1, limit

    def _draft(
        self, sequences: Sequences, width: int, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Feed the last `width` committed ids, then draft num_ids: -> ids, probs and lengths of a Draft."""
        text, last, limit = self._read_text(sequences, width, limit)
        if self.runner.context is not None:
            limit = torch.minimum(limit, (self.runner.context - 1 - last).clamp(min=0))
            last = last.clamp(max=self.runner.context - 1)
        compiled = self.runner.compiled
        is_plain = not self.sampling.processors and self.runner.vocab_size >= self.vocab_size
        if compiled is not None and is_plain and width <= MAX_WINDOW:
            draws = uniforms(num_ids, len(last), 1, device=limit.device) if self.sampling.do_sample else None
            inputs = DraftInputs(text, last, limit, width, num_ids, self.runner.num_embeddings, self.vocab_size, draws)
            return *compiled.draft(inputs, sequences.longest, self.runner.cache), limit
        return self._draft_behind(sequences, text, last, width, num_ids, limit)

    def _draft_behind(
        self, sequences: Sequences, text: Tensor, last: Tensor, width: int, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Feed the `width` ids of the draft model's text [B, L] that end at last [B], then draft num_ids.

        -> ids, probs and lengths of a Draft.
        """
        output = self.runner.feed(self._within_vocabulary(text), last, width)
        assert output is not None  # width is at least 1
        logits = output.logits

        # a row that drafts fewer ids repeats its last one: the same entry in the same slot
        last_ids = text.gather(1, last[:, None])
        steps = torch.arange(num_ids, device=limit.device)
        is_drafted = steps < limit[:, None]
        positions = last[:, None] + steps * is_drafted
        ids: list[Tensor] = []
        probs: list[Tensor] = []
        for index in range(num_ids):
            if index:
                at = slice(index, index + 1)
                next_ids = torch.where(is_drafted[:, at], self._to_draft_ids(ids[-1]), last_ids)
                next_ids = self._within_vocabulary(next_ids)
                logits = self.runner.forward(next_ids, positions[:, at]).logits
            limit = self._choose_next(logits, sequences, index, limit, ids, probs)
        return torch.cat(ids, dim=1), torch.cat(probs, dim=1) if probs else None, limit

    def _choose_next(
        self, logits: Tensor, sequences: Sequences, index: int, limit: Tensor, ids: list[Tensor], probs: list[Tensor]
    ) -> Tensor:
        """Append the ids of column `index`, and the distribution they were drawn from: -> the limits after it."""
        next_ids, next_probs = self._choose(logits, sequences, index, limit)
        ids.append(next_ids)
        if next_probs is not None:
            probs.append(next_probs)
        if not self.sampling.needs_prefix:
            return limit
        sequences.stage(next_ids, skip=index)  # processors read the text so far, and are not called after a stop id
        return torch.where(sequences.stops_at(next_ids[:, 0]), limit.clamp(max=index + 1), limit)

    def _within_vocabulary(self, ids: Tensor) -> Tensor:
        """Replace ids that a smaller draft vocabulary lacks by its last one: worse drafts, the same text."""
        num_embeddings = self.runner.num_embeddings
        return ids if num_embeddings >= self.num_text_ids else ids.clamp(max=num_embeddings - 1)

    def _to_draft_ids(self, ids: Tensor) -> Tensor:
        """The draft model's ids for drafted ids of the target, of any shape."""
        return ids

    def _to_target_logits(self, logits: Tensor) -> Tensor:
        """The draft model's logits [B, 1, Vd] over the target's vocabulary, [B, 1, V]; -inf where it has no such id."""
        missing = self.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits  # a negative width cuts

    @property
    def _lacks_ids(self) -> bool:
        """Whether the target has ids that can't be drafted."""
        return self.runner.vocab_size < self.vocab_size

    def _choose(self, logits: Tensor, sequences: Sequences, index: int, limit: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next id of each row [B, 1] and the distribution it was drawn from [B, 1, V], None in greedy calls."""
        used = (limit - index).clamp(0, 1) if self.sampling.needs_prefix else None
        scores = self.sampling.scores(self._to_target_logits(logits), sequences, skip=index, used=used)
        if self._lacks_ids:  # where the processors exclude all of a smaller vocabulary, any id is as good a draft
            scores = scores.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
        if not self.sampling.do_sample:
            return greedy_ids(scores), None
        probs = self.sampling.probs(scores)
        return draw(probs, uniforms(*probs.shape[:2], device=probs.device)), probs
