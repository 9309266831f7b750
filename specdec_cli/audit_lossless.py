"""`specdec audit lossless MODEL`: a certificate of whether speculation changes the answers of a model."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from specdec.audit.certificate import FAULTY, LOSSLESS, ROUNDING, Certificate, e_value
from specdec.audit.lossless import Settings, audit_lossless
from specdec.audit.page import render_page
from specdec.drafters.resolve import NAMED_DRAFTERS
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded

MAX_PROMPT_TOKENS = 128
STYLES = {LOSSLESS: "bold green", ROUNDING: "bold green", FAULTY: "bold red"}


def run(options: argparse.Namespace) -> int:
    """Audit the model; 0 where it is lossless, 1 where it is not, 3 where the run does not tell."""
    for name in ("max_prompts", "max_new_tokens", "max_draws", "budget"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be positive")
    if options.first_prompt < 0:
        raise ValueError(f"--first-prompt {options.first_prompt} must be 0 or more")
    if not 0 < options.alpha < 1:
        raise ValueError(f"--alpha {options.alpha} must lie between 0 and 1")
    if any(size < 1 for size in options.batch):
        raise ValueError(f"--batch {','.join(map(str, options.batch))} must be whole numbers, 1 or more")
    dtype = options.dtype or ("float32" if options.device == "cpu" else "auto")
    texts = read_prompts(options.prompts)[options.first_prompt :][: options.max_prompts]
    folder = None if options.output is None else Path(options.output)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"loading {options.model}", total=None)
        model = load(options.model, dtype, options.device)
        tokenizer = load_tokenizer(options.model)
        prompts = [tokenizer(text).input_ids[-MAX_PROMPT_TOKENS:] for text in texts]
        settings = Settings(
            prompts,
            {
                name: name if name in NAMED_DRAFTERS else load(name, dtype, options.device)
                for name in options.drafter or _default_drafters(options.model)
            },
            num_draft_tokens=options.num_draft_tokens,
            batch_sizes=options.batch,
            max_new_tokens=options.max_new_tokens,
            max_draws=options.max_draws,
            alpha=options.alpha,
            seed=options.seed,
            loop=options.loop,
            first_prompt=options.first_prompt,
            command=_command(options),
        )
        progress.update(task, total=options.budget)
        certificate = audit_lossless(
            model,
            settings,
            budget_s=options.budget,
            folder=folder,
            on_progress=lambda what, seconds: progress.update(task, completed=seconds, description=what),
        )
    if folder is not None:
        (folder / "certificate.json").write_text(json.dumps(certificate.to_json(), indent=1) + "\n", encoding="utf-8")
        (folder / "certificate.html").write_text(render_page(certificate), encoding="utf-8")
    if options.json:
        print(json.dumps(certificate.to_json()))
    else:
        show(certificate, folder, Console())
    return certificate.exit_code


def _command(options: argparse.Namespace) -> str:
    """The command without what a divergence's own names: settings, drafter and prompts."""
    chosen = {name: getattr(options, name) for name in ("prompts", "dtype", "device", "loop")}
    defaults = {"prompts": None, "dtype": None, "device": "cpu", "loop": "specdec"}
    changed = [f"--{name} {shlex.quote(value)}" for name, value in chosen.items() if value != defaults[name]]
    return " ".join(["specdec audit lossless", shlex.quote(options.model), *changed])


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a file; of several turns the first. Raises ValueError where there are none."""
    if path is None:
        return [prompt["prompt"] for prompt in embedded.prompts()]
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from error
    texts = [_prompt_of(line) if path.endswith((".jsonl", ".json")) else line for line in lines]
    if not texts or not all(texts):
        raise ValueError(f"--prompts {path} has no prompts: it must hold lines of text, or JSON lines with `prompt`")
    return [text for text in texts if text]


def _prompt_of(line: str) -> str | None:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        return None
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    return first if isinstance(first, str) else None


def _default_drafters(model: str) -> list[str]:
    is_embedded = Path(model).resolve() == embedded.TARGET.resolve()
    return [os.path.relpath(embedded.DRAFT), "prompt_lookup"] if is_embedded else ["prompt_lookup"]


def show(certificate: Certificate, folder: Path | None, console: Console) -> None:
    """Print the verdict, then what it rests on."""
    console.print(f"\n{certificate.verdict}", style=STYLES.get(certificate.verdict, "bold yellow"), highlight=False)
    for reason in certificate.reasons:
        console.print(f"  {reason}", highlight=False)
    greedy = Table(title="greedy texts, against plain decoding", title_justify="left")
    for name in ("drafter", "K", "batch", "texts", "identical", "95 % interval"):
        greedy.add_column(name, justify="left" if name == "drafter" else "right")
    for row in certificate.greedy:
        greedy.add_row(
            row.drafter, str(row.num_draft_tokens), str(row.batch_size), str(row.texts), str(row.identical),
            f"{row.interval[0]:.1%} to {row.interval[1]:.1%}",
        )  # fmt: skip
    console.print(greedy)
    sampling = Table(title="sampled ids, against the law of plain decoding", title_justify="left")
    for name in ("positions, kinds of call", "ids", "e-value"):
        sampling.add_column(name, justify="left" if name.startswith("positions") else "right")
    for entry in certificate.sampling:
        sampling.add_row(
            entry.group,
            f"{entry.num_ids:,}",
            e_value(entry.log_e) if entry.num_ids else "",
            end_section=entry is certificate.sampling[-1],
        )
    for call in certificate.calls:
        sampling.add_row(call.what, f"{call.num_ids:,}", e_value(call.log_e) if call.num_ids else "")
    console.print(sampling)
    console.print(certificate.sampling_summary, highlight=False)
    controls = Table(title="loops that are broken on purpose", title_justify="left")
    for name in ("this loop …", "found", "after ids", "by"):
        controls.add_column(name, justify="right" if name == "after ids" else "left")
    for control in certificate.controls:
        found = {True: "yes", False: "NO", None: "–"}[control.found]
        controls.add_row(control.what, found, f"{control.num_ids:,}", control.evidence)
    console.print(controls)
    if certificate.widths is not None:
        console.print(certificate.widths_summary, highlight=False)
    if folder is not None:
        console.print(f"certificate: {folder / 'certificate.html'}", highlight=False)
