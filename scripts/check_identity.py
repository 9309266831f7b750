"""Count the greedy texts that are identical with speculation, on a model's own fast path; 1 where any differs.

    python scripts/check_identity.py                # the embedded pair, 200 prompts of 96 tokens, about 12 minutes
    python scripts/check_identity.py --prompts 20 --num-draft-tokens 3
    python scripts/check_identity.py --target folder --draft prompt_lookup --dtype bfloat16

Each prompt is completed by transformers' own generate(), by specdec's plain loop, and speculatively. At a first
difference the margin between the two best logits of plain decoding is reported: near zero means that rounding decided,
anything else is a bug.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from common.report import emit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

import specdec
from specdec.audit.identity import first_difference
from specdec.drafters.resolve import NAMED_DRAFTERS
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(embedded.TARGET))
    parser.add_argument("--draft", default=str(embedded.DRAFT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of everything around the 4-bit layers")
    parser.add_argument("--prompts", type=int, default=200, help="of the held-out prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[2, 5], metavar="K")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()

    origin = provenance(args.device) | {"dtype": args.dtype}  # before anything runs: commits may follow
    target = load(args.target, args.dtype, args.device)
    draft = args.draft if args.draft in NAMED_DRAFTERS else load(args.draft, args.dtype, args.device)
    tokenizer = load_tokenizer(args.target)
    all_prompts = embedded.prompts()
    count = min(args.prompts, len(all_prompts))
    prompts = [all_prompts[i * len(all_prompts) // args.prompts] for i in range(count)]
    drafters = {"our plain loop": ("none", 1)} | {f"K={k}": (draft, k) for k in args.num_draft_tokens}
    divergences: dict[str, list[dict]] = {name: [] for name in drafters}
    for prompt in track(prompts, description=f"{len(prompts)} prompts", console=Console(stderr=True)):
        ids = tokenizer(prompt["prompt"], return_tensors="pt").input_ids.to(args.device)
        expected = generate(target, ids, args.max_new_tokens)
        for name, (drafter, k) in drafters.items():
            specdec.enable(target, drafter, num_draft_tokens=k)
            actual = generate(target, ids, args.max_new_tokens)
            specdec.disable(target)
            if actual != expected:
                divergences[name].append(divergence(target, ids, prompt["id"], actual, expected))

    report = {
        "script": "check_identity",
        "provenance": origin,
        "target": os.path.relpath(args.target) if os.path.isdir(args.target) else args.target,
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "identical": {name: len(prompts) - len(found) for name, found in divergences.items()},
        "divergences": divergences,
    }
    show(report)
    emit(report, args.output)
    if any(divergences.values()):
        sys.exit(1)


def generate(target: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    """The greedy continuation."""
    output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, ids.shape[1] :].tolist()


def divergence(target: PreTrainedModel, ids: torch.Tensor, prompt: str, actual: list[int], expected: list[int]) -> dict:
    """The first position at which two texts differ, and the margin of plain decoding's best logit there."""
    at = first_difference(expected, actual)
    assert at is not None
    output = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=at + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = output.logits[-1][0].float().topk(2).values
    return {"prompt": prompt, "position": at, "margin": round((best[0] - best[1]).item(), 6)}


def show(report: dict) -> None:
    table = Table(title=f"greedy texts of {report['max_new_tokens']} tokens, against transformers' own generate()")
    for column in ("", "identical", "share", "median margin where they differ"):
        table.add_column(column, justify="left" if not column else "right")
    for name, count in report["identical"].items():
        margins = [d["margin"] for d in report["divergences"][name]]
        median = f"{statistics.median(margins):.2g}" if margins else ""
        table.add_row(name, f"{count} of {report['prompts']}", f"{count / report['prompts']:.1%}", median)
    Console().print(table)


if __name__ == "__main__":
    main()
