"""`specdec plan`: the memory that a pair needs on a card, from the configs alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.drafters.resolve import draft_model_of, has_suffix_decoding
from specdec.drafters.suffix import BYTES_PER_ID, MAX_IDS
from specdec.planning.devices import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    MIB,
    card_bytes,
    smallest_card,
    usable_bytes,
)
from specdec.planning.footprint import measure_draft_footprint, measure_footprint
from specdec.planning.formulas import ModelFootprint
from specdec.planning.memory import MemoryPlan, largest_batch, largest_context, plan_memory
from specdec.quant.formats import FP8
from specdec_cli.options import Options

PART_LABELS = {
    "target_weights_bytes": "target weights",
    "draft_weights_bytes": "draft weights",
    "target_kv_bytes": "target KV cache",
    "draft_kv_bytes": "draft KV cache",
    "logits_bytes": "logits, distributions",
    "workspace_bytes": "workspace",
    "total_bytes": "total",
}
BATCHES = (1, 4, 16, 64)
DRAWN_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_ROWS = 8
DEFAULT_CONTEXT = 4096
DEFAULT_LIMIT = 1 << 17  # of contexts, where a config names no limit
PLOT_SUFFIXES = (".svg", ".png", ".pdf")


def run(options: Options) -> int:
    """Plan a call in full precision, with a 4-bit target, and with both in four bits; print and draw it."""
    if options.plot and Path(options.plot).suffix not in PLOT_SUFFIXES:
        raise ValueError(f"--plot {options.plot} must end in {', '.join(PLOT_SUFFIXES)}")
    cards = {card: card_bytes(card) for card in options.card or ()}
    planner = Planner.of(options)
    report = make_report(planner, cards)
    if options.plot:
        draw(options.plot, planner, cards or _smallest_cards(planner))
    if options.json:
        print(json.dumps(report))
    else:
        show(report, planner.plans(), Console())
        if options.plot:
            print(f"drawn: {options.plot}")
    return 0


@dataclass(frozen=True)
class Planner:
    """Plans of one pair and call.

    host_bytes: of the host's memory, for earlier answers that suffix decoding keeps.
    precisions: what is in four bits, as arguments of plan_memory, by its name in the tables.
    """

    target: ModelFootprint
    draft: ModelFootprint | None
    host_bytes: int
    dtype: str
    context: int
    batch: int
    num_draft_tokens: int
    precisions: dict[str, dict[str, bool]]

    @classmethod
    def of(cls, options: Options) -> Planner:
        settings: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "group_size": options.group_size}
        target = measure_footprint(options.target, **settings)
        draft_model = draft_model_of(options.drafter) if options.drafter else None
        draft = None if draft_model is None else measure_draft_footprint(draft_model, options.target, **settings)
        keeps_answers = options.drafter is not None and has_suffix_decoding(options.drafter)
        host_bytes = MAX_IDS * BYTES_PER_ID if keeps_answers else 0
        context = (
            min(DEFAULT_CONTEXT, target.context or DEFAULT_CONTEXT) if options.context is None else options.context
        )
        k = MAX_DRAFT_TOKENS if options.num_draft_tokens is None else options.num_draft_tokens
        precisions = _precisions(target, draft, options.dtype)
        return cls(target, draft, host_bytes, options.dtype, context, options.batch, k, precisions)

    @property
    def main(self) -> str:
        """The precision whose totals are printed."""
        return "4-bit target" if "4-bit target" in self.precisions else next(iter(self.precisions))

    @property
    def contexts(self) -> list[int]:
        """Powers of two up to the model's context, which is the last, and the context of the call."""
        limit = self.target.context or DEFAULT_LIMIT
        powers = [2**power for power in range(4, limit.bit_length()) if 2**power < limit][1 - CONTEXT_ROWS :]
        return sorted({*powers, limit, self.context})

    def plan(self, precision: str, context: int | None = None, batch: int | None = None) -> MemoryPlan:
        return plan_memory(
            self.target,
            self.draft,
            context=self.context if context is None else context,
            batch=self.batch if batch is None else batch,
            num_draft_tokens=self.num_draft_tokens,
            **self.precisions[precision],
        )

    def plans(self) -> dict[str, MemoryPlan]:
        """The call in each precision."""
        return {precision: self.plan(precision) for precision in self.precisions}

    def fit(self, card: str, memory_bytes: int, precision: str) -> dict[str, Any]:
        """The longest context and the largest batch that a card holds."""
        call: dict[str, Any] = {"num_draft_tokens": self.num_draft_tokens, **self.precisions[precision]}
        pair = self.target, self.draft
        return {
            "card": card,
            "usable_bytes": usable_bytes(memory_bytes),
            "weights": precision,
            "largest_context": largest_context(memory_bytes, *pair, batch=self.batch, **call),
            "largest_batch": largest_batch(memory_bytes, *pair, context=self.context, **call),
        }


def make_report(planner: Planner, cards: dict[str, int]) -> dict[str, Any]:
    """What --json prints. cards: their memory; without any, the smallest that hold the plans."""
    target, draft, plans = planner.target, planner.draft, planner.plans()
    models = [model for model in (target, draft) if model]
    batches = sorted({*BATCHES, planner.batch})
    return {
        "target": target.name,
        "draft": draft.name if draft else None,
        "host_bytes": planner.host_bytes,
        "checkpoints": {model.name: model.checkpoint_method for model in models if model.checkpoint_method},
        "expert_bytes": {model.name: model.expert_bytes for model in models if model.expert_bytes},
        "dtype": planner.dtype,
        "context": planner.context,
        "batch": planner.batch,
        "num_draft_tokens": planner.num_draft_tokens,
        "plans": {name: {part: getattr(plan, part) for part in PART_LABELS} for name, plan in plans.items()},
        "smallest_card": {name: smallest_card(plan.total_bytes) for name, plan in plans.items()},
        "totals_of": planner.main,
        "totals": [
            {"context": c, "batch": b, "total_bytes": planner.plan(planner.main, c, b).total_bytes}
            for c in planner.contexts
            for b in batches
        ],
        "cards": [
            planner.fit(card, memory_bytes, precision)
            for card, memory_bytes in (cards or _smallest_cards(planner)).items()
            for precision in planner.precisions
        ],
    }


def _smallest_cards(planner: Planner) -> dict[str, int]:
    names = [smallest_card(plan.total_bytes) for plan in planner.plans().values()]
    return {name: card_bytes(name) for name in names if name}


def show(report: dict[str, Any], plans: dict[str, MemoryPlan], console: Console) -> None:
    """Print the parts, totals by context and batch, and what fits the cards."""
    drafts = f"draft {report['draft']}" if report["draft"] else "no draft model"
    console.print(f"target {report['target']}, {drafts}", soft_wrap=True)
    for name, method in report["checkpoints"].items():
        note = "fp8, planned as its copy in full precision" if method == FP8 else f"in four bits already ({method})"
        console.print(f"{name} is {note}", soft_wrap=True)
    for name, expert_bytes in report["expert_bytes"].items():
        console.print(
            f"the experts of {name}, {expert_bytes / GIB:,.2f} GiB, stay in {report['dtype']} in all of these plans",
            soft_wrap=True,
        )
    if report["host_bytes"]:
        console.print(
            f"suffix decoding keeps earlier answers in the host's memory, up to {report['host_bytes'] / MIB:,.0f} MiB",
            soft_wrap=True,
        )
    unit, scale = ("GiB", GIB) if max(plan.total_bytes for plan in plans.values()) >= GIB else ("MiB", MIB)
    rows = f"{report['batch']:,} row{'s' if report['batch'] > 1 else ''}"
    table = Table(title=f"{unit} at the peak: {rows} of {report['context']:,} tokens, K={report['num_draft_tokens']}")
    table.add_column()
    for name in plans:
        table.add_column(name, justify="right")
    for part, label in PART_LABELS.items():
        if report["draft"] or not part.startswith("draft"):
            last = part == "total_bytes"
            values = (f"{getattr(plan, part) / scale:,.2f}" for plan in plans.values())
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
            "No card of the list holds this; use a shorter context or fewer rows, or give a size with --card."
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
    share, driver = 1 - FRAGMENTATION, CUDA_CONTEXT_BYTES / GIB
    console.print(
        f"Usable is {share:.0%} of a card, less {driver} GiB for the CUDA context."
        " Prompts fill the context, text is sampled."
    )


def draw(file: str, planner: Planner, cards: dict[str, int]) -> None:
    """Total against context and against rows, a line for each precision, and the usable memory of the cards."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('--plot needs matplotlib; pip install "specdec-lossless[experiments]"') from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    batches = sorted({*DRAWN_BATCHES, planner.batch})
    rows = f"{planner.batch:,} row{'s' if planner.batch > 1 else ''}"
    what = (
        ("context", planner.contexts, "tokens of a row at the end of the call", rows),
        ("batch", batches, "rows", f"rows of {planner.context:,} tokens"),
    )
    for axes, (name, values, label, title) in zip(panels, what, strict=True):
        for precision in planner.precisions:
            totals = [planner.plan(precision, **{name: value}).total_bytes / GIB for value in values]
            axes.plot(values, totals, marker="o", label=precision)
        for card, memory_bytes in cards.items():
            height = usable_bytes(memory_bytes) / GIB
            axes.axhline(height, color="gray", linestyle="--", linewidth=1)
            axes.annotate(card, (values[0], height), (0, 3), textcoords="offset points", color="gray", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_xlabel(label)
        axes.set_title(title)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("GiB at the peak")
    panels[0].legend()
    figure.suptitle(f"{Path(planner.target.name).name}, K={planner.num_draft_tokens}")
    figure.savefig(file, dpi=150)


def _precisions(target: ModelFootprint, draft: ModelFootprint | None, dtype: str) -> dict[str, dict[str, bool]]:
    """What can be in four bits, as arguments of plan_memory, by its name in the tables."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    precisions = {f"both {short}" if draft else short: {"target_int4": False}}
    if target.int4_bytes is not None:
        precisions["4-bit target"] = {"target_int4": True}
        if draft and draft.int4_bytes is not None:
            precisions["4-bit both"] = {"target_int4": True, "draft_int4": True}
    return precisions
