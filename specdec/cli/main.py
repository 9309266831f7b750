"""The command line: `specdec demo | generate | quantize | audit | experiment | report | plan`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from transformers.utils import logging as transformers_logging

import specdec
from specdec.cli import audit, demo, plan, quantize, report
from specdec.drafters.resolve import AUTO
from specdec.utils import embedded

DEMO_PROMPT = "queue-3"
EXPERIMENT_MODULES = {"accelerate", "datasets", "hydra", "jinja2", "matplotlib", "omegaconf"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 where what was to be shown did not hold, 2 where the input cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()  # one progress display, ours
    quiet.set_verbosity_error()
    try:
        if arguments[:1] == ["experiment"]:  # what follows is hydra's
            return _experiment(arguments[1:])
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        return code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXPERIMENT_MODULES:
            raise
        print(f'specdec: {error.name} is not installed; pip install "specdec-lossless[experiments]"', file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"specdec: {error}", file=sys.stderr)
        return 2


def _experiment(arguments: list[str]) -> int:
    from specdec.cli import experiment

    return experiment.main(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specdec", description="Lossless speculative decoding for Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"specdec {specdec.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    default_prompt = next(p["prompt"] for p in embedded.prompts() if p["id"] == DEMO_PROMPT)
    for name, is_demo, summary in (
        ("demo", True, "complete a prompt with the embedded pair, plain and speculative"),
        ("generate", False, "the same with a model and a prompt of your own"),
    ):
        command = commands.add_parser(name, help=summary)
        command.set_defaults(run=demo.run)
        command.add_argument(
            "--model",
            default=str(embedded.TARGET),
            required=not is_demo,
            help="the target: a folder or a hub id, in full precision or in 4 bits (GPTQ, AWQ, MXFP4, … or our own)",
        )
        command.add_argument(
            "--draft",
            default=str(embedded.DRAFT) if is_demo else "prompt_lookup",
            help="the drafter: a folder or a hub id of a smaller model with the same tokenizer, prompt_lookup, or none",
        )
        command.add_argument("--prompt", default=default_prompt, required=not is_demo, help="the text to complete")
        command.add_argument("--max-new-tokens", type=int, default=128)
        command.add_argument(
            "--num-draft-tokens",
            type=_k,
            default=AUTO,
            metavar="K",
            help="ids proposed a step; auto, the default: whatever is fastest",
        )
        command.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
        command.add_argument("--seed", type=int, default=0, help="of sampling, with --temperature")
        _add_placement(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead")

    command = commands.add_parser("quantize", help="write a model in 4 bits")
    command.set_defaults(run=quantize.run)
    command.add_argument("source", metavar="SRC", help="the model: a folder or a hub id")
    command.add_argument("destination", metavar="DST", help="a folder that is empty or not there yet")
    _add_quantization(command)

    commands.add_parser(
        "experiment", add_help=False, help="run a hydra config: records, figures, one page (--help lists groups)"
    )

    command = commands.add_parser(
        "report", help="a page from the records of one run or several; compare them, gate on them"
    )
    command.set_defaults(run=report.run)
    report.add_arguments(command)

    command = commands.add_parser("plan", help="memory of two models and their caches, from their configs alone")
    command.set_defaults(run=plan.run)
    plan.add_arguments(command)

    audits = commands.add_parser("audit", help="check a claim on a model of your own").add_subparsers(
        dest="audit", required=True
    )
    command = audits.add_parser(
        "quality", help="perplexity, KL and top-1 agreement of a 4-bit model against its original"
    )
    command.set_defaults(run=audit.run)
    command.add_argument(
        "model", metavar="MODEL", help="a 4-bit model, with --original; or a plain one, quantized here"
    )
    command.add_argument("--original", help="the model that MODEL was quantized from")
    command.add_argument("--text", required=True, metavar="FILE", help="a plain text, like what the model will write")
    command.add_argument("--context", type=int, default=512, help="tokens that are read at a time (512)")
    command.add_argument("--max-tokens", type=int, help="read no more than these; default: the whole text")
    command.add_argument("--max-kl", type=float, help="exit with 1 where the mean KL, in nats, is above this")
    _add_quantization(command)
    _add_placement(command)
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _k(text: str) -> int | str:
    return text if text == AUTO else int(text)


def _add_placement(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, …")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU; elsewhere the checkpoint's own"
    )


def _add_quantization(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="columns that share a scale: 16, 32, 64, 128 (default), 256, -1 a row",
    )
    command.add_argument("--asymmetric", action="store_true", help="give each group a zero point")
    command.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="keep this layer, or all below this name, as it is; repeatable",
    )
    command.add_argument(
        "--quantize-head", action="store_true", help="the output head too, unless it is the embedding's"
    )


if __name__ == "__main__":
    sys.exit(main())
