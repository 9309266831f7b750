"""How each figure is defined, next to vLLM's, SGLang's and Spec-Bench's of the same name, and what each gives on a run.

docs/figures.md says where the formulas of vLLM and SGLang are from. Other tools' formulas are evaluated on what the
records hold, which ends at a text's stop; vLLM and SGLang count the ids of a draft before they look for a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.core.stats import Counts
from specdec.drafters.resolve import AUTO
from specdec.experiments.records import PLAIN, SPECULATIVE, Record
from specdec.experiments.report import spec_bench
from specdec.experiments.report.figures import METRICS
from specdec.experiments.report.formatting import number
from specdec.experiments.report.labels import RunReport, k_of
from specdec.experiments.report.tables import NumberTable

Value = float | list[float] | None
SPECDEC, VLLM, SGLANG, SPEC_BENCH = "specdec", "vLLM", "SGLang", "Spec-Bench"
COUNTS = {
    "num_spec_steps": "steps that draft",
    "num_draft_tokens": "draft tokens",
    "num_accepted_draft_tokens": "accepted draft tokens",
    "acceptance_histogram": "steps by accepted draft tokens",
    "acceptance_per_position": "acceptance by position",
    "conditional_acceptance_per_position": "acceptance by position, all preceding accepted",
}
UNITS = {"acceptance_per_position": "%", "conditional_acceptance_per_position": "%"} | {
    name: metric.unit for name, metric in METRICS.items()
}
NOTE = (
    "Formulas of the other tools are evaluated on these records, which end at a text's stop. vLLM and SGLang count the"
    " ids of a draft before they look for a stop, so on texts that stop inside a draft their own counts are higher."
    " Seconds are those of the calls here: a server's also hold the network and its queue. A row of a batch has its"
    " share of the call's seconds, and ends with the call."
)


@dataclass(frozen=True)
class Definition:
    """figure: specdec's name of it. tool, name: whose definition, and what it is called there.

    value: of a run, a share where the unit is per cent; None where the run lacks what the formula needs.
    """

    figure: str
    tool: str
    name: str
    formula: str
    value: Callable[[RunReport], Value]

    @property
    def label(self) -> str:
        return METRICS[self.figure].label if self.figure in METRICS else COUNTS[self.figure]

    def text(self, report: RunReport) -> str:
        """The value as the report writes it, "–" where there is none."""
        return value_text(self.figure, self.value(report))


def value_text(figure: str, value: Value) -> str:
    """A figure's value with its unit; counts are whole numbers."""
    if isinstance(value, list):
        return ", ".join(value_text(figure, item) for item in value) or "–"
    if figure not in UNITS and value is not None:
        return f"{value:,.0f}"
    return number(value, UNITS.get(figure, ""))


def definitions_table(reports: Sequence[RunReport]) -> NumberTable:
    """All definitions, with a column of values for each run."""
    rows = []
    for definition in DEFINITIONS:
        values = [definition.text(report) for report in reports]
        rows.append([definition.label, definition.tool, definition.name, definition.formula, *values])
    return NumberTable("Definitions", ["figure", "of", "name", "formula", *(report.label for report in reports)], rows)


def definitions_json(reports: Sequence[RunReport]) -> list[dict[str, Any]]:
    """All definitions, with the value of each run, in the order of the runs."""
    return [
        {
            "figure": definition.figure,
            "tool": definition.tool,
            "name": definition.name,
            "formula": definition.formula,
            "values": [definition.value(report) for report in reports],
        }
        for definition in DEFINITIONS
    ]


def _metric(name: str) -> Callable[[RunReport], Value]:
    return lambda report: report.figures.metrics[name].value


def _count(name: str) -> Callable[[RunReport], Value]:
    return lambda report: getattr(_counts(report), name) if report.run.of(SPECULATIVE) else None


def _counts(report: RunReport) -> Counts:
    return Counts.of([step for record in report.run.of(SPECULATIVE) for step in record.steps])


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _vllm_acceptance_length(report: RunReport) -> Value:
    counts = _counts(report)
    accepted = _ratio(counts.num_accepted_draft_tokens, counts.num_spec_steps)
    return None if accepted is None else 1 + accepted


def _sglang_proposed(report: RunReport) -> float | None:
    """None with "auto", which has no configured number."""
    k = k_of(report.run)
    return None if k == AUTO or not report.run.of(SPECULATIVE) else float(_counts(report).num_steps * int(k))


def _sglang_accept_rate(report: RunReport) -> Value:
    proposed = _sglang_proposed(report)
    return None if proposed is None else _ratio(_counts(report).num_accepted_draft_tokens, proposed)


def _mean(of: Callable[[Record], float | None]) -> Callable[[RunReport], Value]:
    """Mean over the speculative records that have the value."""

    def mean(report: RunReport) -> Value:
        values = [value for record in report.run.of(SPECULATIVE) if (value := of(record)) is not None]
        return float(np.mean(values)) if values else None

    return mean


def _throughput(report: RunReport) -> Value:
    records = report.run.of(SPECULATIVE)
    seconds = sum(record.seconds.total_s / record.rows for record in records)
    return _ratio(sum(len(record.ids) for record in records), seconds)


def _positions(report: RunReport) -> Value:
    return [position.unconditional.value or 0.0 for position in report.figures.positions] or None


def _conditional(report: RunReport) -> Value:
    values = (position.conditional.value for position in report.figures.positions)
    return [value for value in values if value is not None] or None


def _histogram(report: RunReport) -> Value:
    return [float(count) for count in report.figures.histogram] or None


def _sglang_histogram(report: RunReport) -> Value:
    histogram, counts = report.figures.histogram, _counts(report)
    if not histogram:
        return None
    return [float(histogram[0] + counts.num_steps - counts.num_spec_steps), *map(float, histogram[1:])]


def _spec_bench_speedup(report: RunReport) -> Value:
    return spec_bench.speedup(spec_bench.answers_of(report.run, SPECULATIVE), spec_bench.answers_of(report.run, PLAIN))


def _spec_bench_rate(engine: str) -> Callable[[RunReport], Value]:
    return lambda report: spec_bench.tokens_per_s(spec_bench.answers_of(report.run, engine))


def _spec_bench_accepted(report: RunReport) -> Value:
    return spec_bench.mean_accepted_tokens(spec_bench.answers_of(report.run, SPECULATIVE))


def _first_token_ms(record: Record) -> float:
    return 1000 * record.seconds.first_token_s


def _token_ms(record: Record) -> float | None:
    token_s = record.seconds.token_s
    return None if token_s is None else 1000 * token_s


_THROUGHPUT = "generated ids of all requests / seconds from the first request to the last answer"
_TTFT = "mean over requests of the milliseconds until the first ids arrive"
_TPOT = "mean over requests of the milliseconds after the first ids / (ids - 1)"

DEFINITIONS = [
    Definition(
        "speedup", SPECDEC, "speedup", "tokens per second / tokens per second of plain decoding, same prompts",
        _metric("speedup"),
    ),
    Definition(
        "speedup", SPEC_BENCH, "Speedup ratio",
        "mean over questions of ids / seconds, over the same mean of plain decoding", _spec_bench_speedup,
    ),
    Definition(
        "tokens_per_s", SPECDEC, "tokens_per_s", "ids / seconds of the calls, prefill included",
        _metric("tokens_per_s"),
    ),
    Definition("tokens_per_s", VLLM, "output_throughput", _THROUGHPUT, _throughput),
    Definition("tokens_per_s", SGLANG, "output_throughput", _THROUGHPUT, _throughput),
    Definition(
        "tokens_per_s", SPEC_BENCH, "Tokens per second", "mean over questions of ids / seconds",
        _spec_bench_rate(SPECULATIVE),
    ),
    Definition(
        "plain_tokens_per_s", SPECDEC, "plain_tokens_per_s", "the same of the plain engine",
        _metric("plain_tokens_per_s"),
    ),
    Definition(
        "plain_tokens_per_s", SPEC_BENCH, "Tokens per second for the baseline",
        "mean over questions of ids / seconds; Spec-Bench counts the ids of the answer's text again",
        _spec_bench_rate(PLAIN),
    ),
    Definition(
        "mean_acceptance_length", SPECDEC, "mean_acceptance_length", "ids of steps that draft / steps that draft",
        _metric("mean_acceptance_length"),
    ),
    Definition(
        "mean_acceptance_length", VLLM, "spec_decode_acceptance_length", "1 + accepted draft ids / drafts",
        _vllm_acceptance_length,
    ),
    Definition(
        "mean_acceptance_length", SGLANG, "accept_length",
        "ids of verifying forwards / verifying forwards, those without a draft included", _metric("tokens_per_step"),
    ),
    Definition(
        "mean_acceptance_length", SPEC_BENCH, "#Mean accepted tokens", "mean over all steps of the ids of a step",
        _spec_bench_accepted,
    ),
    Definition(
        "tokens_per_step", SPECDEC, "tokens_per_step", "ids / steps", _metric("tokens_per_step"),
    ),
    Definition(
        "draft_acceptance_rate", SPECDEC, "draft_acceptance_rate", "accepted draft ids / draft ids",
        _metric("draft_acceptance_rate"),
    ),
    Definition(
        "draft_acceptance_rate", VLLM, "spec_decode_acceptance_rate", "accepted draft ids / draft ids",
        lambda report: _counts(report).ratio("draft_acceptance_rate"),
    ),
    Definition(
        "draft_acceptance_rate", SGLANG, "spec_accept_rate", "accepted draft ids / (verifying forwards × K)",
        _sglang_accept_rate,
    ),
    Definition(
        "expected_acceptance", SPECDEC, "expected_acceptance",
        "mean of sum(min(p, q)) over draft ids whose preceding ones were accepted", _metric("expected_acceptance"),
    ),
    Definition(
        "realized_acceptance", SPECDEC, "realized_acceptance",
        "accepted draft ids / draft ids whose preceding ones were accepted", _metric("realized_acceptance"),
    ),
    Definition(
        "first_token_ms", SPECDEC, "first_token_ms", "mean over calls of the milliseconds until a step is verified",
        _metric("first_token_ms"),
    ),
    Definition(
        "first_token_ms", VLLM, "mean_ttft_ms", _TTFT, _mean(_first_token_ms)
    ),
    Definition(
        "first_token_ms", SGLANG, "mean_ttft_ms", _TTFT, _mean(_first_token_ms)
    ),
    Definition(
        "plain_first_token_ms", SPECDEC, "plain_first_token_ms", "the same of the plain engine",
        _metric("plain_first_token_ms"),
    ),
    Definition(
        "token_ms", SPECDEC, "token_ms", "milliseconds of the calls / ids, prefill included", _metric("token_ms")
    ),
    Definition("token_ms", VLLM, "mean_tpot_ms", _TPOT, _mean(_token_ms)),
    Definition("token_ms", SGLANG, "mean_tpot_ms", _TPOT, _mean(_token_ms)),
    Definition(
        "identical", SPECDEC, "identical", "texts equal to plain decoding's / greedy texts decoded both ways",
        _metric("identical"),
    ),
    Definition(
        "num_spec_steps", SPECDEC, "num_spec_steps", "steps with at least one draft id", _count("num_spec_steps")
    ),
    Definition(
        "num_spec_steps", VLLM, "spec_decode_num_drafts", "steps with a draft", _count("num_spec_steps")
    ),
    Definition("num_spec_steps", SGLANG, "spec_verify_ct", "verifying forwards", _count("num_steps")),
    Definition(
        "num_draft_tokens", SPECDEC, "num_draft_tokens", "draft ids that were verified", _count("num_draft_tokens")
    ),
    Definition(
        "num_draft_tokens", VLLM, "spec_decode_draft_tokens", "draft ids", _count("num_draft_tokens")
    ),
    Definition(
        "num_draft_tokens", SGLANG, "spec_num_proposed_drafts", "verifying forwards × K", _sglang_proposed
    ),
    Definition(
        "num_accepted_draft_tokens", SPECDEC, "num_accepted_draft_tokens", "draft ids that were accepted",
        _count("num_accepted_draft_tokens"),
    ),
    Definition(
        "num_accepted_draft_tokens", VLLM, "spec_decode_accepted_tokens", "accepted draft ids",
        _count("num_accepted_draft_tokens"),
    ),
    Definition(
        "num_accepted_draft_tokens", SGLANG, "spec_num_correct_drafts", "accepted draft ids",
        _count("num_accepted_draft_tokens"),
    ),
    Definition(
        "acceptance_histogram", SPECDEC, "acceptance_histogram",
        "steps that draft and accept 0, 1, … K draft ids", _histogram,
    ),
    Definition("acceptance_histogram", VLLM, "acceptance_histogram", "steps with a draft, the same", _histogram),
    Definition(
        "acceptance_histogram", SGLANG, "spec_correct_drafts_histogram", "verifying forwards, the same",
        _sglang_histogram,
    ),
    Definition(
        "acceptance_per_position", SPECDEC, "acceptance_per_position",
        "steps that accept the position / steps that draft", _positions,
    ),
    Definition(
        "acceptance_per_position", VLLM, "spec_decode_per_position_acceptance_rates",
        "accepted at the position / drafts", _positions,
    ),
    Definition(
        "conditional_acceptance_per_position", SPECDEC, "conditional_acceptance_per_position",
        "steps that accept the position / steps that draft it and accept all before it", _conditional,
    ),
]  # fmt: skip
