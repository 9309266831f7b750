"""A draft model of another tokenizer than the target's: it reads the text in its own encoding and drafts shared tokens.

Timor and others, Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
Vocabularies (2025, arXiv 2502.05202), token-level intersection: the draft model's logits are cut to the tokens that
both vocabularies have. Drafts are then ids of the target's with their own q, so rejection sampling stays lossless.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from specdec.drafters.model import ModelDrafter
from specdec.drafters.shared_vocabulary import DraftText, SharedVocabulary
from specdec.runtime.runner import ModelRunner


@dataclass
class Row:
    """What the draft model reads of a row, and what it has read.

    num_read: committed ids that are part of the text. fed: the draft model's ids whose KV entries are in its cache.
    """

    text: DraftText
    num_read: int = 0
    fed: list[int] = field(default_factory=list)

    def append(self, ids: list[int]) -> None:
        """Append committed ids of the target to the text, and leave in `fed` what is still a prefix of it."""
        at = min(self.text.num_final, len(self.fed))
        self.text.append(ids)
        self.num_read += len(ids)
        while at < min(len(self.fed), len(self.text.ids)) and self.fed[at] == self.text.ids[at]:
            at += 1
        del self.fed[at:]


class OtherTokenizerDrafter(ModelDrafter):
    """Drafts with a causal language model of another tokenizer.

    Each row's text is encoded again by the draft model's tokenizer as it grows. After a step the new encoding shares a
    prefix with the ids whose KV entries are in the cache, and the draft model feeds the others. Positions, slots and
    the context are those of its own encoding. A row whose text ends within a character proposes nothing.

    The host reads the committed ids of each step, so it waits for the device.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, shared: SharedVocabulary) -> None:
        super().__init__(model, vocab_size)
        self.shared: SharedVocabulary = shared
        self.num_text_ids = shared.num_draft_ids

    def match_target(self, target: ModelRunner) -> None:
        self.vocab_size = target.vocab_size

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.sampling = sampling
        self.has_begun = False
        self.rows = [Row(DraftText(self.shared)) for _ in range(sequences.batch_size)]
        self.texts = sequences.ids.new_zeros(sequences.batch_size, 0)  # [B, L], the draft model's ids of each row
        self.last_draft: tuple[Tensor, list[int]] | None = None  # ids in the draft model's vocabulary, and limits

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        if sequences.num_requested == 0:
            return sequences.no_draft
        self._note_fed_drafts()
        self._read(sequences)
        context = self.runner.context
        lengths = [len(row.text.ids) for row in self.rows]
        limits = [
            count if length and row.text.is_complete else 0
            for row, length, count in zip(self.rows, lengths, limit.tolist(), strict=True)
        ]
        if context is not None:
            limits = [max(min(count, context - length), 0) for count, length in zip(limits, lengths, strict=True)]
            lengths = [min(length, context) for length in lengths]
        num_ids = max(limits)
        if num_ids == 0:
            return sequences.no_draft
        if not self.has_begun:
            self._begin_runner(sequences.batch_size)
        self.runner.reserve(max(map(sum, zip(lengths, limits, strict=True))))
        width = max(1, *(length - len(row.fed) for row, length in zip(self.rows, lengths, strict=True)))
        last = limit.new_tensor([max(length - 1, 0) for length in lengths])
        self._write_texts(last, lengths, width)
        for row, length in zip(self.rows, lengths, strict=True):
            row.fed += row.text.ids[len(row.fed) : length]
        draft = Draft(*self._draft_behind(sequences, self.texts, last, width, num_ids, limit.new_tensor(limits)))
        self.last_draft = self._to_draft_ids(draft.ids), limits
        return draft

    def observe(self, result: StepResult) -> None:
        pass

    def _begin_runner(self, batch_size: int) -> None:
        """Begin the runner, and find the draft model's id of each id of the target, as both models are now."""
        self.runner.begin(batch_size, self.runner.context)
        self.has_begun = True
        missing = self.vocab_size - len(self.shared.draft_ids)
        ids = F.pad(self.shared.draft_ids, (0, missing), value=-1).to(self.texts.device)
        self.is_shared = (ids >= 0) & (ids < min(self.runner.vocab_size, self.runner.num_embeddings))  # [V] bool
        self.draft_ids = ids.where(self.is_shared, 0)  # [V] int64

    def _note_fed_drafts(self) -> None:
        """Add the drafted ids that the last step fed: all but the last one of each row."""
        if self.last_draft is None:
            return
        ids, limits = self.last_draft
        for row, drafted, count in zip(self.rows, ids.tolist(), limits, strict=True):
            row.fed += drafted[: max(count - 1, 0)]
        self.last_draft = None

    def _read(self, sequences: Sequences) -> None:
        """Append new committed ids to the texts."""
        lengths = sequences.lengths.tolist()
        first = min(row.num_read for row in self.rows)
        new_ids = sequences.ids[:, first : max(lengths)].tolist()
        for row, ids, length in zip(self.rows, new_ids, lengths, strict=True):
            row.append(ids[row.num_read - first : length - first])

    def _write_texts(self, last: Tensor, lengths: list[int], width: int) -> None:
        """Write the `width` ids of each row that end at last [B]; a row with fewer repeats its first."""
        columns = max(lengths) - self.texts.shape[1]
        if columns > 0:
            self.texts = F.pad(self.texts, (0, max(columns, self.texts.shape[1])))
        ids = []
        for row, length in zip(self.rows, lengths, strict=True):
            new = row.text.ids[max(length - width, 0) : length] or [0]
            ids.append(new[:1] * (width - len(new)) + new)
        positions = (last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=0)
        self.texts.scatter_(1, positions, self.texts.new_tensor(ids))

    def _to_draft_ids(self, ids: Tensor) -> Tensor:
        return self.draft_ids[ids]

    def _to_target_logits(self, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self.draft_ids).masked_fill(~self.is_shared, -torch.inf)

    @property
    def _lacks_ids(self) -> bool:
        return True
