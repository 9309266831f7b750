"""The runs of a report, and what tells one from another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.core.stats import Choice
from specdec.drafters.resolve import AUTO
from specdec.experiments.records import SPECULATIVE, Run, files_of, read_run
from specdec.experiments.report.figures import COLUMN, Difference, Figures, check_comparable, compare, figures, tally
from specdec.experiments.report.plots import Measured

SHORT = {"num_draft_tokens": "K", "sampling.temperature": "T"}
OF_NO_ACCOUNT = ("folder", "resume", "name")  # two runs that differ in these alone are of one config


@dataclass(frozen=True)
class Reported:
    """A run, its figures, and what tells it from the others. measured: the runs of its config with one K, whichever."""

    label: str
    run: Run
    figures: Figures
    measured: list[Measured]

    @property
    def config(self) -> dict[str, Any]:
        return self.run.header.config

    @property
    def sampling(self) -> dict[str, Any]:
        sampling: dict[str, Any] = self.config["sampling"]
        return sampling


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of run folders, record files and sweeps' folders, which hold run folders, in the order of their numbers."""
    runs = []
    for path in paths:
        inner = [] if path.is_file() or files_of(path) else [folder for folder in path.glob("*") if files_of(folder)]
        runs += [read_run(folder) for folder in sorted(inner, key=_numbered) or [path]]
    return runs


def to_report(runs: Sequence[Run]) -> list[Reported]:
    for other in runs[1:]:
        check_comparable(runs[0], other)
    made = [figures(run) for run in runs]

    def measured(run: Run) -> list[Measured]:
        return [
            Measured(int(k), its.metrics["mean_acceptance_length"], its.metrics["speedup"], other is run)
            for other, its, k in zip(runs, made, map(k_of, runs), strict=True)
            if other.of(SPECULATIVE) and k != AUTO and not differing_in([run, other]) - {"num_draft_tokens"}
        ]

    return [Reported(label, run, its, measured(run)) for label, run, its in zip(labels(runs), runs, made, strict=True)]


def labels(runs: Sequence[Run]) -> list[str]:
    """What each run differs from the others in, or its name."""
    names = [str(run.header.config.get("name", run.folder.name)) for run in runs]
    differing = differing_in(runs)
    whole = {group for group in ("target", "drafter", "workload") if differing & {f"{group}._target_", f"{group}.path"}}
    told = []
    for run in runs:
        values = run.header.flat()
        parts = [f"{group} {called(run.header.config[group])}" for group in sorted(whole)]
        for name in sorted(differing):
            if name.partition(".")[0] not in whole and name in values:
                value = values[name]
                parts.append(f"{SHORT.get(name, name.rpartition('.')[2])}={value}")
        told.append(", ".join(parts))
    if len(set(told)) == len(runs) and all(told):
        return told
    return (
        names
        if len(set(names)) == len(runs)
        else [f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]
    )


def changes_from_first(reported: Sequence[Reported]) -> list[tuple[Reported, dict[str, Difference]]]:
    return [(one, compare(reported[0].run, one.run)) for one in reported[1:]]


def identical(run: Run) -> tuple[int, int]:
    """Texts that are plain decoding's, of those that are compared: greedy ones with a plain one beside them."""
    sums = sum(tally(run).values())
    return int(sums[COLUMN["identical"]]), int(sums[COLUMN["paired"]])  # type: ignore[index]


def differing_in(runs: Sequence[Run]) -> set[str]:
    """Names of what the runs' configs differ in."""
    flat = [run.header.flat() for run in runs]
    names = {name for values in flat for name in values if name.partition(".")[0] not in OF_NO_ACCOUNT}
    return {name for name in names if any(values.get(name) != flat[0].get(name) for values in flat)}


def called(group: Any) -> str:
    """A model by its hub id or the end of its path, another object by its class: "prompt lookup"."""
    if not isinstance(group, dict):
        return str(group)
    if path := group.get("path"):
        return "/".join(Path(str(path)).parts[-2:])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(group.get("_target_", "")).rpartition(".")[2]).lower()


def k_of(run: Run) -> int | str:
    """K of a run's steps, or "auto"."""
    k: int | str = run.header.config["num_draft_tokens"]
    return k if k == AUTO else int(k)


def choice_of(run: Run) -> Choice | None:
    """What the calls of a run with "auto" came to together; the speed that was measured against plain steps, not plain calls."""
    of_calls = {(r.turn, r.repetition, r.call): r.choice for r in run.of(SPECULATIVE)}
    choices = [
        choice for choice in of_calls.values() if choice and choice.predicted_speedup and choice.measured_speedup
    ]
    if not choices:
        return None
    steps = [sum(choice.steps_by_k) for choice in choices]

    def weighted(values: Iterable[float]) -> float:
        return sum(value * weight for value, weight in zip(values, steps, strict=True)) / sum(steps)

    return replace(
        choices[0],
        steps_by_k=[sum(counts) for counts in zip(*(choice.steps_by_k for choice in choices), strict=True)],
        acceptance=weighted(choice.acceptance for choice in choices),
        predicted_speedup=weighted(choice.predicted_speedup or 0 for choice in choices),
        measured_speedup=weighted(choice.measured_speedup or 0 for choice in choices),
        profile_s=None,
    )


def is_sampled(one: Reported) -> bool:
    return bool(one.sampling.get("temperature"))


def is_interrupted(run: Run) -> bool:
    return run.torn or any(run.folder.glob("records-*.jsonl"))


def is_of_older_format(run: Run) -> bool:
    return run.header.version == 1


def _numbered(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else 0, folder.name)
