"""What commands that run a model share: checks before anything is loaded, loading, the arguments of generate()."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

import specdec
from specdec.core.interfaces import Drafter
from specdec.drafters.resolve import load_drafter
from specdec.runtime.loading import load, load_tokenizer
from specdec_cli.options import Options


@dataclass(frozen=True)
class Pair:
    """A target with its tokenizer and a drafter."""

    model: PreTrainedModel
    tokenizer: Any
    drafter: Drafter


def check_device(device: str) -> None:
    """Raise ValueError where a device is not one that this PyTorch can use on this machine."""
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device!r} is no device; use cpu, cuda, or cuda:1 for the second GPU") from None
    if parsed.type != "cuda":
        return
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"--device {device}: this PyTorch, {torch.__version__}, is built without CUDA; install a build with it"
            " (https://pytorch.org/get-started/locally), or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU; check `nvidia-smi`, or use --device cpu")
    if parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")


def check_sampling(options: Options) -> None:
    """Raise ValueError where an option of sampling would have no effect."""
    for name in ("top_p", "top_k", "min_p"):
        if options.temperature == 0 and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')} {getattr(options, name):g}"
            raise ValueError(f"{flag} has no effect on greedy decoding; add --temperature 1, or leave it out")


def generation_arguments(options: Options, tokenizer: Any) -> dict[str, Any]:
    """The arguments of generate() that the command line stands for; what it does not name is off."""
    arguments: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        arguments["temperature"] = options.temperature
        arguments["top_p"] = 1.0 if options.top_p is None else options.top_p
        arguments["top_k"] = options.top_k or 0
        if options.min_p is not None:
            arguments["min_p"] = options.min_p
    if tokenizer.pad_token_id is not None:
        arguments["pad_token_id"] = tokenizer.pad_token_id
    return arguments


def dtype_of(options: Options) -> str:
    """The dtype to load in: float32 on a CPU, elsewhere the checkpoint's own."""
    return options.dtype or ("float32" if options.device == "cpu" else "auto")


def load_pair(options: Options) -> Pair:
    """Load what the options name, with a line of progress."""
    dtype = dtype_of(options)
    int4 = specdec.Int4Config() if getattr(options, "quantize", None) == "int4" else None
    with working(f"loading {options.model}"):
        model = load(options.model, dtype, options.device, int4)
        tokenizer = load_tokenizer(options.model)
    with working(f"loading {options.drafter}"):
        return Pair(model, tokenizer, load_drafter(options.drafter, model, dtype))


def enable(pair: Pair, options: Options) -> None:
    """Make the pair's target speculative as the options say."""
    compile: Any = True if options.compile else "auto"
    with working("compiling" if options.compile else "trying the models"):
        specdec.enable(pair.model, pair.drafter, num_draft_tokens=options.num_draft_tokens, compile=compile)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show what is being done, on a terminal, until it is."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        yield
