"""`specdec audit quality MODEL`: the quality that four bits cost, on a text of your own."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from specdec.audit.quality import Quality, compare_quality
from specdec.quant.layers import is_4bit
from specdec.quant.quantizer import quantize
from specdec.runtime.loading import load, load_tokenizer
from specdec.runtime.runner import context_of
from specdec.utils.provenance import provenance
from specdec_cli.options import Options
from specdec_cli.quantize import int4_config, weight_bytes


def run(options: Options) -> int:
    """Read a text with both models; 1 where the mean KL is above --max-kl."""
    text = Path(options.text)
    if not text.is_file():
        raise ValueError(f"--text {text} is no file; name a plain text, like what the model will write")
    if options.context < 2 or (options.max_tokens is not None and options.max_tokens < 2):
        raise ValueError("--context and --max-tokens must be 2 or more: one token to read, one to predict")
    dtype = options.dtype or ("float32" if options.device == "cpu" else "auto")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task(f"loading {options.model}", total=None)
        original, quantized = _pair(options, dtype)
        widths = [model.config.get_text_config(decoder=True).vocab_size for model in (original, quantized)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"the original's vocabulary has {widths[0]} ids, the 4-bit model's {widths[1]}; are they a pair?"
            )
        tokenizer = load_tokenizer(options.original or options.model)
        windows = _windows(
            text, tokenizer, min(options.context, context_of(original) or options.context), options.max_tokens
        )
        quality = Quality()
        progress.update(task, total=options.max_tokens or sum(len(ids) for ids in _lines(text, tokenizer)))
        for quality in compare_quality(original, quantized, windows):
            progress.update(task, completed=quality.positions, description=f"KL {quality.mean_kl:.4f} nats")
    if quality.predicted == 0:
        raise ValueError(f"{text} has fewer than two tokens; nothing can be measured on it")

    report = {
        "provenance": provenance(options.device) | {"dtype": dtype},
        "model": options.model,
        "original": options.original or options.model,
        "text": str(text),
        "tokens": quality.positions,
        "perplexity": quality.perplexity,
        "original_perplexity": quality.original_perplexity,
        "mean_kl": quality.mean_kl,
        "top1_agreement": quality.top1_agreement,
        "bytes_on_disk": weight_bytes(options.model) if options.original else None,
        "original_bytes_on_disk": weight_bytes(options.original or options.model) or None,
        "bytes_in_memory": bytes_in_memory(quantized),
        "original_bytes_in_memory": bytes_in_memory(original),
        "max_kl": options.max_kl,
        "passed": None if options.max_kl is None else quality.mean_kl <= options.max_kl,
    }
    if options.json:
        print(json.dumps(report))
    else:
        show(report, Console())
    return 1 if report["passed"] is False else 0


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table, and the verdict where there is a gate."""
    table = Table(title=f"{report['tokens']:,} tokens of {report['text']}")
    table.add_column()
    table.add_column("original", justify="right")
    table.add_column("4-bit", justify="right")
    table.add_column("change", justify="right")

    def megabytes(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e6:,.1f} MB"

    for name, key in (("perplexity", "perplexity"), ("on disk", "bytes_on_disk"), ("in memory", "bytes_in_memory")):
        before, after = report[f"original_{key}"], report[key]
        format_value = "{:.3f}".format if key == "perplexity" else megabytes
        change = "" if before is None or after is None else f"{after / before - 1:+.1%}"
        table.add_row(name, format_value(before), format_value(after), change)
    console.print(table)
    console.print(f"mean KL(original || 4-bit): {report['mean_kl']:.4f} nats a token")
    console.print(f"top-1 agreement: {report['top1_agreement']:.1%}")
    if report["passed"] is not None:
        verdict = "passed" if report["passed"] else "failed"
        console.print(f"--max-kl {report['max_kl']}: {verdict}", style="bold green" if report["passed"] else "bold red")


def bytes_in_memory(model: PreTrainedModel) -> int:
    """Parameters and buffers, each counted once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def _pair(options: Options, dtype: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The original and the 4-bit model: two checkpoints, or one that is quantized here."""
    quantized = load(options.model, dtype, options.device)
    if is_4bit(quantized):
        if options.original is None:
            raise ValueError(f"{options.model} is in 4 bits; name the model that it was made from with --original")
        return load(options.original, dtype, options.device), quantized
    if options.original is not None:
        raise ValueError(
            f"{options.model} is in full precision; leave --original out, and it is compared with its own 4-bit form"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(options.model, dtype, options.device), quantize(quantized, int4_config(options))


def _windows(text: Path, tokenizer: Any, context: int, max_tokens: int | None) -> Iterator[Tensor]:
    """The text in windows of ids [1, context], int64; the last one may be shorter."""
    ids = itertools.islice(itertools.chain.from_iterable(_lines(text, tokenizer)), max_tokens)
    while window := list(itertools.islice(ids, context)):
        yield torch.tensor([window])


def _lines(text: Path, tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each line, so that a long file is never in memory as a whole."""
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            yield tokenizer(line, add_special_tokens=False).input_ids
