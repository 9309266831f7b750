"""Several greedy steps without drafts in one call of a target that can: what `speculative.step` does with K = 0."""

from __future__ import annotations

from specdec.core.interfaces import Drafter, Target
from specdec.core.sequences import Sequences
from specdec.core.steps import StepResult, Verdict


def plain_steps(target: Target, drafter: Drafter, sequences: Sequences, num_steps: int) -> list[StepResult]:
    """Commit num_steps ids to each row, or fewer where all rows finish before: -> the result of each step."""
    no_draft = sequences.no_draft
    sequences.begin_step(0, num_steps)
    target.reserve(sequences.longest)
    results = [
        StepResult(type(drafter).__name__, no_draft, Verdict(no_draft.lengths, next_ids), logits, logits, host_summary)
        for next_ids, host_summary, logits in target.run_plain_steps(sequences, num_steps)
    ]
    for result in results:
        drafter.observe(result)
    return results
