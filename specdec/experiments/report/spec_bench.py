"""Spec-Bench's figures, as its leaderboard and the papers that use it tabulate them.

Xia et al., 2024 (arXiv 2401.07851). The formulas are those of evaluation/speed.py in github.com/hemingkx/Spec-Bench: a
mean over questions of each question's tokens per second, where the other figures of a report are ratios of sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.experiments.records import PLAIN, SPECULATIVE, Run
from specdec.experiments.report.formatting import number
from specdec.experiments.report.labels import RunReport
from specdec.experiments.report.tables import NumberTable

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
COLUMNS = {  # of the leaderboard, with the categories of Spec-Bench's questions
    "MT-bench": MT_BENCH,
    "translation": ("translation",),
    "summarization": ("summarization",),
    "QA": ("qa",),
    "math": ("math_reasoning",),
    "RAG": ("rag",),
}
OWN_CATEGORIES = {category for column, held in COLUMNS.items() if column != "MT-bench" for category in held}


@dataclass
class Answer:
    """What one engine answered to one question, all turns together.

    tokens: that were generated. seconds: that it took. step_tokens: ids of each step, the target's own included.
    """

    category: str
    tokens: int = 0
    seconds: float = 0
    step_tokens: list[int] = field(default_factory=list)


Answers = dict[str, Answer]  # by question


def answers_of(run: Run, engine: str) -> Answers:
    """An engine's answers of a run; each repetition is a question of its own, a row's seconds its share of the call."""
    answers: Answers = {}
    for record in run.of(engine):
        answer = answers.setdefault(f"{record.prompt_id}/{record.repetition}", Answer(record.task))
        answer.tokens += len(record.ids)
        answer.seconds += record.seconds.total_s / record.rows
        answer.step_tokens += [step.emitted for step in record.steps]
    return answers


def tokens_per_s(answers: Answers) -> float | None:
    """Mean over questions of tokens / seconds; None without an answer."""
    return float(np.mean([answer.tokens / answer.seconds for answer in answers.values()])) if answers else None


def mean_accepted_tokens(answers: Answers) -> float | None:
    """Mean number of ids that a step emitted, over all steps; None without a step."""
    lengths = [length for answer in answers.values() for length in answer.step_tokens]
    return float(np.mean(lengths)) if lengths else None


def speedup(answers: Answers, plain: Answers) -> float | None:
    """Tokens per second over those of plain decoding, of the questions that both answered; None where there is none."""
    both = answers.keys() & plain.keys()
    rates = [tokens_per_s({question: side[question] for question in both}) for side in (answers, plain)]
    return None if rates[0] is None or rates[1] is None else rates[0] / rates[1]


def speedups_by_column(answers: Answers, plain: Answers) -> dict[str, float | None]:
    """The speedup of each column of the leaderboard, and "overall": of all questions, not a mean of the columns."""
    groups: dict[str, Answers] = defaultdict(dict)
    for question, answer in answers.items():
        for column, categories in COLUMNS.items():
            if answer.category in categories:
                groups[column][question] = answer
    return {column: speedup(groups[column], plain) for column in COLUMNS} | {"overall": speedup(answers, plain)}


def leaderboard(rows: Sequence[tuple[str, Answers, Answers]]) -> NumberTable | None:
    """A row for each (label, answers, plain answers), with the leaderboard's columns.

    None where no answer is to one of Spec-Bench's own categories: MT-bench alone is not Spec-Bench.
    """
    if not any(answer.category in OWN_CATEGORIES for _, answers, _ in rows for answer in answers.values()):
        return None
    texts = []
    for label, answers, plain in rows:
        values = [number(value, "×") for value in speedups_by_column(answers, plain).values()]
        texts.append([label, *values[:-1], number(mean_accepted_tokens(answers)), values[-1]])
    return NumberTable("Spec-Bench: speedup", ["method", *COLUMNS, "mean accepted tokens", "overall"], texts)


def leaderboard_of_reports(reports: Sequence[RunReport]) -> NumberTable | None:
    """The leaderboard's table of runs of specdec; None where their prompts are not Spec-Bench's."""
    return leaderboard(
        [
            (report.label, answers_of(report.run, SPECULATIVE), answers_of(report.run, PLAIN))
            for report in reports
            if report.run.of(SPECULATIVE)
        ]
    )
