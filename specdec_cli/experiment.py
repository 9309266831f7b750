"""The task of `specdec experiment` and `train-drafter`: a composed config is run, writes records and a report."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from specdec.audit.lossless import Settings
from specdec.experiments.config import AuditConfig, DraftHead, DraftModel, ExperimentConfig
from specdec.experiments.records import Run
from specdec.experiments.report.exports import summary_table
from specdec.experiments.report.labels import read_runs
from specdec.experiments.report.page import render_page
from specdec.experiments.run import device_of, processes, run
from specdec.experiments.workloads import Dataset
from specdec.runtime.loading import load_tokenizer
from specdec.training.config import TrainConfig
from specdec.training.distillation import DraftModelTraining
from specdec.training.train import DRAFTER, HELD_OUT, is_finished, show, train
from specdec_cli.audit_lossless import audit, prompt_ids
from specdec_cli.errors import NotShown, PromptsFailed
from specdec_cli.report import write

RUN = "run"  # in the folder of a training


def build(config: DictConfig) -> ExperimentConfig | AuditConfig | TrainConfig:
    """The run of a composed config; its values must fit the dataclasses that its `_target_`s name."""
    _check(config)
    built: ExperimentConfig | AuditConfig | TrainConfig = instantiate(config, _convert_="object")
    return built


def _check(node: DictConfig) -> None:
    """Where a `_target_` is a dataclass, it is the schema: values are converted to its types, or refused."""
    for value in node.values():
        if isinstance(value, DictConfig):
            _check(value)
    target = get_object(node["_target_"]) if "_target_" in node else None
    if is_dataclass(target):
        plain = {
            str(name): value for name, value in node.items() if name != "_target_" and not isinstance(value, DictConfig)
        }
        checked: Any = OmegaConf.merge(OmegaConf.structured(target), plain)
        for name in plain:
            node[name] = checked[name]


def run_task(config: DictConfig) -> None:
    """One run of a composed config, in the folder that hydra names. Raises PromptsFailed or NotShown."""
    is_main = processes().is_main_process
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    experiment = build(config)
    experiment.folder = Path(HydraConfig.get().runtime.output_dir)
    if isinstance(experiment, AuditConfig):
        _audit(experiment)
        return
    progress = Console(stderr=True, quiet=not is_main, markup=False, highlight=False)
    resumed = None
    if isinstance(experiment, TrainConfig):
        _train(experiment, values, progress)
        if experiment.report_prompts == 0:
            return
        values, resumed = _run_of_trained(experiment, values), "with the same command"
        experiment = build(OmegaConf.create(values))
    assert isinstance(experiment, ExperimentConfig)
    finished = run(experiment, values, progress, resumed)
    if not is_main:  # with an error here the launcher would end the main process before its report is written
        return
    if finished.records:
        _report([finished], experiment.folder)
    if finished.failures:
        first = finished.failures[0]
        failed, total = len(finished.failures), len(finished.failures) + len(finished.records)
        raise PromptsFailed(f"{failed} of {total} calls failed, the first on {first.prompt_id!r}: {first.error}")


def _train(config: TrainConfig, values: dict[str, Any], progress: Console) -> None:
    """One training, and where it trained, no run of the drafter as it was before."""
    was_finished = is_finished(config)
    curve = train(config, values, progress)
    if processes().is_main_process:
        show(curve, config.folder, Console())
        if not was_finished:
            shutil.rmtree(config.folder / RUN, ignore_errors=True)
    processes().wait_for_everyone()


def _run_of_trained(training: TrainConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The config of a run of the drafter that was trained, on held-out prompts, as plain values."""
    kind = DraftModel if isinstance(training.train, DraftModelTraining) else DraftHead
    workload = {"path": str(training.folder / HELD_OUT), "chat_template": values["workload"].get("chat_template")}
    return {
        "_target_": _path_of(ExperimentConfig),
        "name": "held-out prompts",
        **{name: values[name] for name in ("target", "quant", "sampling", "seed", "num_draft_tokens")},
        "drafter": {"_target_": _path_of(kind), "path": str(training.folder / DRAFTER)},
        "workload": {"_target_": _path_of(Dataset), **workload},
        "folder": str(training.folder / RUN),
        "resume": any((training.folder / RUN).glob("records*.jsonl")),
    }


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _audit(config: AuditConfig) -> None:
    """One audit. Raises NotShown where its exit code is not 0."""
    model = config.target.load(device_of(config.target), config.quant)
    prompts = prompt_ids(config.workload, load_tokenizer(config.target.path), config.max_prompt_tokens)
    settings = Settings(
        prompts[: config.max_prompts],
        {
            name: drafter.load(model) if isinstance(drafter, DraftModel | DraftHead) else drafter
            for name, drafter in config.drafters.items()
        },
        num_draft_tokens=tuple(config.num_draft_tokens),
        batch_sizes=tuple(config.batch_sizes),
        prefill_chunks=tuple(config.prefill_chunks),
        max_new_tokens=config.max_new_tokens,
        max_draws=config.max_draws,
        alpha=config.alpha,
        seed=config.seed,
        loop=config.loop,
    )
    if exit_code := audit(model, settings, config.budget_s, config.folder):
        raise NotShown(exit_code)


class SweepReport(Callback):
    """The time that a sweep has left after each run, and one page for all its runs.

    Launchers that run in parallel show what runs in their own ways.
    """

    def __init__(self) -> None:
        self.num_runs = self.num_finished = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.started_s = time.monotonic()
        if config.hydra.launcher._target_.endswith(".BasicLauncher") and processes().is_main_process:
            self.num_runs = num_runs(config.hydra.sweeper.params or {}, config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self.num_finished += 1
        if self.num_runs:
            rest_s = (time.monotonic() - self.started_s) / self.num_finished * (self.num_runs - self.num_finished)
            rest = f"; about {timedelta(seconds=round(rest_s))} left" if self.num_finished < self.num_runs else ""
            print(f"run {self.num_finished} of {self.num_runs} is finished{rest}", file=sys.stderr)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not processes().is_main_process:
            return
        folder = Path(config.hydra.sweep.dir)
        try:
            _report(read_runs([folder]), folder)
        except ValueError as error:  # other workloads, or failed prompts: each run has its own report
            print(f"no report of the whole sweep: {error}", file=sys.stderr)


def num_runs(axes: Mapping[str, str], overrides: Sequence[str]) -> int:
    """Runs of a sweep: every combination of the values of a config's axes, or of the overrides that replace them."""
    parsed = OverridesParser.create().parse_overrides([*(f"{name}={axes[name]}" for name in axes), *overrides])
    counts = {
        override.get_key_element(): len(list(override.sweep_string_iterator())) if override.is_sweep_override() else 1
        for override in parsed
    }
    return math.prod(counts.values())


def _report(runs: list[Run], folder: Path) -> None:
    file, console = folder / "report.html", Console()
    write(file, render_page(runs))
    console.print(summary_table(runs))
    console.print(f"report: {file}", soft_wrap=True)
