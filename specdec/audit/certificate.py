"""The certificate: what an audit found, in one object, and the verdict that it allows."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from specdec.audit.controls import CONTROLS
from specdec.audit.evidence import Evidence
from specdec.audit.sampling import BETTORS, CALLS, GROUPS, log_e_value
from specdec.audit.statistics import clopper_pearson, smallest_shift

LOSSLESS, ROUNDING, FAULTY, INCONCLUSIVE = "lossless", "lossless up to rounding", "not lossless", "inconclusive"
EXIT_CODES = {LOSSLESS: 0, ROUNDING: 0, FAULTY: 1, INCONCLUSIVE: 3}
MIN_TEXTS, MIN_DRAWS = 10, 1000  # of a verdict
MAX_EXCLUDED = 0.1  # share of ids: rounding moves an id across the edge of a nucleus now and then
SMALLER_VARIATIONS = (0.05, 0.02, 0.01, 0.005)


@dataclass(frozen=True)
class GreedyRow:
    """Greedy texts of one setting: how many, how many are plain decoding's, and the 95 % interval of the share."""

    drafter: str
    num_draft_tokens: int | str
    batch_size: int
    texts: int
    identical: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class SamplingRow:
    """One group of positions: its ids, and the logarithm of its e-value."""

    group: str
    num_ids: int
    log_e: float


@dataclass(frozen=True)
class CallRow:
    """One kind of sampled call: its ids, and the logarithm of the e-value of these alone."""

    what: str
    num_ids: int
    log_e: float


@dataclass(frozen=True)
class ControlRow:
    """A loop that is broken on purpose: whether a check found it, after how many ids. found: None: not applicable."""

    name: str
    what: str
    found: bool | None
    num_ids: int
    evidence: str


@dataclass
class Certificate:
    """What an audit found.

    verdict: one of LOSSLESS, ROUNDING, FAULTY, INCONCLUSIVE. reasons: why it is not LOSSLESS.
    greedy, divergences: see identity.py. widths: see widths.py; None where it was not measured.
    sampling: by group, the first of all ids; calls: by kind of call. log_e, max_log_e: of all ids, at the end and
        the largest at any time. alpha: the rate of false alarms; the law is rejected where max_log_e >= log(1/alpha).
    smallest_variation: the smallest total variation towards the draft, at draft positions, that these draws would have
        found with 95 %. draws_needed: for smaller ones.
    stop_errors: sampled texts that end elsewhere than under plain decoding. seed_errors: calls whose seed gave another
        text the second time. impossible: ids with probability 0.
    excluded: ids left out of the bets, since the law that they were drawn from differs by more than rounding.
    max_logit_difference: of the logits that were verified with, as a share of the largest logit; max_logit_rounding:
        the largest that counts as rounding.
    """

    verdict: str
    reasons: list[str]
    claims_invariance: bool
    greedy: list[GreedyRow]
    divergences: list[dict[str, Any]]
    widths: dict[str, Any] | None
    sampling: list[SamplingRow]
    calls: list[CallRow]
    log_e: float
    max_log_e: float
    alpha: float
    smallest_variation: float
    draws_needed: dict[float, int]
    stop_errors: int
    seed_errors: int
    impossible: int
    excluded: int
    max_logit_difference: float
    max_logit_rounding: float
    controls: list[ControlRow]
    seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def num_texts(self) -> int:
        return sum(row.texts for row in self.greedy)

    @property
    def num_identical(self) -> int:
        return sum(row.identical for row in self.greedy)

    @property
    def sampling_summary(self) -> str:
        """What the e-process says, and what it would have found."""
        text = (
            f"The largest e-value is {e_value(self.max_log_e)}. The law is rejected from {1 / self.alpha:,.0f} on,"
            f" which happens to a lossless loop in at most {self.alpha:.2%} of runs."
        )
        if not self.sampling[1].num_ids:
            return text + " The loop does not show where its drafts are, so no shift towards them can be stated."
        if self.smallest_variation == 1:
            return text + " So few draws would have found no shift towards the draft with 95 %."
        return text + (
            f" A shift towards the draft by {self.smallest_variation:.3f} (total variation, at draft positions) would"
            " have been found with 95 %."
        )

    @property
    def widths_summary(self) -> str:
        """What the comparison over widths and batch sizes says."""
        widths = self.widths
        if widths is None:
            return "Logits were not compared over widths and batch sizes."
        if widths["is_invariant"]:
            return (
                "Logits are equal, bit for bit, at all widths and batch sizes that were measured, and equal to plain"
                " decoding's."
            )
        return (
            f"Logits differ by up to {widths['largest']:.3g} units of rounding over widths and batch sizes; plain"
            f" decoding's by {widths['stock']:.3g}."
        )

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "exit_code": self.exit_code} | asdict(self)


def e_value(log_e: float) -> str:
    """An e-value from its logarithm."""
    return f"{math.exp(log_e):.3g}" if log_e < 20 else f"10^{log_e / math.log(10):.0f}"


def certify(
    evidence: Evidence,
    claims_invariance: bool,
    alpha: float,
    max_logit_rounding: float,
    command: str,
    provenance: dict[str, Any],
) -> Certificate:
    """The certificate of what has been found so far. command: that a divergence's is made from."""
    greedy, divergences = _greedy(evidence, command)
    sampled = evidence.of("sampled")
    log_wealth = torch.zeros(len(BETTORS), dtype=torch.float64)
    num_ids, histogram = dict.fromkeys(GROUPS, 0), [0] * 20
    by_call = {name: torch.zeros_like(log_wealth) for name in CALLS}
    ids_by_call = dict.fromkeys(CALLS, 0)
    max_log_e = 0.0
    for (_, _, call, _), result in sampled.items():
        change = torch.tensor(result["log_wealth"], dtype=torch.float64)
        log_wealth += change
        by_call[call] += change
        ids_by_call[call] += result["num_ids"]["all"]
        max_log_e = max(max_log_e, log_e_value(log_wealth))
        for group in GROUPS:
            num_ids[group] += result["num_ids"].get(group, 0)
        histogram = [a + b for a, b in zip(histogram, result["draft_means"], strict=True)]
    variation = smallest_shift(histogram, alpha, len(BETTORS)) if sum(histogram) else 1.0
    controls = [
        ControlRow(name, CONTROLS[name].what, result["found"], result["num_ids"], result["evidence"])
        for (_, name), result in evidence.of("control").items()
    ]
    certificate = Certificate(
        verdict=LOSSLESS,
        reasons=[],
        claims_invariance=claims_invariance,
        greedy=greedy,
        divergences=divergences,
        widths=evidence.results.get(("widths",)),
        sampling=[SamplingRow(GROUPS[name], num_ids[name], log_e_value(log_wealth, name)) for name in GROUPS],
        calls=[CallRow(CALLS[name].what, ids_by_call[name], log_e_value(by_call[name])) for name in CALLS],
        log_e=log_e_value(log_wealth),
        max_log_e=max_log_e,
        alpha=alpha,
        smallest_variation=variation,
        draws_needed={
            smaller: math.ceil(num_ids["draft"] * (variation / smaller) ** 2)
            for smaller in SMALLER_VARIATIONS
            if smaller < variation < 1
        },
        stop_errors=sum(result["stop_errors"] for result in sampled.values()),
        seed_errors=sum(result["seed_errors"] for result in sampled.values()),
        impossible=sum(result["impossible"] for result in sampled.values()),
        excluded=sum(result["excluded"] for result in sampled.values()),
        max_logit_difference=max((result["max_logit_difference"] for result in sampled.values()), default=0.0),
        max_logit_rounding=max_logit_rounding,
        controls=controls,
        seconds=sum(evidence.seconds.values()),
        provenance=provenance,
    )
    certificate.verdict, certificate.reasons = _verdict(certificate)
    return certificate


def _greedy(evidence: Evidence, command: str) -> tuple[list[GreedyRow], list[dict[str, Any]]]:
    counts: dict[tuple[str, int | str, int], list[int]] = defaultdict(lambda: [0, 0])
    divergences = []
    for (_, drafter, k, size, _), result in evidence.of("greedy").items():
        count = counts[drafter, k, size]
        count[0] += result["texts"]
        count[1] += result["identical"]
        setting = {"drafter": drafter, "num_draft_tokens": k, "batch_size": size}
        for divergence in result["divergences"]:
            arguments = (
                f"--drafter {drafter} --num-draft-tokens {k} --batch {size} --first-prompt {result['first_prompt']}"
                f" --max-prompts {size} --max-new-tokens {divergence['position'] + 1}"
            )
            divergences.append(setting | divergence | {"command": f"{command} {arguments}"})
    rows = [
        GreedyRow(*setting, texts, identical, clopper_pearson(identical, texts))
        for setting, (texts, identical) in counts.items()
    ]
    return rows, divergences


def _verdict(found: Certificate) -> tuple[str, list[str]]:
    faults = []
    num_faults = sum(found.claims_invariance or not divergence["is_rounding"] for divergence in found.divergences)
    if num_faults:
        faults.append(f"{num_faults} of {found.num_texts} greedy texts differ from plain decoding's, not by rounding")
    if found.max_log_e >= math.log(1 / found.alpha):
        kinds = [row.what for row in found.calls if row.log_e >= math.log(1 / found.alpha)]
        where = f"; calls with {', '.join(kinds)}" if kinds else ""
        faults.append(f"sampled ids are not drawn from the law of plain decoding{where}")
    if found.stop_errors:
        faults.append(f"{found.stop_errors} sampled texts end at another position than under plain decoding")
    if found.max_logit_difference > found.max_logit_rounding:
        faults.append("the logits that drafts are verified with are not those of plain decoding")
    if found.seed_errors:
        faults.append(f"{found.seed_errors} sampled calls wrote another text when their seed was set again")
    num_drawn = found.sampling[0].num_ids + found.excluded
    if found.excluded > (0 if found.claims_invariance else MAX_EXCLUDED * num_drawn):
        faults.append(f"{found.excluded} of {num_drawn} sampled ids have another law than under plain decoding")
    if found.claims_invariance and found.widths is not None and not found.widths["is_invariant"]:
        faults.append("logits depend on the width of the window or on the batch, which specdec rules out here")
    if faults:
        return FAULTY, faults

    gaps = []
    if found.num_texts < MIN_TEXTS:
        gaps.append(f"{found.num_texts} greedy texts were compared; a verdict takes {MIN_TEXTS}")
    if found.sampling[0].num_ids < MIN_DRAWS:
        gaps.append(f"{found.sampling[0].num_ids:,} ids were sampled; a verdict takes {MIN_DRAWS:,}")
    if found.widths is None:
        gaps.append("logits were not compared over widths and batch sizes")
    missing = len(CONTROLS) - len(found.controls)
    if missing:
        gaps.append(f"{missing} of {len(CONTROLS)} broken loops were not tried; give the audit more time")
    gaps += [f"a loop that {row.what} was not found" for row in found.controls if row.found is False]
    if gaps:
        return INCONCLUSIVE, gaps
    if found.divergences:
        return ROUNDING, [f"{len(found.divergences)} of {found.num_texts} greedy texts differ where rounding decides"]
    return LOSSLESS, []
