"""The certificate of a loop in this process: what an audit found, in one object, and the verdict that it allows."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from specdec.audit.controls import CONTROLS
from specdec.audit.evidence import Evidence
from specdec.audit.findings import Findings, control_rows, sum_up
from specdec.audit.sampling import BETTORS, CALLS, GROUPS
from specdec.audit.statistics import clopper_pearson
from specdec.audit.widths import Widths

MAX_EXCLUDED = 0.1  # share of ids: rounding moves an id across the edge of a nucleus now and then


@dataclass(frozen=True)
class GreedyRow:
    """Greedy texts of one setting: how many, how many are plain decoding's, and the 95 % interval of the share.

    prefill_chunk: positions of a prompt that are read at a time; None: the whole one.
    """

    drafter: str
    num_draft_tokens: int | str
    batch_size: int
    prefill_chunk: int | None
    texts: int
    identical: int
    interval: tuple[float, float]


@dataclass(kw_only=True)
class Certificate(Findings):
    """What an audit of a loop found.

    greedy: texts by setting; identity.py explains divergences. widths: see widths.py; None where it was not measured.
    stop_errors: sampled texts that end elsewhere than under plain decoding. seed_errors: calls whose seed gave another
        text the second time. impossible: ids with probability 0.
    excluded: ids left out of the bets, since the law that they were drawn from differs by more than rounding.
    max_logit_difference: of the logits that were verified with, as a share of the largest logit; max_logit_rounding:
        the largest that counts as rounding.
    """

    claims_invariance: bool
    greedy: list[GreedyRow]
    widths: Widths | None
    stop_errors: int
    seed_errors: int
    impossible: int
    excluded: int
    max_logit_difference: float
    max_logit_rounding: float

    @property
    def num_texts(self) -> int:
        return sum(row.texts for row in self.greedy)

    @property
    def num_identical(self) -> int:
        return sum(row.identical for row in self.greedy)

    def greedy_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: identical texts of all, by drafter, batch size and prefill, and across by K."""
        ks = list(dict.fromkeys(row.num_draft_tokens for row in self.greedy))
        rows = []
        for setting in dict.fromkeys((row.drafter, row.batch_size, row.prefill_chunk) for row in self.greedy):
            cells = {
                row.num_draft_tokens: row
                for row in self.greedy
                if (row.drafter, row.batch_size, row.prefill_chunk) == setting
            }
            identical, texts = (sum(getattr(row, name) for row in cells.values()) for name in ("identical", "texts"))
            low, high = clopper_pearson(identical, texts)
            drafter, size, chunk = setting
            shares = [f"{cells[k].identical}/{cells[k].texts}" if k in cells else "" for k in ks]
            rows.append([drafter, str(size), chunk_name(chunk), *shares, f"{low:.1%} to {high:.1%}"])
        return ["drafter", "batch", "prefill", *(f"K={k}" for k in ks), "95 % interval"], rows

    @property
    def widths_summary(self) -> str:
        """What the comparison over widths and batch sizes says."""
        widths = self.widths
        if widths is None:
            return "Logits were not compared over widths and batch sizes."
        if widths.is_invariant:
            return (
                "Logits are equal, bit for bit, at all widths and batch sizes that were measured, and equal to plain"
                " decoding's."
            )
        return (
            f"Logits differ by up to {widths.largest:.3g} units of rounding over widths and batch sizes; plain"
            f" decoding's by {widths.stock:.3g}."
        )

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        if self.widths is not None:
            values["widths"] |= {"is_invariant": self.widths.is_invariant, "largest": self.widths.largest}
        return values


def chunk_name(prefill_chunk: int | None) -> str:
    """As --prefill-chunk takes it."""
    return "whole" if prefill_chunk is None else str(prefill_chunk)


def certify(
    evidence: Evidence,
    widths: Widths | None,
    claims_invariance: bool,
    alpha: float,
    max_logit_rounding: float,
    max_law_rounding: float,
    command: str | None,
    provenance: dict[str, Any],
) -> Certificate:
    """The certificate of what has been found so far. command: that a divergence's is made from, if any."""
    greedy, divergences = _greedy(evidence, command)
    results = evidence.of("sampled").values()
    hides_steps = bool(results) and not any(result["num_ids"]["draft"] for result in results)
    certificate = Certificate(
        claims_invariance=claims_invariance,
        greedy=greedy,
        divergences=divergences,
        widths=widths,
        sampled=sum_up(
            evidence,
            BETTORS,
            GROUPS,
            {name: call.what for name, call in CALLS.items()},
            call_of=lambda key: key[2],
            alpha=alpha,
            tolerance=max_law_rounding,
            shift="towards the draft (total variation, at draft positions)"
            + (", which this loop does not show," if hides_steps else ""),
            shifted_group="draft",
        ),
        stop_errors=sum(result["stop_errors"] for result in results),
        seed_errors=sum(result["seed_errors"] for result in results),
        impossible=sum(result["impossible"] for result in results),
        excluded=sum(result["excluded"] for result in results),
        max_logit_difference=max((result["max_logit_difference"] for result in results), default=0.0),
        max_logit_rounding=max_logit_rounding,
        controls=control_rows(evidence, {name: control.what for name, control in CONTROLS.items()}),
        seconds=sum(evidence.seconds.values()),
        provenance=provenance,
    )
    gaps = certificate.gaps(len(CONTROLS))
    if widths is None:
        gaps.append("logits were not compared over widths and batch sizes")
    certificate.conclude(_faults(certificate), gaps)
    return certificate


def _greedy(evidence: Evidence, command: str | None) -> tuple[list[GreedyRow], list[dict[str, Any]]]:
    counts: dict[tuple[str, int | str, int, int | None], list[int]] = defaultdict(lambda: [0, 0])
    divergences = []
    for (_, drafter, k, size, chunk, _), result in evidence.of("greedy").items():
        count = counts[drafter, k, size, chunk]
        count[0] += result["texts"]
        count[1] += result["identical"]
        setting = {"drafter": drafter, "num_draft_tokens": k, "batch_size": size, "prefill_chunk": chunk}
        for divergence in result["divergences"]:
            arguments = (
                f"--drafter {drafter} --num-draft-tokens {k} --batch {size} --prefill-chunk {chunk_name(chunk)}"
                f" --first-prompt {result['first_prompt']} --max-prompts {size}"
                f" --max-new-tokens {divergence['position'] + 1}"
            )
            divergences.append(setting | divergence | {"command": command and f"{command} {arguments}"})
    rows = [
        GreedyRow(*setting, texts, identical, clopper_pearson(identical, texts))
        for setting, (texts, identical) in counts.items()
    ]
    return rows, divergences


def _faults(found: Certificate) -> list[str]:
    faults = []
    num_faults = sum(found.claims_invariance or not divergence["is_rounding"] for divergence in found.divergences)
    if num_faults:
        faults.append(f"{num_faults} of {found.num_texts} greedy texts differ from plain decoding's, not by rounding")
    if found.sampled.is_rejected:
        kinds = [row.what for row in found.sampled.calls if row.log_e >= math.log(1 / found.sampled.alpha)]
        where = f"; calls with {', '.join(kinds)}" if kinds else ""
        faults.append(f"sampled ids are not drawn from the law of plain decoding{where}")
    if found.stop_errors:
        faults.append(f"{found.stop_errors} sampled texts end at another position than under plain decoding")
    if found.max_logit_difference > found.max_logit_rounding:
        faults.append("the logits that drafts are verified with are not those of plain decoding")
    if found.seed_errors:
        faults.append(f"{found.seed_errors} sampled calls wrote another text when their seed was set again")
    num_drawn = found.sampled.num_ids + found.excluded
    if found.excluded > (0 if found.claims_invariance else MAX_EXCLUDED * num_drawn):
        faults.append(f"{found.excluded} of {num_drawn} sampled ids have another law than under plain decoding")
    if found.claims_invariance and found.widths is not None and not found.widths.is_invariant:
        faults.append("logits depend on the width of the window or on the batch, which specdec rules out here")
    return faults
