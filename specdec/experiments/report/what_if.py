"""What the texts of a run predict for another K: mean acceptance length and speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specdec.core.timing import StepTimes
from specdec.draft_length.speedup import replay, speedup
from specdec.experiments.records import SPECULATIVE, Costs, Record, Run, group_by_prompt
from specdec.experiments.report.estimates import NO_ESTIMATE, Array, Estimate, ratio, resample_sums, with_bootstrap


@dataclass(frozen=True)
class Prediction:
    """What another K is expected to give, from this run's texts and step times; no speed where costs were not measured.

    mean_acceptance_length: expected ids of a step that drafts. step_ms: milliseconds of such a step.
    speedup: of whole calls, with prefill as fast as in this run; its interval covers the texts, not the measured times.
    to_best: this speedup / that of the K with the highest one, on the same resampled prompts.
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
    tokens = np.array([sum(len(record.ids) for record in group) for group in groups])
    prefill_s = sum(record.seconds.prefill_s / record.rows for record in records) / tokens.sum()
    step_s = _step_seconds(run.costs)
    bonus_acceptance = _acceptance_at_last_position(records)
    max_new_tokens = run.header.config["sampling"].get("max_new_tokens")
    max_drafted = max((step.drafted for record in records for step in record.steps), default=0)

    predictions, resampled_speedups = [], []
    for k in range(1, max_drafted + 1):
        step_counts = [_replayed_step_counts(group, k, bonus_acceptance, max_new_tokens) for group in groups]
        sums = np.column_stack([tokens, step_counts])
        prediction = Prediction(k, ratio(sums[:, 0] - sums[:, 2], sums[:, 1]))  # a step without a draft emits one id
        resampled = np.array([])
        if k < len(step_s):
            resampled = _speedups(k, resample_sums(sums), step_s, prefill_s)
            estimate = with_bootstrap(_speedups(k, sums.sum(0), step_s, prefill_s), resampled)
            prediction = replace(prediction, step_ms=1000 * step_s[k], speedup=estimate)
        predictions.append(prediction)
        resampled_speedups.append(resampled)
    return _with_ratio_to_best(predictions, resampled_speedups)


def best_prediction(predictions: Sequence[Prediction]) -> Prediction | None:
    """The one with the highest speedup; None where no speedup is predicted."""
    timed = [prediction for prediction in predictions if prediction.speedup.value]
    return max(timed, key=lambda prediction: prediction.speedup.value or 0, default=None)


def _step_seconds(costs: Costs | None) -> list[float]:
    """Seconds of a row's step, by K; [] where they were not measured."""
    if costs is None:
        return []
    rest_s = [verification + other for verification, other in zip(costs.verification_s, costs.other_s, strict=True)]
    parts = ([seconds / costs.rows for seconds in part] for part in (costs.draft_s, costs.target_s, rest_s))
    return StepTimes(*parts).step_s


def _acceptance_at_last_position(records: Sequence[Record]) -> float:
    """Mean overlap at the last position of drafts of full length, which stands in for the position after them."""
    last = [step.overlap[-1] for record in records for step in record.steps if len(step.overlap) == step.requested > 0]
    return sum(last) / len(last) if last else 0.0


def _replayed_step_counts(records: Sequence[Record], k: int, bonus_acceptance: float, max_new_tokens: int) -> Any:
    """Expected steps with and without a draft at this K, summed over one prompt's texts: [2]."""
    texts = [replay(record.steps, k, bonus_acceptance, stopped=len(record.ids) != max_new_tokens) for record in records]
    return np.sum(texts, axis=0)


def _speedups(k: int, sums: Array, step_s: Sequence[float], prefill_s: float) -> Any:
    """At this K, from sums [..., 3] of tokens, steps that draft and steps that do not."""
    tokens, spec_steps, plain_steps = np.moveaxis(sums, -1, 0)
    return speedup(k, tokens, spec_steps, plain_steps, step_s, prefill_s)


def _with_ratio_to_best(predictions: list[Prediction], resampled_speedups: Sequence[Array]) -> list[Prediction]:
    """The predictions with to_best where there is a speedup."""
    best = best_prediction(predictions)
    if best is None:
        return predictions
    best_resampled = resampled_speedups[predictions.index(best)]
    result = []
    for prediction, resampled in zip(predictions, resampled_speedups, strict=True):
        if prediction.speedup.value:
            to_best = (prediction.speedup.value or 0) / (best.speedup.value or 1)
            prediction = replace(prediction, to_best=with_bootstrap(to_best, resampled / best_resampled))
        result.append(prediction)
    return result
