"""What the texts of a run predict for another K: mean acceptance length and speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from specdec.draft_length.speedup import replay, speedup
from specdec.experiments.records import SPECULATIVE, Costs, Record, Run, group_by_prompt
from specdec.experiments.report.estimates import (
    MIN_UNITS,
    NO_ESTIMATE,
    Array,
    Estimate,
    combined_degrees_of_freedom,
    finite,
    ratio,
    resample_sums,
    resample_trimmed_means,
    trimmed_mean,
    with_bootstrap,
)


@dataclass(frozen=True)
class Prediction:
    """What another K is expected to give, from this run's texts and step times; no speed where costs were not measured.

    mean_acceptance_length: expected ids of a step that drafts. step_ms: milliseconds of such a step.
    speedup: of whole calls, with prefill as fast as in this run. Its interval covers the texts and the measured times,
    and is None where either are too few; prompts: as in Estimate.
    to_best: this speedup / that of the K with the highest one, on the same resampled prompts and times.
    """

    num_draft_tokens: int
    mean_acceptance_length: Estimate
    step_ms: float | None = None
    speedup: Estimate = NO_ESTIMATE
    to_best: Estimate = NO_ESTIMATE


@dataclass(frozen=True)
class Measurement:
    """A run with a constant K, to compare with the prediction for that K."""

    num_draft_tokens: int
    mean_acceptance_length: Estimate
    speedup: Estimate
    is_own: bool


def predict_other_k(run: Run) -> list[Prediction]:
    """A prediction for each K from 1 to the most ids that a step of the run drafted."""
    records = run.of(SPECULATIVE)
    if not records:
        return []
    groups = group_by_prompt(records)
    tokens = [sum(len(record.ids) for record in group) for group in groups]
    prefill_s = [sum(record.seconds.prefill_s / record.rows for record in group) for group in groups]
    times = np.empty((0, 0)) if run.costs is None else step_parts(run.costs).sum(axis=0)
    bonus_acceptance = _acceptance_at_last_position(records)
    max_new_tokens = run.header.config["sampling"].get("max_new_tokens")
    max_drafted = max((step.drafted for record in records for step in record.steps), default=0)

    predictions, draws = [], {}
    for k in range(1, max_drafted + 1):
        step_counts = [_replayed_step_counts(group, k, bonus_acceptance, max_new_tokens) for group in groups]
        sums = np.column_stack([tokens, step_counts, prefill_s])
        prediction = Prediction(k, ratio(sums[:, 0] - sums[:, 2], sums[:, 1]))  # a step without a draft emits one id
        if k < times.shape[1]:
            draws[k] = _speedups(sums, times[:, [0, k]])
            step_ms, estimate = 1000 * float(trimmed_mean(times)[k]), draws[k].estimate(len(groups), len(times))
            prediction = replace(prediction, step_ms=step_ms, speedup=estimate)
        predictions.append(prediction)
    return _with_ratio_to_best(predictions, draws, len(times))


def best_prediction(predictions: Sequence[Prediction]) -> Prediction | None:
    """The one with the highest speedup; None where no speedup is predicted."""
    timed = [prediction for prediction in predictions if prediction.speedup.value]
    return max(timed, key=lambda prediction: prediction.speedup.value or 0, default=None)


def step_parts(costs: Costs) -> Array:
    """Seconds of a row's step: drafting, the target's forward, the rest: [3, repetitions, K + 1]."""
    draft_s, target_s, verification_s, other_s = (
        np.array(part).T / costs.rows for part in (costs.draft_s, costs.target_s, costs.verification_s, costs.other_s)
    )
    return np.stack([draft_s, target_s, verification_s + other_s])


def steps_that_get_faster(costs: Costs) -> list[tuple[int, bool]]:
    """Each K whose step is faster than that of K - 1, and whether its repetitions show that it is.

    A step with another draft token does more work, so its time should not fall. Where the difference is not clear, it
    is noise of the measurement; where it is clear, a kernel may be faster at that width.
    """
    step_s = step_parts(costs).sum(axis=0)
    resampled, found = resample_trimmed_means(step_s), []
    for k, change in enumerate(np.diff(trimmed_mean(step_s)), 1):
        if change < 0:
            high = with_bootstrap(change, resampled[:, k] - resampled[:, k - 1], costs.repetitions).high
            found.append((k, high is not None and high < 0))
    return found


def _acceptance_at_last_position(records: Sequence[Record]) -> float:
    """Mean overlap at the last position of drafts of full length, which stands in for the position after them."""
    last = [step.overlap[-1] for record in records for step in record.steps if len(step.overlap) == step.requested > 0]
    return sum(last) / len(last) if last else 0.0


def _replayed_step_counts(records: Sequence[Record], k: int, bonus_acceptance: float, max_new_tokens: int) -> Any:
    """Expected steps with and without a draft at this K, summed over one prompt's texts: [2]."""
    texts = [replay(record.steps, k, bonus_acceptance, stopped=len(record.ids) != max_new_tokens) for record in records]
    return np.sum(texts, axis=0)


class _Draws(NamedTuple):
    """A value, and its values [NUM_RESAMPLES] for resampled texts and times, for texts alone, and for times alone."""

    value: Any
    both: Any
    of_texts: Any
    of_times: Any

    def estimate(self, prompts: int, repetitions: int) -> Estimate:
        if min(prompts, repetitions) < MIN_UNITS:
            return Estimate(finite(self.value), prompts=prompts)
        variances = [float(self.of_texts.var()), float(self.of_times.var())]
        degrees_of_freedom = combined_degrees_of_freedom(variances, [prompts - 1, repetitions - 1])
        return with_bootstrap(self.value, self.both, prompts, degrees_of_freedom)


def _speedups(sums: Array, times: Array) -> _Draws:
    """Of one K. sums: [prompts, 4] tokens, steps that draft, steps that do not, seconds of prefill.

    times: [repetitions, 2] seconds of a plain step and of one that drafts.
    """

    def of(sums: Array, step_s: Array) -> Any:
        tokens, spec_steps, plain_steps, prefill_s = np.moveaxis(sums, -1, 0)
        plain_and_draft_s: Any = np.moveaxis(step_s, -1, 0)
        return speedup(1, tokens, spec_steps, plain_steps, plain_and_draft_s, prefill_s / tokens)

    total, step_s = sums.sum(0), trimmed_mean(times)
    texts, resampled_s = resample_sums(sums), resample_trimmed_means(times)
    return _Draws(of(total, step_s), of(texts, resampled_s[: len(texts)]), of(texts, step_s), of(total, resampled_s))


def _with_ratio_to_best(predictions: list[Prediction], draws: dict[int, _Draws], repetitions: int) -> list[Prediction]:
    """The predictions with to_best where there is a speedup. draws: of their speedups, by K."""
    best = best_prediction(predictions)
    if best is None:
        return predictions
    result = []
    for prediction in predictions:
        if own := draws.get(prediction.num_draft_tokens):
            parts = zip(own, draws[best.num_draft_tokens], strict=True)
            to_best = _Draws(*(part / of_best for part, of_best in parts))
            prediction = replace(prediction, to_best=to_best.estimate(prediction.speedup.prompts, repetitions))
        result.append(prediction)
    return result
