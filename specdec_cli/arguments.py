"""The arguments of each command. Nothing here imports `specdec`, and with it torch, so that help is printed at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

AUTO = "auto"  # of --num-draft-tokens: specdec.drafters.resolve.AUTO


@dataclass(frozen=True)
class Command:
    """module: of specdec_cli; its run(options) runs the command."""

    module: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `module` names the module of specdec_cli that runs it."""
    parser = argparse.ArgumentParser(
        prog="specdec", description="Lossless speculative decoding for Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"specdec {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, add_help=command.add_arguments is not add_hydra)
        subparser.set_defaults(module=command.module)
        if name in arguments[:1]:  # those of the others are not needed, and some take imports
            command.add_arguments(subparser)
    return parser.parse_args(arguments)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{MODEL_HELP}; default: the embedded target")
    parser.add_argument(
        "--drafter", help=f"{DRAFT_HELP}; eagle3, the embedded target's head. Default: the embedded draft model"
    )
    parser.add_argument("--prompt", help="the text to complete (one of the embedded pair's)")
    _add_generation(parser)


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--drafter", default="prompt_lookup", help=DRAFT_HELP)
    parser.add_argument("--prompt", required=True, help="the text to complete")
    _add_generation(parser)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the model: a folder or a hub id")
    parser.add_argument("destination", metavar="DST", help="a folder that is empty or does not exist yet")
    _add_quantization(parser)


def add_hydra(parser: argparse.ArgumentParser) -> None:
    """None: hydra parses them."""


def add_report(parser: argparse.ArgumentParser) -> None:
    from specdec.experiments.report.figures import METRICS

    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or a sweep's; several are compared with the first one"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="default: report.html in the first run's folder; else stdout"
    )
    output_format = parser.add_mutually_exclusive_group()
    output_format.add_argument("--markdown", action="store_true", help="tables for a pull request or a job's summary")
    output_format.add_argument("--json", action="store_true", help="all figures as one JSON object")
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="EXPR",
        help="exit with 1 where a metric changed so from the first run: 'mean_acceptance_length<-5%%' is relative,"
        " 'draft_acceptance_rate<-0.02' absolute (two points); repeatable. Metrics: " + ", ".join(METRICS),
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="a folder or a hub id; only its config is read")
    parser.add_argument(
        "--drafter",
        help="a draft model or draft head, likewise, mtp (the target's own layer), suffix, or suffix+FOLDER_OR_HUB_ID;"
        " without it, drafting takes no memory",
    )
    parser.add_argument("--context", type=int, help="tokens of a row at the end of a call, its prompt included (4096)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a batch (1)")
    parser.add_argument(
        "--num-draft-tokens", type=int, metavar="K", help="draft tokens of a step (the most that auto proposes)"
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
    _add_json(parser)


def add_audit(parser: argparse.ArgumentParser) -> None:
    audits = parser.add_subparsers(dest="audit", required=True)
    lossless = audits.add_parser("lossless", help="a certificate: does speculation change the answers of a model?")
    lossless.set_defaults(module="audit_lossless")
    lossless.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    lossless.add_argument("--reference", metavar="URL", help="instead of MODEL: a server without speculation")
    lossless.add_argument("--candidate", metavar="URL", help="a server of the same model with speculation")
    lossless.add_argument("--server-model", metavar="NAME", help="as requests name it; default: the first one listed")
    lossless.add_argument("--load", type=int, default=8, help="requests to a server at a time, besides single ones (8)")
    lossless.add_argument(
        "--drafter",
        action="append",
        metavar="DRAFTER",
        help=f"{DRAFT_HELP}; repeatable. Default: prompt_lookup, suffix, and the draft model of the embedded target",
    )
    lossless.add_argument(
        "--budget",
        type=_seconds,
        default=120.0,
        metavar="TIME",
        help="how long this run may take: 90s, 10min, 2h (2min). With --output, a further run goes on where it ended",
    )
    lossless.add_argument(
        "--prompts",
        metavar="FILE",
        help="a json, jsonl, parquet or txt file, or a hub id of a dataset, with a `prompt` each; default: the embedded"
        " pair's",
    )
    lossless.add_argument("--max-prompts", type=int, default=100, help="use the first so many (100)")
    lossless.add_argument("--first-prompt", type=int, default=0, metavar="N", help="skip the first N")
    lossless.add_argument(
        "--num-draft-tokens",
        type=_several(_num_draft_tokens),
        default=(1, 3, 6, AUTO),
        metavar="K,K,…",
        help="of greedy texts (1,3,6,auto)",
    )
    lossless.add_argument(
        "--batch", type=_several(int), default=(1, 4), metavar="B,B,…", help="rows of greedy calls (1,4)"
    )
    lossless.add_argument(
        "--prefill-chunk",
        type=_several(_prefill_chunk),
        default=(None, 16),
        metavar="P,P,…",
        help="positions of a prompt that greedy calls read at a time (whole,16)",
    )
    lossless.add_argument(
        "--loop",
        choices=["specdec", "transformers"],
        default="specdec",
        help="whose loop is audited; transformers' assisted decoding takes --batch 1, --prefill-chunk whole and numbers"
        " of draft tokens",
    )
    lossless.add_argument("--max-new-tokens", type=int, default=64, help="of greedy texts (64)")
    lossless.add_argument("--max-draws", type=int, default=20_000, help="sampled ids after which sampling ends (20000)")
    lossless.add_argument(
        "--alpha", type=float, default=0.001, help="rate of false alarms of the sampling test (0.001)"
    )
    lossless.add_argument("--seed", type=int, default=0)
    lossless.add_argument(
        "--output", metavar="FOLDER", help="keep what is found there, with certificate.json and certificate.html"
    )
    _add_placement(lossless)
    _add_json(lossless)
    head = audits.add_parser("head", help="is a draft head run as it was trained? tries its settings, one by one")
    head.set_defaults(module="audit_head")
    head.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    head.add_argument("head", metavar="HEAD", help="the draft head: a folder or a hub id; mtp, the target's own")
    head.add_argument("--prompts", metavar="FILE", help="as of lossless; the target writes texts behind them")
    head.add_argument("--max-prompts", type=int, default=32, help="use the first so many (32)")
    head.add_argument("--max-new-tokens", type=int, default=128, help="of each text (128)")
    head.add_argument("--seed", type=int, default=0)
    _add_placement(head)
    _add_json(head)
    quality = audits.add_parser(
        "quality", help="perplexity, KL and top-1 agreement of a 4-bit model against its original"
    )
    quality.set_defaults(module="audit_quality")
    quality.add_argument(
        "model", metavar="MODEL", help="a 4-bit model, with --original; or a plain one, quantized here"
    )
    quality.add_argument("--original", help="the model that MODEL was quantized from")
    quality.add_argument("--text", required=True, metavar="FILE", help="a plain text, like what the model will write")
    quality.add_argument("--context", type=int, default=512, help="tokens that are read at a time (512)")
    quality.add_argument("--max-tokens", type=int, help="read no more than these; default: the whole text")
    quality.add_argument("--max-kl", type=float, help="exit with 1 where the mean KL, in nats, is above this")
    _add_quantization(quality)
    _add_placement(quality)
    _add_json(quality)


def _version() -> str:
    try:
        return version("specdec-lossless")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        from specdec import __version__

        return __version__


MODEL_HELP = "the target: a folder or a hub id, in full precision or in 4 bits (GPTQ, AWQ, MXFP4, … or specdec's own)"
DRAFT_HELP = (
    "the drafter: a folder or a hub id of a smaller model or a draft head, prompt_lookup, suffix,"
    " suffix+FOLDER_OR_HUB_ID, mtp (the layer in the target's own checkpoint), or none"
)
COMMANDS = {
    "demo": Command("demo", "complete a prompt with the embedded pair, plain and speculative", add_demo),
    "generate": Command("demo", "the same with a model and a prompt of your own", add_generate),
    "quantize": Command("quantize", "write a model in 4 bits", add_quantize),
    "experiment": Command(
        "experiment", "run a hydra config: records, figures, one page (--help lists groups)", add_hydra
    ),
    "train-drafter": Command(
        "experiment", "train a draft head or draft model on what a target answers (--help lists settings)", add_hydra
    ),
    "report": Command(
        "report", "a page from the records of one run or several; compare them, gate on them", add_report
    ),
    "plan": Command("plan", "memory of two models and their caches, from their configs alone", add_plan),
    "audit": Command("audit_quality", "check a claim on a model of your own", add_audit),
}


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--num-draft-tokens",
        type=_num_draft_tokens,
        default=AUTO,
        metavar="K",
        help="draft tokens of a step; auto, the default, chooses the fastest number",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, with --temperature")
    _add_placement(parser)
    _add_json(parser)


def _num_draft_tokens(text: str) -> int | str:
    return text if text == AUTO else int(text)


def _prefill_chunk(text: str) -> int | None:
    return None if text == "whole" else int(text)


def _several(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def several(text: str) -> tuple[Any, ...]:
        try:
            return tuple(convert(part.strip()) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as 1,3") from error

    return several


def _seconds(text: str) -> float:
    """ "90s", "10min", "2h", or a number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10min or 2h")
    return float(found[1]) * {"min": 60, "h": 3600}.get(found[2], 1)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, …")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU; elsewhere the checkpoint's own"
    )


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="columns that share a scale: 16, 32, 64, 128 (default), 256, -1 a row",
    )
    parser.add_argument("--asymmetric", action="store_true", help="give each group a zero point")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="keep this layer, or all below this name, in its precision; repeatable",
    )
    parser.add_argument(
        "--head", choices=["int8", "int4", "none"], default="int8", help="the output head; none keeps its precision"
    )
    parser.add_argument(
        "--activations",
        choices=["int8", "none"],
        default="int8",
        help="round the inputs of quantized layers to 8 bits on a CPU; none keeps 16",
    )
