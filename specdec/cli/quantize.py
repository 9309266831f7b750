"""`specdec quantize SRC DST`: a checkpoint in four bits, layer by layer."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM

from specdec.quant.checkpoints import config_folder, load_checkpoint, named_errors, read_config
from specdec.quant.config import Int4Config
from specdec.quant.layers import layers_to_quantize
from specdec.runtime.loading import read_tokenizer

LOCK = "lock"


def int4_config(options: argparse.Namespace) -> Int4Config:
    """What the command line asked for."""
    return Int4Config(options.group_size, not options.asymmetric, options.skip, options.quantize_head)


def run(options: argparse.Namespace) -> int:
    """Quantize while loading, save beside the destination, and move it there when it is whole."""
    destination = Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; name a folder that is empty or not there yet")
    quantization = int4_config(options)
    with named_errors(f"no model could be loaded from {options.source!r}"):
        config, settings, _ = read_config(config_folder(options.source))
        if settings is not None:
            raise ValueError(
                f"it is quantized already, by {settings.get('quant_method')}; quantize the original instead"
            )
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
        model = load_checkpoint(options.source, quantization)
        progress.update(task, description="saving")
        with named_errors(f"{destination} could not be written"), folder_beside(destination) as folder:
            whole = folder / "model"
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


@contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """A hidden folder on the destination's disk to write into, gone in the end. What killed runs left of theirs goes first.

    A run holds a lock on a file in its folder, which ends with its process; so folders of runs that go on are left alone, and
    those without such a file.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    for folder in destination.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(destination.name)}-\w{{8}}", folder.name) and (folder / LOCK).is_file():
            with suppress(OSError), FileLock(folder / LOCK, blocking=False):
                shutil.rmtree(folder)
    # Locked before it bears the name that other runs look for.
    new = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.new-"))
    with FileLock(new / LOCK):
        folder = new.rename(destination.parent / f".{destination.name}-{new.name[-8:]}")
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def weight_bytes(folder: str) -> int:
    """Size of a folder's safetensors files, 0 for a hub id."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _save_tokenizer(source: str, folder: Path) -> None:
    try:
        read_tokenizer(source).save_pretrained(folder)
    except ValueError as error:
        warnings.warn(f"no tokenizer was copied: {error}", stacklevel=2)
