"""The runs of a report, and labels that distinguish them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.core.stats import Choice
from specdec.drafters.resolve import AUTO
from specdec.experiments.records import SPECULATIVE, Run, files_of, read_run
from specdec.experiments.report.compare import Difference, check_comparable, compare_runs
from specdec.experiments.report.figures import Figures, figures
from specdec.experiments.report.what_if import Measurement

SHORT_NAMES = {"num_draft_tokens": "K", "sampling.temperature": "T", "batch_size": "batch"}
IGNORED_KEYS = ("folder", "resume", "name")  # runs that differ only in these have the same config


@dataclass(frozen=True)
class RunReport:
    """A run, its figures, and its label. measurements: of the runs that share its config but for a constant K."""

    label: str
    run: Run
    figures: Figures
    measurements: list[Measurement]

    @property
    def config(self) -> dict[str, Any]:
        return self.run.header.config

    @property
    def sampling(self) -> dict[str, Any]:
        sampling: dict[str, Any] = self.config["sampling"]
        return sampling


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of run folders, record files and sweep folders; those of a sweep in the order of their numbers."""
    runs = []
    for path in paths:
        inner = [] if path.is_file() or files_of(path) else [folder for folder in path.glob("*") if files_of(folder)]
        runs += [read_run(folder) for folder in sorted(inner, key=_sweep_order) or [path]]
    return runs


def build_reports(runs: Sequence[Run]) -> list[RunReport]:
    """A report of each run; raises ValueError where runs can't be compared or have no record."""
    for other in runs[1:]:
        check_comparable(runs[0], other)
    all_figures = [figures(run) for run in runs]

    def measurements(run: Run) -> list[Measurement]:
        return [
            Measurement(int(k), its.metrics["mean_acceptance_length"], its.metrics["speedup"], other is run)
            for other, its, k in zip(runs, all_figures, map(k_of, runs), strict=True)
            if other.of(SPECULATIVE) and k != AUTO and not differing_keys([run, other]) - {"num_draft_tokens"}
        ]

    return [
        RunReport(label, run, its, measurements(run))
        for label, run, its in zip(labels(runs), runs, all_figures, strict=True)
    ]


def labels(runs: Sequence[Run]) -> list[str]:
    """The settings in which each run differs from the others; their names where these do not distinguish them."""
    differing = differing_keys(runs)
    groups = _shown_by_name(differing)
    by_settings = [_settings_label(run, differing, groups) for run in runs]
    if len(set(by_settings)) == len(runs) and all(by_settings):
        return by_settings
    names = [str(run.header.config.get("name", run.folder.name)) for run in runs]
    if len(set(names)) == len(runs):
        return names
    return [f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]


def series_by_k(reports: Sequence[RunReport]) -> dict[str, list[tuple[int, RunReport]]]:
    """Runs with a constant K by their other settings, in the order of K; {} where no settings have two values of K."""
    differing = differing_keys([report.run for report in reports])
    groups = _shown_by_name(differing)
    series: dict[str, list[tuple[int, RunReport]]] = {}
    for report in reports:
        k = k_of(report.run)
        if k != AUTO and report.run.of(SPECULATIVE):
            label = _settings_label(report.run, differing - {"num_draft_tokens"}, groups)
            series.setdefault(label, []).append((int(k), report))
    if not any(len({k for k, _ in line}) > 1 for line in series.values()):
        return {}
    return {label: sorted(line, key=lambda pair: pair[0]) for label, line in series.items()}


def changes_from_first(reports: Sequence[RunReport]) -> list[tuple[RunReport, dict[str, Difference]]]:
    """Each further run with the differences from the first run to it."""
    return [(report, compare_runs(reports[0].run, report.run)) for report in reports[1:]]


def differing_keys(runs: Sequence[Run]) -> set[str]:
    """Full names of the settings in which the runs' configs differ."""
    flat = [run.header.flat() for run in runs]
    names = {name for values in flat for name in values if name.partition(".")[0] not in IGNORED_KEYS}
    return {name for name in names if any(values.get(name) != flat[0].get(name) for values in flat)}


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of the prompts and of the config, equal for runs of the same ones; folder and name do not count."""
    prompts = sorted({(r.prompt_id, r.prompt_hash) for r in run.records if r.turn == 0})
    config = sorted((name, str(value)) for name, value in run.header.flat().items() if name not in IGNORED_KEYS)
    return {
        "prompts_sha256": hashlib.sha256(repr(prompts).encode()).hexdigest(),
        "config_sha256": hashlib.sha256(repr(config).encode()).hexdigest(),
    }


def display_name(group: Any) -> str:
    """A model by its hub id or the end of its path, another object by its class: "prompt lookup"."""
    if not isinstance(group, dict):
        return str(group)
    if path := group.get("path"):
        return "/".join(Path(str(path)).parts[-2:])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(group.get("_target_", "")).rpartition(".")[2]).lower()


def k_of(run: Run) -> int | str:
    """The configured K, or "auto"."""
    k: int | str = run.header.config["num_draft_tokens"]
    return k if k == AUTO else int(k)


def choice_of(run: Run) -> Choice | None:
    """The choices of K of all calls of a run with "auto", averaged by their steps; None where there is none.

    Its speedups are the controller's own, over plain steps; the run's is over the calls of the plain engine.
    """
    by_call = {(r.turn, r.repetition, r.call): r.choice for r in run.of(SPECULATIVE)}
    choices = [choice for choice in by_call.values() if choice and choice.predicted_speedup and choice.measured_speedup]
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


def is_sampled(report: RunReport) -> bool:
    return bool(report.sampling.get("temperature"))


def is_interrupted(run: Run) -> bool:
    """Whether the run was cut off in a line, or its processes' files were not merged."""
    return run.torn or any(run.folder.glob("records-*.jsonl"))


def has_format_1_counts(run: Run) -> bool:
    """Whether the run was recorded in format 1, whose counts follow other definitions than the figures here."""
    return run.header.version == 1


def _shown_by_name(differing: set[str]) -> set[str]:
    """The groups of settings that a label shows as a whole, since their models or classes differ."""
    return {group for group in ("target", "drafter", "workload") if differing & {f"{group}._target_", f"{group}.path"}}


def _settings_label(run: Run, differing: set[str], groups: set[str]) -> str:
    """differing: names of settings. groups: those shown by their display name as a whole."""
    values = run.header.flat()
    parts = [f"{group} {display_name(run.header.config[group])}" for group in sorted(groups)]
    for name in sorted(differing):
        if name.partition(".")[0] not in groups and name in values:
            parts.append(f"{SHORT_NAMES.get(name, name.rpartition('.')[2])}={values[name]}")
    return ", ".join(parts)


def _sweep_order(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else 0, folder.name)
