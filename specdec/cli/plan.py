"""`specdec plan`: what a pair needs of a card's memory, from the configs alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.planning import footprint as planning
from specdec.planning.footprint import GIB, Footprint, Plan, plan, usable_bytes

PARTS = {
    "target_weights_bytes": "target weights",
    "draft_weights_bytes": "draft weights",
    "target_kv_bytes": "target KV cache",
    "draft_kv_bytes": "draft KV cache",
    "logits_bytes": "logits, distributions",
    "workspace_bytes": "workspace",
    "total_bytes": "total",
}
BATCHES = (1, 4, 16, 64)
CONTEXT_ROWS = 8
DEFAULT_CONTEXT = 4096
FIGURES = (".svg", ".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="a folder or a hub id; of it, nothing but the config is read")
    parser.add_argument("--draft", help="the draft model, likewise; without one, drafting costs no memory")
    parser.add_argument("--context", type=int, help="tokens of a row at the end of a call, its prompt included (4096)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a batch (1)")
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        default=MAX_DRAFT_TOKENS,
        metavar="K",
        help=f"ids proposed a step ({MAX_DRAFT_TOKENS}, the most that auto takes)",
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of what is not in 4 bits"
    )
    parser.add_argument(
        "--group-size", type=int, default=128, help="columns that share a scale: 16 to 256 (128), -1 a row"
    )
    parser.add_argument(
        "--card", action="append", metavar="NAME_OR_SIZE", help="a GPU's name, or its memory as in 24GiB; repeatable"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw total against context; .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> int:
    """Plan a call in full precision, with a 4-bit target, and with both in four bits; print and draw it."""
    if options.plot and Path(options.plot).suffix not in FIGURES:
        raise ValueError(f"--plot {options.plot} must end in {', '.join(FIGURES)}")
    cards = {card: planning.card_bytes(card) for card in options.card or ()}
    settings: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "group_size": options.group_size}
    target = planning.footprint(options.target, **settings)
    draft = planning.footprint(options.draft, **settings) if options.draft else None
    context = min(DEFAULT_CONTEXT, target.context or DEFAULT_CONTEXT) if options.context is None else options.context
    call: dict[str, Any] = {"num_draft_tokens": options.num_draft_tokens}
    forms = _forms(target, draft, options.dtype)
    plans = {
        name: plan(target, draft, context=context, batch=options.batch, **call, **form) for name, form in forms.items()
    }
    smallest = {name: planning.smallest_card(made.total_bytes) for name, made in plans.items()}
    cards = cards or {card: planning.card_bytes(card) for card in smallest.values() if card}

    main = "4-bit target" if "4-bit target" in forms else next(iter(forms))
    contexts = _contexts(target.context or 1 << 17, context)
    batches = sorted({*BATCHES, options.batch})

    def total(context: int, batch: int, form: str) -> int:
        return plan(target, draft, context=context, batch=batch, **call, **forms[form]).total_bytes

    report = {
        "target": target.name,
        "draft": draft.name if draft else None,
        "checkpoints": {
            model.name: model.checkpoint_method for model in (target, draft) if model and model.checkpoint_method
        },
        "dtype": options.dtype,
        "context": context,
        "batch": options.batch,
        "num_draft_tokens": options.num_draft_tokens,
        "plans": {name: {part: getattr(made, part) for part in PARTS} for name, made in plans.items()},
        "smallest_card": smallest,
        "totals_of": main,
        "totals": [{"context": c, "batch": b, "total_bytes": total(c, b, main)} for c in contexts for b in batches],
        "cards": [
            {
                "card": card,
                "usable_bytes": usable_bytes(size),
                "weights": name,
                "largest_context": planning.largest_context(size, target, draft, batch=options.batch, **call, **form),
                "largest_batch": planning.largest_batch(size, target, draft, context=context, **call, **form),
            }
            for card, size in cards.items()
            for name, form in forms.items()
        ],
    }
    if options.plot:
        series = {name: [total(length, options.batch, name) for length in contexts] for name in forms}
        draw(options.plot, report, contexts, series, cards)
    if options.json:
        print(json.dumps(report))
    else:
        show(report, plans, Console())
        if options.plot:
            print(f"drawn: {options.plot}")
    return 0


def show(report: dict[str, Any], plans: dict[str, Plan], console: Console) -> None:
    """Print the parts, totals by context and batch, and what fits the cards."""
    drafts = f"draft {report['draft']}" if report["draft"] else "no draft model"
    console.print(f"target {report['target']}, {drafts}", soft_wrap=True)
    for name, method in report["checkpoints"].items():
        console.print(f"{name} is in four bits already ({method})", soft_wrap=True)
    unit, scale = ("GiB", GIB) if max(made.total_bytes for made in plans.values()) >= GIB else ("MiB", 2**20)
    rows = f"{report['batch']:,} row{'s' if report['batch'] > 1 else ''}"
    table = Table(title=f"{unit} at the peak: {rows} of {report['context']:,} tokens, K={report['num_draft_tokens']}")
    table.add_column()
    for name in plans:
        table.add_column(name, justify="right")
    for part, label in PARTS.items():
        if report["draft"] or not part.startswith("draft"):
            last = part == "total_bytes"
            values = (f"{getattr(made, part) / scale:,.2f}" for made in plans.values())
            table.add_row(label, *values, style="bold" if last else "", end_section=last)
    table.add_row("smallest card", *(report["smallest_card"][name] or "none of the list" for name in plans))
    console.print(table)

    table = Table(title=f"Total {unit}, {report['totals_of']}")
    table.add_column("context", justify="right")
    totals: dict[int, list[str]] = {}
    for entry in report["totals"]:
        totals.setdefault(entry["context"], []).append(f"{entry['total_bytes'] / scale:,.2f}")
    for batch in sorted({entry["batch"] for entry in report["totals"]}):
        table.add_column(f"batch {batch}", justify="right")
    for length, row in totals.items():
        table.add_row(f"{length:,}", *row)
    console.print(table)

    if not report["cards"]:
        console.print(
            "No card of the list holds this; shorten the context, take fewer rows, or give a size with --card."
        )
        return
    table = Table("card", "usable GiB", "weights", title="What fits")
    table.columns[1].justify = "right"
    table.add_column(f"longest context, {rows}", justify="right")
    table.add_column(f"most rows of {report['context']:,}", justify="right")
    for index, entry in enumerate(report["cards"]):
        is_first = index % len(plans) == 0
        card = (entry["card"], f"{entry['usable_bytes'] / GIB:,.2f}") if is_first else ("", "")
        fits = (f"{entry[key]:,}" if entry[key] else "does not fit" for key in ("largest_context", "largest_batch"))
        table.add_row(*card, entry["weights"], *fits)
    console.print(table)
    share, driver = 1 - planning.FRAGMENTATION, planning.CONTEXT_BYTES / GIB
    console.print(
        f"Usable is {share:.0%} of a card, less {driver} GiB for the CUDA context. Prompts fill the context, text is sampled."
    )


def draw(
    file: str, report: dict[str, Any], contexts: list[int], series: dict[str, list[int]], cards: dict[str, int]
) -> None:
    """Total against context, a line for each form, and the cards across."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('--plot needs matplotlib; pip install "specdec-lossless[experiments]"') from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, totals in series.items():
        axes.plot(contexts, [value / GIB for value in totals], marker="o", label=name)
    for card, size in cards.items():
        axes.axhline(usable_bytes(size) / GIB, color="gray", linestyle="--", linewidth=1)
        axes.annotate(
            card, (contexts[0], usable_bytes(size) / GIB), (0, 3), textcoords="offset points", color="gray", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{length:,}" for length in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a row at the end of the call")
    axes.set_ylabel("GiB at the peak")
    axes.set_title(f"{Path(report['target']).name}, {report['batch']} rows, K={report['num_draft_tokens']}")
    axes.legend()
    figure.savefig(file, dpi=150)


def _forms(target: Footprint, draft: Footprint | None, dtype: str) -> dict[str, dict[str, bool]]:
    """What is in four bits, by the name of the form; without those that cannot be had."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    forms = {f"both {short}" if draft else short: {"target_int4": False}}
    if target.int4_bytes is not None:
        forms["4-bit target"] = {"target_int4": True}
        if draft and draft.int4_bytes is not None:
            forms["4-bit both"] = {"target_int4": True, "draft_int4": True}
    return forms


def _contexts(limit: int, asked: int) -> list[int]:
    """Powers of two up to the model's context, which is the last, and what was asked for."""
    powers = [2**power for power in range(4, limit.bit_length()) if 2**power < limit][1 - CONTEXT_ROWS :]
    return sorted({*powers, limit, asked})
