"""Arguments and options that several commands take. Nothing here imports torch, so that help is printed at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

Options = SimpleNamespace  # the arguments of a command, by name
AUTO = "auto"  # of --num-draft-tokens: specdec.drafters.resolve.AUTO
METRICS = (  # of --fail-if: the names in specdec.experiments.report.figures.METRICS
    "speedup", "tokens_per_s", "plain_tokens_per_s", "mean_acceptance_length", "tokens_per_step",
    "draft_acceptance_rate", "expected_acceptance", "realized_acceptance", "first_token_ms", "plain_first_token_ms",
    "token_ms", "identical",
)  # fmt: skip

MODEL_HELP = "The target: a folder or a hub id, in full precision or in 4 bits (GPTQ, AWQ, MXFP4, … or specdec's own)."
DRAFTER_HELP = (
    "The drafter: a folder or a hub id of a smaller model or a draft head, prompt_lookup, suffix,"
    " suffix+FOLDER_OR_HUB_ID, mtp (the layer in the target's own checkpoint), or none."
)
SPECULATION, SAMPLING, PROMPT, MODEL, OUTPUT = "Speculation", "Sampling", "Prompt", "Model", "Output"
MEASURE, QUANTIZATION = "Measurement", "Quantization"


def num_draft_tokens(text: str) -> int | str:
    """A number of draft tokens, or "auto"."""
    if text == AUTO:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def prefill_chunk(text: str) -> int | None:
    """A number of positions, or "whole": None."""
    return None if text == "whole" else int(text)


def several(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of a list such as 1,3."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(convert(part.strip()) for part in text.split(","))
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no list such as 1,3") from error

    return parse


def seconds(text: str) -> float:
    """ "90s", "10min", "2h", or a number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)?", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time such as 90s, 10min or 2h")
    return float(found[1]) * {"min": 60, "h": 3600}.get(found[2], 1)


def _option(*names: str, panel: str, help: str, metavar: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, metavar=metavar, **settings)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Drafter = Annotated[str, _option("--drafter", panel=SPECULATION, metavar="DRAFTER", help=DRAFTER_HELP)]
NumDraftTokens = Annotated[
    Any,
    _option(
        "--num-draft-tokens", panel=SPECULATION, metavar="K", parser=num_draft_tokens,
        help="Draft tokens of a step; auto chooses the fastest number, and none where drafting does not pay.",
    ),
]  # fmt: skip
Temperature = Annotated[
    float, _option("--temperature", panel=SAMPLING, metavar="T", min=0, help="0 is greedy decoding.")
]
TopP = Annotated[
    float | None,
    _option(
        "--top-p", panel=SAMPLING, metavar="P", min=0, max=1, help="Sample from the likeliest tokens of this mass."
    ),
]
TopK = Annotated[
    int | None, _option("--top-k", panel=SAMPLING, metavar="N", min=1, help="Sample from the N likeliest tokens.")
]
MinP = Annotated[
    float | None,
    _option("--min-p", panel=SAMPLING, metavar="P", min=0, max=1, help="Leave out tokens below P times the likeliest."),
]
Seed = Annotated[int, _option("--seed", panel=SAMPLING, metavar="N", help="Of sampling.")]
Stop = Annotated[
    list[str] | None, _option("--stop", panel=SAMPLING, metavar="TEXT", help="End behind this text; repeatable.")
]
MaxNewTokens = Annotated[int, _option("--max-new-tokens", panel=SAMPLING, metavar="N", min=1, help="At most so many.")]
System = Annotated[
    str | None, _option("--system", panel=PROMPT, metavar="TEXT", help="The system message of the chat template.")
]
Device = Annotated[str, _option("--device", panel=MODEL, metavar="DEVICE", help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    _option("--dtype", panel=MODEL, help="Default: float32 on a CPU; elsewhere the checkpoint's own."),
]
Quantize = Annotated[
    Literal["int4"] | None, _option("--quantize", panel=MODEL, help="Quantize the target to 4 bits while it is loaded.")
]
Compile = Annotated[
    bool,
    _option(
        "--compile", panel=MODEL,
        help="Compile forwards for this CPU where that was not done yet (about a minute, once). Compiled code that is"
        " on disk is used anyway.",
    ),
]  # fmt: skip
Json = Annotated[bool, _option("--json", panel=OUTPUT, help="Print one JSON object instead.")]
Prompts = Annotated[
    str | None,
    _option(
        "--prompts", panel=PROMPT, metavar="FILE",
        help="A json, jsonl, parquet or txt file, or a hub id of a dataset, with a `prompt` each; default: the embedded"
        " pair's.",
    ),
]  # fmt: skip
GroupSize = Annotated[
    int,
    _option(
        "--group-size", panel=QUANTIZATION, metavar="N",
        help="Columns that share a scale: 16, 32, 64, 128, 256, or -1, a row.",
    ),
]  # fmt: skip
Asymmetric = Annotated[bool, _option("--asymmetric", panel=QUANTIZATION, help="Give each group a zero point.")]
Skip = Annotated[
    list[str] | None,
    _option(
        "--skip", panel=QUANTIZATION, metavar="NAME",
        help="Keep this layer, or all below this name, in its precision; repeatable.",
    ),
]  # fmt: skip
Head = Annotated[
    Literal["int8", "int4", "none"],
    _option("--head", panel=QUANTIZATION, help="The output head; none keeps its precision."),
]
Activations = Annotated[
    Literal["int8", "none"],
    _option(
        "--activations", panel=QUANTIZATION,
        help="Round the inputs of quantized layers to 8 bits on a CPU; none keeps 16.",
    ),
]  # fmt: skip
