"""Differences between two runs of the same prompts, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.experiments.records import Run
from specdec.experiments.report.estimates import Estimate, apply, count_prompts, finite, resample_sums, with_bootstrap
from specdec.experiments.report.figures import METRICS, tally


@dataclass(frozen=True)
class Difference:
    """Of a metric from one run to another: change is absolute, relative in per cent of the value before."""

    before: float | None
    after: float | None
    change: Estimate
    relative: Estimate

    @property
    def is_clear(self) -> bool:
        """The interval of the change excludes 0."""
        low, high = self.change.low, self.change.high
        return low is not None and high is not None and (low > 0 or high < 0)


def compare_runs(a: Run, b: Run) -> dict[str, Difference]:
    """Every metric's difference from a to b; raises ValueError as check_comparable() does."""
    check_comparable(a, b)
    tallies_a, tallies_b = tally(a), tally(b)
    rows_a = np.array(list(tallies_a.values()))
    rows_b = np.array([tallies_b[prompt_id] for prompt_id in tallies_a])
    resampled_a, resampled_b = resample_sums(rows_a), resample_sums(rows_b)
    differences = {}
    for name, metric in METRICS.items():
        of = metric.of_sums
        before, after = apply(of, rows_a.sum(0)), apply(of, rows_b.sum(0))
        draws_before, draws_after = apply(of, resampled_a), apply(of, resampled_b)
        prompts = min(count_prompts(of, rows_a), count_prompts(of, rows_b))
        with np.errstate(divide="ignore", invalid="ignore"):
            differences[name] = Difference(
                finite(before),
                finite(after),
                with_bootstrap(after - before, draws_after - draws_before, prompts),
                with_bootstrap(100 * (after / before - 1), 100 * (draws_after / draws_before - 1), prompts),
            )
    return differences


def check_comparable(a: Run, b: Run) -> None:
    """Raise ValueError where two runs differ in prompts, repetitions or the length limit."""

    def not_comparable(reason: str) -> ValueError:
        return ValueError(f"{a.folder} and {b.folder} cannot be compared: {reason}; run both on the same workload")

    hashes_a, hashes_b = _prompt_hashes(a), _prompt_hashes(b)
    if hashes_a.keys() != hashes_b.keys():
        in_one_only = sorted(hashes_a.keys() ^ hashes_b.keys())
        prompt_id, turn, repetition = in_one_only[0]
        raise not_comparable(
            f"they have {len(hashes_a)} and {len(hashes_b)} prompts and repetitions, and {len(in_one_only)} are in only"
            f" one of them, for example {prompt_id!r}, turn {turn}, repetition {repetition}"
        )
    for (prompt_id, turn, repetition), prompt_hash in hashes_a.items():
        # later turns contain the answers, which differ between sampled runs
        if turn == 0 and hashes_b[prompt_id, turn, repetition] != prompt_hash:
            raise not_comparable(f"the prompt {prompt_id!r} has different tokens in the second run")
    limits = [run.header.config["sampling"].get("max_new_tokens") for run in (a, b)]
    if limits[0] != limits[1]:
        raise not_comparable(f"max_new_tokens is {limits[0]} in the first run and {limits[1]} in the second")


MACHINE = {"device": "device", "cpu": "CPU", "cpu_flags": "CPU flags", "threads": "threads", "processes": "processes"}
VERSIONS = {
    "specdec": "specdec", "commit": "commit", "dirty": "uncommitted changes", "python": "Python", "torch": "torch",
    "transformers": "transformers", "triton": "Triton", "decoding": "decoding",
}  # fmt: skip


def differing_provenance(runs: Sequence[Run], names: dict[str, str]) -> dict[str, list[str]]:
    """By label, what each run recorded under the names in which they differ; "not recorded" for older runs.

    names: MACHINE or VERSIONS. What only one run recorded is not known to differ.
    """
    differing = {}
    for name, label in names.items():
        values = [run.header.provenance.get(name) for run in runs]
        if len({str(value) for value in values if value is not None}) > 1:
            differing[label] = ["not recorded" if value is None else str(value) for value in values]
    return differing


def _prompt_hashes(run: Run) -> dict[tuple[str, int, int], str]:
    return {(record.prompt_id, record.turn, record.repetition): record.prompt_hash for record in run.records}
