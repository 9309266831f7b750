"""Runs that other tools recorded, read from their public formats: what a file holds, and why it lacks the rest.

    vLLM         the JSON of `vllm bench serve --save-result` (vllm/benchmarks/serve.py), one object, or with
                 --append-result one a line; spec_decode_… where the server speculates
    SGLang       the JSON lines of `sglang.bench_serving` (python/sglang/bench_serving.py), with accept_length, and of
                 `sglang.bench_one_batch_server` (bench_one_batch_server.py), with acc_length
    Spec-Bench   the answer files of evaluation/inference_*.py in github.com/hemingkx/Spec-Bench: a question a line,
                 choices with new_tokens, wall_time (seconds) and accept_lengths

A figure keeps the value that the tool recorded, in specdec's unit; definitions.py has the tools' formulas.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specdec.experiments.records import PLAIN, SPECULATIVE
from specdec.experiments.report import spec_bench
from specdec.experiments.report.definitions import COUNTS, DEFINITIONS, SGLANG, SPEC_BENCH, SPECDEC, VLLM, Value
from specdec.experiments.report.figures import METRICS
from specdec.experiments.report.labels import RunReport, display_name
from specdec.experiments.report.spec_bench import Answer, Answers

FIGURES = {  # that a run of another tool may have, by specdec's names
    **{name: METRICS[name].label for name in ("speedup", "tokens_per_s", "mean_acceptance_length")},
    **{name: METRICS[name].label for name in ("draft_acceptance_rate", "expected_acceptance")},
    **COUNTS,
    **{name: METRICS[name].label for name in ("first_token_ms", "token_ms", "identical")},
    "num_emitted_tokens": "generated tokens",
}
NO_PLAIN_RUN = "a file holds one run; name that of the same requests without speculation too"
NO_PROBABILITIES = "needs the probabilities of both models, which no server returns"
NO_PLAIN_TEXT = "needs plain decoding's token ids of the same prompts"
NO_SPECULATION = "the server reported none: it does not speculate, or its metrics could not be read"


@dataclass(frozen=True)
class OtherRun:
    """A run of another tool, or of specdec in a table with those.

    settings: what the file says of the run, as texts. figures: by the names of FIGURES. missing: the reason for each
    figure that the run lacks. is_plain: without speculation. answers, plain_answers: of Spec-Bench's questions, for its
    table; plain_answers are those of the run that the speedup is over.
    """

    tool: str
    label: str
    settings: dict[str, str]
    figures: dict[str, float | list[float]]
    missing: dict[str, str]
    is_plain: bool
    answers: Answers = field(default_factory=dict)
    plain_answers: Answers = field(default_factory=dict)


def is_of_other_tool(path: Path) -> bool:
    """Whether a file begins with a JSON object that is no record of specdec."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as stream:
        try:
            first = json.loads(stream.readline())
        except ValueError:  # a JSON file may have line breaks inside its object
            first = _whole(path)
    return isinstance(first, dict) and "kind" not in first


def read_other_runs(paths: Sequence[Path]) -> list[OtherRun]:
    """The runs of files of other tools, with speedups over those of them that did not speculate.

    Raises ValueError for a file in another format, or one that lacks what its format must have.
    """
    runs = [run for path in paths for run in _read(path)]
    counts = Counter(run.label for run in runs)
    labelled = [
        run if counts[run.label] == 1 else replace(run, label=f"{run.label} ({number})")
        for number, run in enumerate(runs, 1)
    ]
    return with_speedups(labelled)


def of_specdec(report: RunReport) -> OtherRun:
    """A run of specdec as a column next to those of other tools, by specdec's own definitions."""
    values = {line.figure: line.value(report) for line in DEFINITIONS if line.tool == SPECDEC}
    is_plain = not report.run.of(SPECULATIVE)
    if is_plain:
        values["tokens_per_s"] = values["plain_tokens_per_s"]
    records = report.run.of(PLAIN if is_plain else SPECULATIVE)
    values["num_emitted_tokens"] = sum(len(record.ids) for record in records)
    figures = {name: value for name, value in values.items() if name in FIGURES and value is not None}
    settings = {"model": display_name(report.config["target"]), "requests": f"{report.figures.prompts:,}"}
    missing = {name: "the run has no record that gives it" for name in FIGURES if name not in figures}
    answers, plain = (spec_bench.answers_of(report.run, engine) for engine in (SPECULATIVE, PLAIN))
    return OtherRun(SPECDEC, report.label, settings, figures, missing, is_plain, answers, plain)


def with_speedups(runs: Sequence[OtherRun]) -> list[OtherRun]:
    """The runs, each with its speedup where exactly one plain run is of the same tool and the same requests."""
    return [run if run.tool == SPECDEC else _with_speedup(run, runs) for run in runs]


def _with_speedup(run: OtherRun, runs: Sequence[OtherRun]) -> OtherRun:
    plain = [other for other in runs if other.is_plain and _is_of_same_requests(run, other)]
    if run.is_plain or len(plain) != 1:
        reason = NO_PLAIN_RUN
        if run.is_plain:
            reason = "the run itself is without speculation"
        elif plain:
            reason = f"{len(plain)} runs without speculation are of the same requests; name one of them"
        return replace(run, missing={"speedup": reason} | run.missing)
    if run.tool == SPEC_BENCH:
        speedup = spec_bench.speedup(run.answers, plain[0].answers)
    else:
        speedup = _quotient(run.figures.get("tokens_per_s"), plain[0].figures.get("tokens_per_s"))
    if speedup is None:
        return replace(run, missing={"speedup": "a run has no tokens per second"} | run.missing)
    return replace(run, figures=run.figures | {"speedup": speedup}, plain_answers=plain[0].answers)


def _is_of_same_requests(run: OtherRun, plain: OtherRun) -> bool:
    """Of totals all settings must be equal, the number of prompt tokens among them; of answers the questions count."""
    if run.tool == SPEC_BENCH:
        return plain.tool == SPEC_BENCH and not run.answers.keys().isdisjoint(plain.answers)
    return run.tool == plain.tool != SPECDEC and run.settings == plain.settings


def _quotient(part: Value, whole: Value) -> float | None:
    return part / whole if isinstance(part, float) and isinstance(whole, float) and whole else None


def _whole(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _read(path: Path) -> list[OtherRun]:
    rows = _rows(path)
    name, reader = next(((name, reader) for name, has, reader in READERS if has <= rows[0].keys()), ("", None))
    if reader is None:
        raise ValueError(
            f"{path} is not a run that is known: reports are made of specdec's records, of the JSON of vLLM's `bench"
            " serve --save-result`, of the JSON lines of SGLang's bench_serving and bench_one_batch_server, and of"
            f" Spec-Bench's answer files; this one has the fields {', '.join(list(rows[0])[:8])}"
        )
    try:
        return reader(path, rows)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} looks like a file of {name}, but {what}") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file or of a file of JSON lines, at least one."""
    whole = _whole(path)
    if isinstance(whole, dict):
        return [whole]
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {line[:60]!r}") from error
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]!r}")
        rows += [row] if row is not None else []
    return rows


def _labels(path: Path, count: int) -> list[str]:
    return [path.stem] if count == 1 else [f"{path.stem}, line {number}" for number in range(1, count + 1)]


def _number(row: dict[str, Any], key: str, scale: float = 1.0) -> float | None:
    """A finite number of a row, None where it has none."""
    value = row.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return scale * value


def _settings(row: dict[str, Any], keys: dict[str, str]) -> dict[str, str]:
    """What a row says of its run, by the names that the page shows."""
    given = {name: row[key] for name, key in keys.items() if row.get(key) is not None}
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in given.items()}


def _run_of_totals(
    tool: str, label: str, settings: dict[str, str], values: dict[str, Value], reasons: dict[str, str]
) -> OtherRun:
    """A run of a server. reasons: for the figures without a value; those that are not named need speculation."""
    figures = {name: value for name, value in values.items() if value is not None and value != []}
    reasons = {"expected_acceptance": NO_PROBABILITIES, "identical": NO_PLAIN_TEXT} | reasons
    missing = {name: reasons.get(name, NO_SPECULATION) for name in FIGURES if name not in {*figures, "speedup"}}
    return OtherRun(tool, label, settings, figures, missing, "mean_acceptance_length" not in figures)


def _read_vllm(path: Path, rows: list[dict[str, Any]]) -> list[OtherRun]:
    runs = []
    for label, row in zip(_labels(path, len(rows)), rows, strict=True):
        settings = _settings(
            row,
            {
                "model": "model_id", "requests": "completed", "failed requests": "failed",
                "prompt tokens": "total_input_tokens", "request rate": "request_rate",
                "concurrency": "max_concurrency",
            },
        )  # fmt: skip
        positions = row.get("spec_decode_per_position_acceptance_rates")
        values: dict[str, Value] = {
            "tokens_per_s": _number(row, "output_throughput"),
            "mean_acceptance_length": _number(row, "spec_decode_acceptance_length"),
            "draft_acceptance_rate": _number(row, "spec_decode_acceptance_rate", 0.01),
            "num_spec_steps": _number(row, "spec_decode_num_drafts"),
            "num_draft_tokens": _number(row, "spec_decode_draft_tokens"),
            "num_accepted_draft_tokens": _number(row, "spec_decode_accepted_tokens"),
            "acceptance_per_position": [float(rate) for rate in positions] if positions else None,
            "first_token_ms": _number(row, "mean_ttft_ms"),
            "token_ms": _number(row, "mean_tpot_ms"),
            "num_emitted_tokens": _number(row, "total_output_tokens"),
        }
        unnamed = "--percentile-metrics left it out, or the endpoint does not stream"
        by_step = "bench serve records rates by position, and no step"
        reasons = {"first_token_ms": unnamed, "token_ms": unnamed}
        reasons |= {"acceptance_histogram": by_step, "conditional_acceptance_per_position": by_step}
        runs.append(_run_of_totals(VLLM, label, settings, values, reasons))
    return runs


TOTALS_OF_SGLANG = "SGLang's benchmarks record the mean acceptance length alone"
SGLANG_LACKS = dict.fromkeys(["draft_acceptance_rate", *COUNTS], TOTALS_OF_SGLANG)


def _read_sglang_serving(path: Path, rows: list[dict[str, Any]]) -> list[OtherRun]:
    runs = []
    for label, row in zip(_labels(path, len(rows)), rows, strict=True):
        settings = _settings(
            row,
            {
                "dataset": "dataset_name", "requests": "completed", "prompt tokens": "total_input_tokens",
                "request rate": "request_rate", "concurrency": "max_concurrency",
            },
        )  # fmt: skip
        values: dict[str, Value] = {
            "tokens_per_s": _number(row, "output_throughput"),
            "mean_acceptance_length": _number(row, "accept_length"),
            "first_token_ms": _number(row, "mean_ttft_ms"),
            "token_ms": _number(row, "mean_tpot_ms"),
            "num_emitted_tokens": _number(row, "total_output_tokens"),
        }
        runs.append(_run_of_totals(SGLANG, label, settings, values, SGLANG_LACKS))
    return runs


def _read_sglang_one_batch(path: Path, rows: list[dict[str, Any]]) -> list[OtherRun]:
    """Throughput is computed: that of the file excludes the prefill in newer versions alone."""
    runs = []
    for label, row in zip(_labels(path, len(rows)), rows, strict=True):
        settings = _settings(
            row,
            {
                "model": "model_path", "batch": "batch_size", "prompt length": "input_len",
                "generated length": "output_len",
            },
        )  # fmt: skip
        tokens = row["batch_size"] * row["output_len"]
        length = _number(row, "acc_length")
        values: dict[str, Value] = {
            "tokens_per_s": tokens / row["latency"],
            "mean_acceptance_length": length if length is not None and length > 1 else None,
            "first_token_ms": _number(row, "last_ttft", 1000.0),
            "num_emitted_tokens": float(tokens),
        }
        reasons = SGLANG_LACKS | dict.fromkeys(["first_token_ms", "token_ms"], "the batch is timed as a whole")
        runs.append(_run_of_totals(SGLANG, label, settings, values, reasons))
    return runs


def _read_spec_bench(path: Path, rows: list[dict[str, Any]]) -> list[OtherRun]:
    """The first choice of each question, as evaluation/speed.py takes it, without those that failed.

    A turn that failed has the text "ERROR" and the seconds of an earlier one.
    """
    answers: Answers = {}
    failed: set[str] = set()
    for number, row in enumerate(rows, 1):
        choice, question = row["choices"][0], str(row["question_id"])
        if question in answers or question in failed:
            raise ValueError(f"{path}, line {number}: the question {question} occurs twice; keep one run a file")
        if "ERROR" in choice["turns"]:
            failed.add(question)
            continue
        lengths = [int(length) for length in choice["accept_lengths"]]
        answers[question] = Answer(row["category"], sum(choice["new_tokens"]), sum(choice["wall_time"]), lengths)
    tokens, seconds = (sum(getattr(answer, name) for answer in answers.values()) for name in ("tokens", "seconds"))
    is_plain = all(length == 1 for answer in answers.values() for length in answer.step_tokens)
    values = {
        "tokens_per_s": spec_bench.tokens_per_s(answers),
        "mean_acceptance_length": spec_bench.mean_accepted_tokens(answers),
        "token_ms": 1000 * seconds / tokens,
        "num_emitted_tokens": float(tokens),
    }
    figures: dict[str, float | list[float]] = {name: value for name, value in values.items() if value is not None}
    uncounted = "an answer holds how many ids each step emitted, not how many were drafted"
    missing = dict.fromkeys(["draft_acceptance_rate", *COUNTS], uncounted) | {
        "expected_acceptance": NO_PROBABILITIES,
        "first_token_ms": "wall_time is that of a whole answer",
        "identical": "answers are texts without token ids",
    }
    settings = _settings(rows[0], {"model": "model_id"}) | {"requests": str(len(answers))}
    settings |= {"failed requests": f"{len(failed)}, left out"} if failed else {}
    return [OtherRun(SPEC_BENCH, path.stem, settings, figures, missing, is_plain, answers)]


Reader = Callable[[Path, list[dict[str, Any]]], list[OtherRun]]
READERS: list[tuple[str, set[str], Reader]] = [  # with the fields by which a file is known
    ("Spec-Bench's answers", {"question_id", "category", "choices"}, _read_spec_bench),
    ("SGLang's bench_serving", {"total_output_tokens_retokenized", "output_throughput"}, _read_sglang_serving),
    ("SGLang's bench_one_batch_server", {"batch_size", "input_len", "output_len", "latency"}, _read_sglang_one_batch),
    ("vLLM's bench serve", {"model_id", "total_output_tokens", "output_throughput"}, _read_vllm),
]
