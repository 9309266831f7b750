"""Suffix decoding: propose what followed the end of the text most often, in this text and in earlier answers.

Oliaro and others, SuffixDecoding (2024, arXiv 2411.04975). It pays where texts repeat themselves or each other: agents,
edits, JSON, answers to similar questions.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult
from specdec.drafters.suffix_tree import NOTHING, Proposal, SuffixTree, Text

MAX_IDS = 100_000  # of finished answers
BYTES_PER_ID = 500  # at most; some 200 with the CPU kernels


class FinishedTexts:
    """The last finished answers of a model, as a tree that calls at the same time share.

    The oldest are dropped where there are more than max_ids ids.
    """

    def __init__(self, depth: int, max_ids: int) -> None:
        self.depth, self.max_ids, self.num_ids = depth, max_ids, 0
        self._texts: deque[list[int]] = deque()
        self._tree: SuffixTree | None = None
        self._kernel_tree: Tensor | None = None
        self._lock = threading.Lock()

    def add(self, ids: list[int]) -> None:
        """Add an answer, or its last max_ids ids."""
        ids = ids[max(0, len(ids) - self.max_ids) :]
        if not ids:
            return
        with self._lock:
            self._texts.append(ids)
            self.num_ids += len(ids)
            removed = []
            while self.num_ids > self.max_ids:
                removed.append(self._texts.popleft())
                self.num_ids -= len(removed[-1])
            if self._tree is not None:
                _append(self._tree, ids)
                for oldest in removed:
                    self._tree.remove(oldest)
            if self._kernel_tree is not None:
                torch.ops.specdec.suffix_add(self._kernel_tree, torch.tensor(ids), len(removed))

    def propose(self, context: Sequence[int], max_ids: int, factor: float, min_probability: float) -> Proposal:
        with self._lock:
            if self._tree is None:
                self._tree = SuffixTree(self.depth)
                for ids in self._texts:
                    _append(self._tree, ids)
            return self._tree.propose(context, max_ids, factor, min_probability)

    @property
    def kernel_tree(self) -> Tensor:
        """The same tree for the CPU kernels, with a lock of its own."""
        with self._lock:
            if self._kernel_tree is None:
                self._kernel_tree = torch.ops.specdec.suffix_texts(torch.empty(0), self.depth)
                for ids in self._texts:
                    torch.ops.specdec.suffix_add(self._kernel_tree, torch.tensor(ids), 0)
            return self._kernel_tree


def _append(tree: SuffixTree, ids: list[int]) -> None:
    text = Text()
    for token in ids:
        tree.append(text, token)


@dataclass
class Row:
    """What is known of a row's text, in a tree of its own."""

    tree: SuffixTree
    text: Text = field(default_factory=Text)


class SuffixDecoding:
    """Proposes the most frequent continuation of the ids that end a row's text.

    depth: ids of the longest match, and of the continuation, together. factor: ids that are proposed at most for each
    id of the match. min_probability: a proposal ends where the counts give its ids less. max_ids: of finished answers
    that are kept, at about BYTES_PER_ID each; 0: none.

    Since what is proposed depends on earlier answers, the same seed may give another sampled text in a later call, from
    the same distribution. Where ids are on a GPU, each step waits for them. A copy has the settings, and no answers.
    """

    remembers_calls = True  # so the same seed may give another text

    def __init__(
        self, depth: int = 24, factor: float = 1.0, min_probability: float = 0.1, max_ids: int = MAX_IDS
    ) -> None:
        if depth < 2 or factor <= 0 or not 0 <= min_probability <= 1 or max_ids < 0:
            raise ValueError(
                f"depth={depth} must be 2 or more, factor={factor} positive, min_probability={min_probability} between"
                f" 0 and 1, and max_ids={max_ids} 0 or more"
            )
        self.depth, self.factor, self.min_probability = depth, factor, min_probability
        self.finished_texts = FinishedTexts(depth, max_ids)

    def __reduce__(self) -> Any:
        return type(self), (self.depth, self.factor, self.min_probability, self.finished_texts.max_ids)

    def spare(self) -> SuffixDecoding:
        """Another one with the same settings and finished answers, for a call at the same time."""
        other = SuffixDecoding(self.depth, self.factor, self.min_probability, self.finished_texts.max_ids)
        other.finished_texts = self.finished_texts
        return other

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.sequences = sequences
        self.is_finished = [False] * sequences.batch_size
        self.rows: list[Row] = []
        self.kernel_rows: Tensor | None = None
        if sequences.has_kernels:
            self.kernel_rows = torch.ops.specdec.suffix_rows(sequences.ids, sequences.batch_size, self.depth)
        else:
            self.rows = [Row(SuffixTree(self.depth)) for _ in self.is_finished]

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return self.propose_with_scores(sequences, limit)[0]

    def propose_with_scores(self, sequences: Sequences, limit: Tensor) -> tuple[Draft, list[float]]:
        """-> the draft, and of each row how many of its ids are accepted if the counts are right."""
        if sequences.num_requested == 0:
            return sequences.no_draft, [0.0] * sequences.batch_size
        if self.kernel_rows is not None:
            ids, lengths, scores = torch.ops.specdec.suffix_propose(
                self.kernel_rows, self.finished_texts.kernel_tree, sequences.ids, sequences.lengths, limit,
                self.factor, self.min_probability,
            )  # fmt: skip
            return Draft(ids, None, lengths), scores.tolist()
        limits = limit.tolist()
        self._read(sequences.lengths.tolist(), limits)
        found = [self._propose(row, count) if count else NOTHING for row, count in zip(self.rows, limits, strict=True)]
        num_ids = [len(proposal.ids) for proposal in found]
        padded = [proposal.ids + [0] * (max(num_ids) - count) for proposal, count in zip(found, num_ids, strict=True)]
        ids = torch.tensor(padded, dtype=torch.int64, device=limit.device).reshape(len(found), max(num_ids))
        draft = Draft(ids, None, torch.tensor(num_ids, device=limit.device))
        return draft, [proposal.score for proposal in found]

    def observe(self, result: StepResult) -> None:
        """Keep the answers of rows that the step has finished, and free their trees."""
        before, self.is_finished = self.is_finished, self.sequences.finished.tolist()
        if self.is_finished == before:
            return
        for row, answer in enumerate(self.sequences.answers()):
            if self.is_finished[row] and not before[row]:
                self.finished_texts.add(answer)
                if self.kernel_rows is not None:
                    torch.ops.specdec.suffix_release(self.kernel_rows, row)
                else:
                    self.rows[row] = Row(SuffixTree(self.depth))

    def _read(self, lengths: list[int], limits: list[int]) -> None:
        """Append what is new in the rows that draft to their texts."""
        rows = [row for row, limit in enumerate(limits) if limit]
        first = min((len(self.rows[row].text.ids) for row in rows), default=0)
        new_ids = self.sequences.ids[:, first : max(lengths)].tolist()
        for row in rows:
            tree, text = self.rows[row].tree, self.rows[row].text
            for token in new_ids[row][len(text.ids) - first : lengths[row] - first]:
                tree.append(text, token)

    def _propose(self, row: Row, max_ids: int) -> Proposal:
        """The better one of what this text and the finished ones propose; this text's where they are as good."""
        own = row.tree.propose_for(row.text, max_ids, self.factor, self.min_probability)
        context = row.text.ids[-self.depth :]
        others = self.finished_texts.propose(context, max_ids, self.factor, self.min_probability)
        return own if own.score >= others.score else others
