"""`specdec quantize SRC DST`: a checkpoint in four bits, layer by layer."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec.quant.quantizer import Int4Config, layers_to_quantize


def int4_config(options: argparse.Namespace) -> Int4Config:
    """What the command line asked for."""
    return Int4Config(options.group_size, not options.asymmetric, options.skip, options.quantize_head)


def run(options: argparse.Namespace) -> int:
    """Quantize while loading, save beside the destination, and move it there when it is whole."""
    destination = Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; name a folder that is empty or not there yet")
    quantization = int4_config(options)
    config = AutoConfig.from_pretrained(options.source)
    if (method := getattr(config, "quantization_config", None)) is not None:
        raise ValueError(f"{options.source} is quantized already, by {method['quant_method']}; quantize the original instead")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    total = len(layers_to_quantize(skeleton, quantization))

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        warnings.catch_warnings(record=True) as notes,
    ):
        warnings.simplefilter("always", UserWarning)
        task = progress.add_task("quantizing", total=total)
        quantization.on_layer = lambda name: progress.update(task, advance=1, description=name)
        model: Any = AutoModelForCausalLM.from_pretrained(options.source, dtype="auto", quantization_config=quantization)
        progress.update(task, description="saving")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
            whole = Path(folder) / "model"
            model.save_pretrained(whole)
            _save_tokenizer(options.source, whole)
            if destination.exists():
                destination.rmdir()
            shutil.move(whole, destination)
    for note in notes:
        console.print(f"note: {note.message}", soft_wrap=True)
    before, after = (weight_bytes(options.source), weight_bytes(str(destination)))
    size = f"{after / 1e6:.1f} MB" + (
        f", {before / after:.2f} times smaller than the {before / 1e6:.1f} MB it was" if before else ""
    )
    console.print(f"{total} layers in 4 bits -> {destination}: {size}", soft_wrap=True)
    return 0


def weight_bytes(folder: str) -> int:
    """Size of a folder's safetensors files, 0 for a hub id."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _save_tokenizer(source: str, folder: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except (OSError, ValueError) as error:
        warnings.warn(f"no tokenizer was copied: {str(error).partition(chr(10))[0]}", stacklevel=2)
