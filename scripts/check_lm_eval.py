"""Does lm-evaluation-harness give an enabled model the scores of plain decoding? 1 where any score or answer differs.

    pip install lm_eval
    python scripts/check_lm_eval.py --target FOLDER --draft prompt_lookup --output benchmarks/results/check_lm_eval.json

Three tasks on data that is made here: word problems whose answers are generated (like gsm8k), and two multiple choices,
by log likelihoods. The same model answers them with transformers' own loop and with specdec's, in turn; the report has
both scores, whether all answers are the same, and the time that generating took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.report import emit
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import specdec
from specdec.drafters.resolve import NAMED_DRAFTERS
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

NAMES = ("Ann", "Ben", "Carla", "David", "Eva", "Frank")
THINGS = ("apples", "books", "coins", "stamps", "cards", "pens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(embedded.TARGET))
    parser.add_argument("--draft", default="prompt_lookup", help="a folder, prompt_lookup or suffix")
    parser.add_argument("--num-draft-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--dtype", default="float32", help="of everything around the 4-bit layers")
    parser.add_argument("--problems", type=int, default=40, help="of each task")
    parser.add_argument("--shots", type=int, default=3, help="solved problems in front of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if find_spec("lm_eval") is None:
        parser.error("this needs lm-evaluation-harness: pip install lm_eval")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    origin = provenance("cpu") | {"dtype": args.dtype}
    model, tokenizer = load(args.target, args.dtype, "cpu"), load_tokenizer(args.target)
    draft = args.draft if args.draft in NAMED_DRAFTERS else load(args.draft, args.dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), args.problems, args.shots)
        plain = evaluate(model, tokenizer, tasks, args.batch)
        specdec.enable(model, draft, num_draft_tokens=args.num_draft_tokens, compile=True)
        speculative = evaluate(model, tokenizer, tasks, args.batch)
    report = {
        "script": "check_lm_eval",
        "provenance": origin,
        "target": os.path.relpath(args.target) if os.path.isdir(args.target) else args.target,
        "plain": plain["scores"],
        "speculative": speculative["scores"],
        "same_answers": {name: plain["answers"][name] == speculative["answers"][name] for name in plain["answers"]},
        "generation_s": {"plain": plain["generation_s"], "speculative": speculative["generation_s"]},
        "tokens_per_step": speculative["tokens_per_step"],
    }
    show(report)
    emit(report, args.output)
    return 0 if plain["scores"] == speculative["scores"] and all(report["same_answers"].values()) else 1


def write_tasks(folder: Path, problems: int, shots: int) -> list[dict[str, Any]]:
    """Configs of three tasks, whose data is in the folder."""
    rng = random.Random(0)
    word_problems = [word_problem(rng) for _ in range(problems + shots)]
    sums = [sum_choice(rng) for _ in range(problems)]
    orders = [order_choice(rng) for _ in range(problems)]
    solved = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['solution']}" for row in word_problems[:shots])

    def task(name: str, rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
        (file := folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        return {"task": name, **data, **values}

    def mean(metric: str) -> list[dict[str, Any]]:
        return [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]

    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    return [
        task(
            "word_problems",
            word_problems[shots:],
            output_type="generate_until",
            doc_to_text=f"{solved}\n\nQuestion: {{{{question}}}}\nAnswer:",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\n\n", "Question:"], "max_gen_toks": 64, "do_sample": False},
            filter_list=[
                {
                    "name": "last-number",
                    "filter": [
                        {"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1},
                        {"function": "take_first"},
                    ],
                }
            ],
            metric_list=mean("exact_match"),
        ),
        task("sums", sums, doc_to_text="{{question}}", metric_list=mean("acc"), **choice),
        task("orders", orders, doc_to_text="{{question}}", metric_list=mean("acc"), **choice),
    ]


def word_problem(rng: random.Random) -> dict[str, Any]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    first, more, fewer = rng.randint(5, 30), rng.randint(2, 20), rng.randint(1, 5)
    total = first + more - fewer
    return {
        "question": f"{name} has {first} {thing}, gets {more} more and gives {fewer} away. How many {thing} are left?",
        "solution": f"{name} has {first} + {more} = {first + more} {thing}, then {first + more} - {fewer} = {total}."
        f" The answer is {total}",
        "answer": str(total),
    }


def sum_choice(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    choices = rng.sample([str(a + b), str(a + b + 10), str(a + b - 1), str(a + b + 2)], 4)
    return {"question": f"{a} + {b} =", "choices": choices, "label": choices.index(str(a + b))}


def order_choice(rng: random.Random) -> dict[str, Any]:
    a, b, c = rng.sample(NAMES, 3)
    choices = [f"{a} is taller than {c}.", f"{c} is taller than {a}."]
    label = rng.randint(0, 1)
    return {
        "question": f"{a} is taller than {b}. {b} is taller than {c}. So",
        "choices": choices if label == 0 else choices[::-1],
        "label": label,
    }


def evaluate(model: Any, tokenizer: Any, tasks: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """-> scores by task and metric, every answer by task, seconds in generate(), and specdec's tokens a step there."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    generation_s, all_stats = 0.0, []

    class Timed(HFLM):  # type: ignore[misc]
        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal generation_s
            started = time.perf_counter()
            ids = super()._model_generate(*args, **kwargs)
            generation_s += time.perf_counter() - started
            all_stats.append(specdec.last_stats(model))
            return ids

    client = Timed(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(model=client, tasks=[dict(task) for task in tasks], bootstrap_iters=0, verbosity="ERROR")
    scores = {
        name: {metric: float(value) for metric, value in values.items() if isinstance(value, float)}
        for name, values in found["results"].items()
    }
    answers = {
        name: [(row["doc_id"], str(row["resps"])) for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in found["samples"].items()
    }
    counted = [stats for stats in all_stats if stats is not None]
    steps = sum(stats.num_steps for stats in counted)
    return {
        "scores": scores,
        "answers": answers,
        "generation_s": round(generation_s, 2),
        "tokens_per_step": sum(stats.num_emitted_tokens for stats in counted) / steps if steps else None,
    }


def show(report: dict[str, Any]) -> None:
    table = Table(title="lm-evaluation-harness on one model")
    for column in ("task", "score", "plain", "speculative", "same answers"):
        table.add_column(column, justify="left" if column in ("task", "score") else "right")
    for name, scores in report["plain"].items():
        for metric, value in scores.items():
            other = report["speculative"][name][metric]
            table.add_row(name, metric, str(value), str(other), "yes" if report["same_answers"][name] else "NO")
    console = Console(width=max(100, Console().width))
    console.print(table)
    seconds = report["generation_s"]
    console.print(
        f"generating took {seconds['plain']:.1f} s by plain decoding, {seconds['speculative']:.1f} s with speculation:"
        f" {seconds['plain'] / seconds['speculative']:.2f} times",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
