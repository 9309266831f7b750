"""`specdec quantize SRC DST`: writes a checkpoint in four bits, layer by layer."""

from __future__ import annotations

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
from specdec.quant.formats import advice_on_fp8
from specdec.quant.heads import head_name
from specdec.quant.layers import layers_to_quantize
from specdec.runtime.loading import read_tokenizer
from specdec_cli.options import Options

LOCK = "lock"


def int4_config(options: Options) -> Int4Config:
    """The quantization that the command line describes."""
    head, activations = (None if value == "none" else value for value in (options.head, options.activations))
    return Int4Config(options.group_size, not options.asymmetric, options.skip, head, activations)


def run(options: Options) -> int:
    """Quantize while loading, save into a temporary folder, and move it to the destination when it is complete."""
    destination = Path(options.destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists already; name a folder that is empty or does not exist yet")
    quantization = int4_config(options)
    with named_errors(f"no model could be loaded from {options.source!r}"):
        config, settings, _ = read_config(config_folder(options.source))
        if settings is not None:
            method = settings.get("quant_method")
            raise ValueError(
                f"it is quantized already, by {method}; {advice_on_fp8(method) or 'quantize the original instead'}"
            )
        with torch.device("meta"):
            skeleton: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        names = layers_to_quantize(skeleton, quantization)
        num_int8 = int(quantization.head == "int8" and head_name(skeleton) in names)

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        warnings.catch_warnings(record=True) as notes,
    ):
        warnings.simplefilter("always", UserWarning)
        task = progress.add_task("quantizing", total=len(names))
        quantization.on_layer = lambda name: progress.update(task, advance=1, description=name)
        model = load_checkpoint(options.source, quantization)
        progress.update(task, description="saving")
        with named_errors(f"{destination} could not be written"), temporary_folder(destination) as folder:
            complete = folder / "model"
            model.save_pretrained(complete)
            _save_tokenizer(options.source, complete)
            if destination.exists():
                destination.rmdir()
            shutil.move(complete, destination)
    for note in notes:
        console.print(f"note: {note.message}", soft_wrap=True)
    before, after = (weight_bytes(options.source), weight_bytes(str(destination)))
    size = f"{after / 1e6:.1f} MB" + (
        f", {before / after:.2f} times smaller than the {before / 1e6:.1f} MB it was" if before else ""
    )
    head = ", the output head in 8 bits" if num_int8 else ""
    console.print(f"{len(names) - num_int8} layers in 4 bits{head} -> {destination}: {size}", soft_wrap=True)
    return 0


@contextmanager
def temporary_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder on the destination's disk, removed on exit. Folders that killed runs left are removed first.

    A run holds a lock on a file in its folder until its process ends. So the folders of running processes stay, and so
    do folders without such a file.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    for folder in destination.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(destination.name)}-\w{{8}}", folder.name) and (folder / LOCK).is_file():
            with suppress(OSError), FileLock(folder / LOCK, blocking=False):
                shutil.rmtree(folder)
    # Locked before it gets the name that other runs search for.
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
