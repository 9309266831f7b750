"""Prompt lookup: propose the ids that followed the last earlier occurrence of the n-gram that ends the text.

Saxena, Prompt Lookup Decoding (2023). It is fast where the output repeats the input: summaries, edits, code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult


class PromptLookup:
    """Matches the longest n-gram, of at most max_ngram ids, that ends each row; the most recent one of equal length."""

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram={max_ngram} must be at least 1")
        self.max_ngram = max_ngram

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        num_ids = sequences.num_requested
        if num_ids == 0:
            return sequences.no_draft
        ids = sequences.ids
        if sequences.has_kernels:
            found_ids, num_found = torch.ops.specdec.prompt_lookup(
                ids, sequences.lengths, limit, self.max_ngram, num_ids
            )
            return Draft(found_ids, None, num_found)
        lengths = sequences.lengths[:, None]
        width = sequences.longest
        columns = torch.arange(width, device=ids.device)

        # matched[b, c]: the number of ids up to and including column c that equal the ids at the end of row b
        matched = torch.zeros(len(ids), width, dtype=torch.int64, device=ids.device)
        running = columns < lengths - 1
        for back in range(self.max_ngram):
            last = ids.gather(1, (lengths - 1 - back).clamp(min=0))
            shifted = torch.roll(ids[:, :width], back, dims=1)
            running = running & (shifted == last) & (columns >= back)
            matched += running
        best = (matched * width + columns).argmax(1, keepdim=True)
        found = matched.gather(1, best) > 0

        following = (best + 1 + torch.arange(num_ids, device=ids.device)).clamp(max=ids.shape[1] - 1)
        num_following = torch.where(found, lengths - 1 - best, 0)[:, 0]
        return Draft(ids.gather(1, following), None, torch.minimum(limit, num_following))

    def observe(self, result: StepResult) -> None:
        pass
