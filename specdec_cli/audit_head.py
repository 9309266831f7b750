"""`specdec audit head MODEL HEAD`: is a draft head run as it was trained?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

import specdec
from specdec.audit.head import HeadAudit, audit_head
from specdec.drafters.head_checkpoint import is_head, load_head
from specdec.quant.checkpoints import named_errors
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils.provenance import provenance
from specdec_cli.audit_lossless import prompt_ids, workload_of
from specdec_cli.options import Options

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def run(options: Options) -> int:
    """Try the settings of a head; 1 where another one is better or hidden states do not help, 3 for too few texts."""
    if options.max_prompts < 1 or options.max_new_tokens < 4:
        raise ValueError("--max-prompts must be 1 or more, --max-new-tokens 4 or more")
    target = load(options.model, options.dtype or "auto", options.device)
    with named_errors(f"{options.head} cannot be audited"):
        if not is_head(options.head, target.config):
            raise ValueError(f"it holds no draft head for {options.model}")
        head = load_head(options.head, target)
    prompts = prompt_ids(workload_of(options.prompts), load_tokenizer(options.model))[: options.max_prompts]
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("texts", total=len(prompts))
        texts = _texts(target, prompts, options, lambda: progress.advance(task))
        task = progress.add_task("settings", total=None)
        audit = audit_head(target, head, texts, lambda done, total: progress.update(task, completed=done, total=total))
    if options.json:
        content = asdict(audit) | {"passed": audit.passed, "verdict": audit.verdict, "head": head.description()}
        print(json.dumps(content | {"provenance": provenance(options.device)}))
    else:
        show(audit, head.description(), Console())
    return {True: 0, False: 1, None: 3}[audit.passed]


def show(audit: HeadAudit, what: str, console: Console) -> None:
    """Print the table and the verdict."""
    console.print(f"{what}; {audit.num_positions:,} positions of texts that the target wrote", highlight=False)
    table = Table()
    table.add_column("setting")
    for name in ("accepted", "change", "standard errors"):
        table.add_column(name, justify="right")
    table.add_row(audit.as_it_is.what, f"{audit.as_it_is.acceptance:.1%}", "", "")
    for reading in (audit.without_states, *audit.changes):
        what = "without the target's hidden states" if reading is audit.without_states else reading.what
        style = "bold red" if reading.is_better else None
        table.add_row(
            what, f"{reading.acceptance:.1%}", f"{100 * reading.difference:+.2f}", f"{reading.z:+.1f}", style=style
        )
    console.print(table)
    style = {True: "bold green", False: "bold red", None: "bold yellow"}[audit.passed]
    console.print(audit.verdict, style=style, highlight=False)


def _texts(target: PreTrainedModel, prompts: list[list[int]], options: Any, on_text: Any) -> list[list[int]]:
    """What the target writes behind each prompt, sampled at temperature 1, the prompt included."""
    specdec.enable(target, "none")
    torch.manual_seed(options.seed)
    texts = []
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=target.device)
            model: Any = target
            text = model.generate(ids, max_new_tokens=options.max_new_tokens, pad_token_id=0, **SAMPLED)
            texts.append(text[0].tolist())
            on_text()
    finally:
        specdec.disable(target)
    return texts
