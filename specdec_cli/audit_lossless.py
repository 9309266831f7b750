"""`specdec audit lossless MODEL`: a certificate of whether speculation changes the answers of a model."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from specdec.audit.certificate import Certificate
from specdec.audit.findings import FAULTY, LOSSLESS, ROUNDING, e_value
from specdec.audit.lossless import Settings, audit_lossless
from specdec.audit.page import render_page
from specdec.audit.server import ServerCertificate, ServerSettings, audit_server
from specdec.audit.work import OnProgress
from specdec.drafters.head_checkpoint import is_head
from specdec.drafters.resolve import draft_model_of, load_drafter
from specdec.experiments.workloads import Dataset, Stdlib, Workload, encode, uses_chat_template
from specdec.pages import require_jinja2
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec_cli.options import Options

MAX_PROMPT_TOKENS = 128
Work = Callable[[OnProgress], Certificate | ServerCertificate]
STYLES = {LOSSLESS: "bold green", ROUNDING: "bold green", FAULTY: "bold red"}


def run(options: Options) -> int:
    """Audit a model, or a server; 0 where it is lossless, 1 where it is not, 3 where the run does not tell."""
    for name in ("max_prompts", "max_new_tokens", "max_draws", "budget"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be positive")
    if options.first_prompt < 0:
        raise ValueError(f"--first-prompt {options.first_prompt} must be 0 or more")
    if not 0 < options.alpha < 1:
        raise ValueError(f"--alpha {options.alpha} must lie between 0 and 1")
    for name in ("batch", "prefill_chunk"):
        values = getattr(options, name)
        if any(size is not None and size < 1 for size in values):
            given = ",".join("whole" if size is None else str(size) for size in values)
            raise ValueError(f"--{name.replace('_', '-')} {given} must be whole numbers, 1 or more")
    if (options.reference is None) != (options.candidate is None):
        raise ValueError("--reference and --candidate go together: URLs of servers without and with speculation")
    if (options.model is None) == (options.candidate is None):
        raise ValueError("an audit takes either MODEL, or --reference and --candidate with the URLs of two servers")
    folder = None if options.output is None else Path(options.output)
    if options.model is None:
        return finish(_server_audit(options, folder), options.budget, folder, options.json)
    with _progress() as progress:
        progress.add_task(f"loading {options.model}", total=None)
        model, settings = _load(options)
    return audit(model, settings, options.budget, folder, as_json=options.json)


def _load(options: Options) -> tuple[PreTrainedModel, Settings]:
    dtype = options.dtype or ("float32" if options.device == "cpu" else "auto")
    model = load(options.model, dtype, options.device)
    prompts = prompt_ids(workload_of(options.prompts), load_tokenizer(options.model))
    settings = Settings(
        prompts[options.first_prompt :][: options.max_prompts],
        {name: _load_drafter(name, model, dtype) for name in options.drafter or _default_drafters(options.model)},
        num_draft_tokens=options.num_draft_tokens,
        batch_sizes=options.batch,
        prefill_chunks=options.prefill_chunk,
        max_new_tokens=options.max_new_tokens,
        max_draws=options.max_draws,
        alpha=options.alpha,
        seed=options.seed,
        loop=options.loop,
        first_prompt=options.first_prompt,
        command=_command(options, {"dtype": None, "device": "cpu", "loop": "specdec"}, options.model),
    )
    return model, settings


def _server_audit(options: Options, folder: Path | None) -> Work:
    texts = [prompt.turns[0] for prompt in workload_of(options.prompts).prompts()]
    settings = ServerSettings(
        texts[options.first_prompt :][: options.max_prompts],
        model=options.server_model,
        max_new_tokens=options.max_new_tokens,
        load=options.load,
        max_draws=options.max_draws,
        alpha=options.alpha,
        seed=options.seed,
        first_prompt=options.first_prompt,
        command=_command(options, {"reference": None, "candidate": None, "server_model": None, "load": 8}),
    )
    return lambda on_progress: audit_server(
        options.reference,
        options.candidate,
        settings,
        budget_s=options.budget,
        folder=folder,
        on_progress=on_progress,
    )


def audit(
    model: PreTrainedModel, settings: Settings, budget_s: float, folder: Path | None, *, as_json: bool = False
) -> int:
    """Audit a model with a progress bar, write its certificate to the folder, and print it; its exit code."""

    def work(on_progress: OnProgress) -> Certificate:
        return audit_lossless(model, settings, budget_s=budget_s, folder=folder, on_progress=on_progress)

    return finish(work, budget_s, folder, as_json)


def finish(work: Work, budget_s: float, folder: Path | None, as_json: bool) -> int:
    """Do the work of an audit with a progress bar, write its certificate to the folder, and print it; its exit code."""
    if folder is not None:
        require_jinja2()
    with _progress() as progress:
        task = progress.add_task("", total=budget_s)
        certificate = work(lambda what, seconds: progress.update(task, completed=seconds, description=what))
    if folder is not None:
        (folder / "certificate.json").write_text(json.dumps(certificate.to_json(), indent=1) + "\n", encoding="utf-8")
        (folder / "certificate.html").write_text(render_page(certificate), encoding="utf-8")
    if as_json:
        print(json.dumps(certificate.to_json()))
    else:
        show(certificate, folder, Console())
    return certificate.exit_code


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _command(options: Options, defaults: dict[str, Any], *what: str) -> str:
    """The command without what a divergence's own names: settings, drafter and prompts."""
    defaults = {"prompts": None, **defaults}
    changed = [
        f"--{name.replace('_', '-')} {shlex.quote(str(getattr(options, name)))}"
        for name, default in defaults.items()
        if getattr(options, name) != default
    ]
    return " ".join(["specdec audit lossless", *map(shlex.quote, what), *changed])


def workload_of(path: str | None) -> Workload:
    """The prompts of a file or of a dataset on the hub; None: the embedded pair's."""
    return Stdlib() if path is None else Dataset(path)


def prompt_ids(workload: Workload, tokenizer: Any, max_prompt_tokens: int = MAX_PROMPT_TOKENS) -> list[list[int]]:
    """The first turns of a workload as ids; of a longer one the last max_prompt_tokens.

    They go through the tokenizer's chat template where it has one.
    """
    as_chat = uses_chat_template(workload, tokenizer)
    return [encode(prompt.turns[:1], [], tokenizer, as_chat)[-max_prompt_tokens:] for prompt in workload.prompts()]


def _load_drafter(name: str, model: PreTrainedModel, dtype: str) -> Any:
    """A draft model as it is, which transformers' loop takes too, or a drafter."""
    is_model = draft_model_of(name) == name and not is_head(name, model.config)
    return load(name, dtype, str(model.device)) if is_model else load_drafter(name, model, dtype)


def _default_drafters(model: str) -> list[str]:
    is_embedded = Path(model).resolve() == embedded.TARGET.resolve()
    without_model = ["prompt_lookup", "suffix"]
    return [os.path.relpath(embedded.DRAFT), *without_model] if is_embedded else without_model


def show(certificate: Certificate | ServerCertificate, folder: Path | None, console: Console) -> None:
    """Print the verdict, then what it rests on."""
    console.print(f"\n{certificate.verdict}", style=STYLES.get(certificate.verdict, "bold yellow"), highlight=False)
    for reason in certificate.reasons:
        console.print(f"  {reason}", highlight=False)
    greedy = Table(title="greedy texts that are plain decoding's", title_justify="left")
    header, rows = certificate.greedy_table()
    for name in header:
        is_first = name == header[0]
        greedy.add_column(name, justify="left" if is_first else "right", no_wrap=not is_first, overflow="fold")
    for row in rows:
        greedy.add_row(*row)
    console.print(greedy)
    sampling = Table(title="sampled ids, against the law of plain decoding", title_justify="left")
    for name in ("positions, kinds of call", "ids", "e-value"):
        sampling.add_column(name, justify="left" if name.startswith("positions") else "right")
    for part in (certificate.sampled.groups, certificate.sampled.calls):
        for entry in part:
            value = e_value(entry.log_e) if entry.num_ids else ""
            sampling.add_row(entry.what, f"{entry.num_ids:,}", value, end_section=entry is part[-1])
    console.print(sampling)
    console.print(certificate.sampled.summary, highlight=False)
    controls = Table(title="mistakes that are made on purpose", title_justify="left")
    for name in ("a loop that …", "found", "after ids", "by"):
        controls.add_column(name, justify="right" if name == "after ids" else "left")
    for control in certificate.controls:
        found = {True: "yes", False: "NO", None: "–"}[control.found]
        controls.add_row(control.what, found, f"{control.num_ids:,}", control.evidence)
    console.print(controls)
    if isinstance(certificate, ServerCertificate):
        for limit in certificate.limits:
            console.print(f"Not shown: {limit}", highlight=False)
    elif certificate.widths is not None:
        console.print(certificate.widths_summary, highlight=False)
    if folder is not None:
        console.print(f"certificate: {folder / 'certificate.html'}", highlight=False)
