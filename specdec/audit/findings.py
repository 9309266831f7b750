"""What every audit finds: a verdict with its reasons, sampled ids against a law, calls that are wrong on purpose."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

import torch

from specdec.audit.evidence import Evidence, Key
from specdec.audit.statistics import Bettors, smallest_shift

LOSSLESS, ROUNDING, FAULTY, INCONCLUSIVE = "lossless", "lossless up to rounding", "not lossless", "inconclusive"
EXIT_CODES = {LOSSLESS: 0, ROUNDING: 0, FAULTY: 1, INCONCLUSIVE: 3}
COLORS = {0: "brightgreen", 1: "red", 3: "lightgrey"}  # of a badge, by exit code
MIN_TEXTS, MIN_DRAWS = 10, 1000  # of a verdict
SMALLER_VARIATIONS = (0.05, 0.02, 0.01, 0.005)
BINS = 20  # of the histogram of an indicator's means, for the power of a run


@dataclass(frozen=True)
class SamplingRow:
    """A group of positions, or a kind of sampled call: its ids, and the logarithm of the e-value of these alone."""

    what: str
    num_ids: int
    log_e: float


@dataclass(frozen=True)
class ControlRow:
    """What is wrong on purpose: whether a check found it, after how many ids. found: None: not applicable."""

    name: str
    what: str
    found: bool | None
    num_ids: int
    evidence: str


@dataclass(frozen=True)
class SampledIds:
    """Sampled ids against the law of plain decoding.

    groups: of positions, the first of all ids; calls: by kind of call. log_e, max_log_e: of all ids, at the end and the
        largest at any time. alpha: the rate of false alarms; the law is rejected where max_log_e >= log(1/alpha).
    shift: what kind of shift the power is stated for. smallest_variation: the smallest such shift, as a total
        variation, that these draws would have found with 95 %. draws_needed: for smaller ones.
    """

    groups: list[SamplingRow]
    calls: list[SamplingRow]
    log_e: float
    max_log_e: float
    alpha: float
    shift: str
    smallest_variation: float
    draws_needed: dict[float, int]

    @property
    def num_ids(self) -> int:
        return self.groups[0].num_ids

    @property
    def is_rejected(self) -> bool:
        return self.max_log_e >= math.log(1 / self.alpha)

    @property
    def summary(self) -> str:
        """What the e-process says, and what it would have found."""
        text = (
            f"The largest e-value is {e_value(self.max_log_e)}. The law is rejected from {1 / self.alpha:,.0f} on,"
            f" which happens to a lossless loop in at most {self.alpha:.2%} of runs."
        )
        if self.smallest_variation == 1:
            return f"{text} These draws do not suffice to find a shift {self.shift} with 95 %."
        return f"{text} A shift {self.shift} by {self.smallest_variation:.3f} would have been found with 95 %."


@dataclass(kw_only=True)
class Findings(ABC):
    """What an audit found.

    verdict: one of LOSSLESS, ROUNDING, FAULTY, INCONCLUSIVE. reasons: why it is not LOSSLESS. divergences: greedy texts
    that differ, with the measurements that explain them. seconds: of work.
    """

    verdict: str = INCONCLUSIVE
    reasons: list[str] = field(default_factory=list)
    divergences: list[dict[str, Any]]
    sampled: SampledIds
    controls: list[ControlRow]
    seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    @abstractmethod
    def num_texts(self) -> int:
        """Greedy texts that were compared."""

    @property
    @abstractmethod
    def num_identical(self) -> int:
        """Those among them that are plain decoding's."""

    @abstractmethod
    def greedy_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""

    def gaps(self, num_controls: int) -> list[str]:
        """What every verdict needs, and these findings lack."""
        gaps = []
        if self.num_texts < MIN_TEXTS:
            gaps.append(f"{self.num_texts} greedy texts were compared; a verdict takes {MIN_TEXTS}")
        if self.sampled.num_ids < MIN_DRAWS:
            gaps.append(f"{self.sampled.num_ids:,} ids were sampled; a verdict takes {MIN_DRAWS:,}")
        if missing := num_controls - len(self.controls):
            gaps.append(f"{missing} of {num_controls} deliberate mistakes were not tried; give the audit more time")
        return gaps + [f"not found: a loop that {row.what}" for row in self.controls if row.found is False]

    def conclude(self, faults: list[str], gaps: list[str]) -> None:
        """Set verdict and reasons."""
        if faults:
            self.verdict, self.reasons = FAULTY, faults
        elif gaps:
            self.verdict, self.reasons = INCONCLUSIVE, gaps
        elif count := len(self.divergences):
            self.verdict = ROUNDING
            self.reasons = [f"{count} of {self.num_texts} greedy texts differ where rounding decides"]
        else:
            self.verdict, self.reasons = LOSSLESS, []

    @property
    def badge(self) -> str:
        """A line of Markdown for a README."""
        message = f"{self.verdict}, {self.num_identical:,} of {self.num_texts:,} texts, {self.sampled.num_ids:,} ids"
        path = "-".join(quote(part.replace("-", "--")) for part in ("specdec audit", message, COLORS[self.exit_code]))
        return f"![specdec audit: {message}](https://img.shields.io/badge/{path})"

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "exit_code": self.exit_code} | asdict(self) | {"badge": self.badge}


def e_value(log_e: float) -> str:
    """An e-value from its logarithm."""
    return f"{math.exp(log_e):.3g}" if log_e < 20 else f"10^{log_e / math.log(10):.0f}"


def control_rows(evidence: Evidence, what: Mapping[str, str]) -> list[ControlRow]:
    return [
        ControlRow(name, what[name], result["found"], result["num_ids"], result["evidence"])
        for (_, name), result in evidence.of("control").items()
    ]


def sum_up(
    evidence: Evidence,
    bettors: Bettors,
    groups: Mapping[str, str],
    calls: Mapping[Any, str],
    call_of: Callable[[Key], Any],
    alpha: float,
    tolerance: float,
    shift: str,
    shifted_group: str,
) -> SampledIds:
    """All sampled calls, in the order in which they were made.

    A result has log_wealth (of bettors), num_ids (by group), and means, a histogram of an indicator's means in
    shifted_group, from which the power is computed. groups, calls: their names; the first group is of all ids.
    tolerance: the largest of a bet, see bets_on_feature.
    """
    first = next(iter(groups))
    log_wealth = torch.zeros(len(bettors), dtype=torch.float64)
    num_ids, means = dict.fromkeys(groups, 0), [0] * BINS
    by_call = {name: torch.zeros_like(log_wealth) for name in calls}
    ids_by_call = dict.fromkeys(calls, 0)
    max_log_e = 0.0
    for key, result in evidence.of("sampled").items():
        call = call_of(key)
        change = torch.tensor(result["log_wealth"], dtype=torch.float64)
        log_wealth += change
        by_call[call] += change
        ids_by_call[call] += result["num_ids"][first]
        max_log_e = max(max_log_e, bettors.log_e_value(log_wealth))
        for group in groups:
            num_ids[group] += result["num_ids"].get(group, 0)
        means = [a + b for a, b in zip(means, result["means"], strict=True)]
    variation = smallest_shift(means, alpha, len(bettors), tolerance) if sum(means) else 1.0
    return SampledIds(
        groups=[
            SamplingRow(what, num_ids[name], bettors.log_e_value(log_wealth, name)) for name, what in groups.items()
        ],
        calls=[
            SamplingRow(what, ids_by_call[name], bettors.log_e_value(by_call[name])) for name, what in calls.items()
        ],
        log_e=bettors.log_e_value(log_wealth),
        max_log_e=max_log_e,
        alpha=alpha,
        shift=shift,
        smallest_variation=variation,
        draws_needed={
            smaller: math.ceil(num_ids[shifted_group] * ((variation - tolerance) / (smaller - tolerance)) ** 2)
            for smaller in SMALLER_VARIATIONS
            if tolerance < smaller < variation < 1
        },
    )


def histogram(means: Iterable[float]) -> list[int]:
    """Counts of means in BINS equal bins of [0, 1]."""
    counts = [0] * BINS
    for mean in means:
        counts[min(int(BINS * mean), BINS - 1)] += 1
    return counts
