"""Profile specdec's eager step: the time in its parts, in the models' modules and in PyTorch operators.

    python scripts/profile_step.py --pair embedded --threads 1
    python scripts/profile_step.py --pair 200m --output benchmarks/results/profile_step-200m.json

Greedy calls are made in three ways. With Stats.timing alone: the parts of a step. With a timer around every module:
time within it without its submodules, Python included. With torch.profiler: operators and how often they run. The last
two slow a step down; their shares count, not their times. What prompts take is measured in short calls and subtracted.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_peers import find_pair
from peers.engines import Task, specdec_draft
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

import specdec
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

STEP_PARTS_MS = ("draft_ms", "target_ms", "verification_ms", "other_ms")
MIN_SHARE = 0.005  # of the time, for a row of the table
SHORT_CALL_TOKENS = 8  # new tokens of a call that is mostly prompt, the draft's included

Counts = dict[str, tuple[float, int]]  # ms and calls, by name


class ModuleTimer:
    """Seconds within modules of each class, without their submodules, and how often they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.stack: list[float] = []  # seconds in submodules of each running module

    @contextmanager
    def on(self, role: str, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in model.modules():
                # replaced on the instance, since specdec leaves models with hooks to the stock loop
                module.forward = self._timed(f"{role}: {type(module).__name__}", module.forward)
                stack.callback(vars(module).pop, "forward")
            yield

    def _timed(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self.stack.append(0.0)
            try:
                return forward(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.seconds[name] += spent - self.stack.pop()
                self.calls[name] += 1
                if self.stack:
                    self.stack[-1] += spent

        return timed

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help="as for bench_peers.py")
    parser.add_argument("--num-draft-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the JSON there")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    origin = provenance("cpu")
    try:
        pair = find_pair(args.pair, console)
        if pair.draft is None:
            raise ValueError(f"--pair {pair.name} has no draft model")
    except ValueError as error:
        console.print(f"profile_step: {error}", style="red")
        return 1
    console.print("loading")
    target, draft = pair.load_int4(args.dtype), load(str(pair.draft), args.dtype, "cpu")
    every = (load_tokenizer(str(pair.target))(prompt["prompt"]).input_ids for prompt in embedded.prompts())
    prompts = [ids[: args.prompt_tokens] for ids in every if len(ids) >= args.prompt_tokens][: args.prompts]
    tasks = [Task(prompts[at : at + args.batch], args.new_tokens) for at in range(0, len(prompts), args.batch)]
    engine = specdec_draft(target, args.threads, draft, args.num_draft_tokens)
    engine.compiled = False  # compiled, there is no module to time
    report = {
        "script": "profile_step",
        "pair": pair.name,
        "provenance": origin,
        "num_draft_tokens": args.num_draft_tokens,
    }
    report |= {"batch": args.batch, "dtype": args.dtype, **measure(engine, tasks, target, draft, console)}
    show(report)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
    return 0


def measure(engine: Any, tasks: Sequence[Task], target: Any, draft: Any, console: Console) -> dict[str, Any]:
    """Parts, modules and operators of a step. What prompts take is measured in short calls, and subtracted."""

    def write(new_tokens: int) -> int:
        """Run all tasks with so many new tokens; the number of steps."""
        steps = 0
        for task in tasks:
            engine.generate(replace(task, new_tokens=new_tokens))
            steps += specdec.last_stats(target).num_target_forwards
        return steps

    def time_modules(new_tokens: int) -> tuple[int, Counts]:
        timer = ModuleTimer()
        with timer.on("target", target), timer.on("draft", draft):
            write(1)  # the first call tries the models again, since they changed
            timer.clear()
            steps = write(new_tokens)
        return steps, {name: (1000 * seconds, timer.calls[name]) for name, seconds in timer.seconds.items()}

    def profile_operators(new_tokens: int) -> tuple[int, Counts]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            steps = write(new_tokens)
        return steps, {event.key: (event.self_cpu_time_total / 1000, event.count) for event in profiler.key_averages()}

    def per_step(run: Callable[[int], tuple[int, Counts]]) -> dict[str, dict[str, float]]:
        """ms and calls of each name per step, from the difference of a long and a short call."""
        run(SHORT_CALL_TOKENS)
        (short_steps, short), (long_steps, long) = run(SHORT_CALL_TOKENS), run(tasks[0].new_tokens)
        steps = long_steps - short_steps
        figures = {
            name: {
                "ms_per_step": (ms - short.get(name, (0, 0))[0]) / steps,
                "calls_per_step": (n - short.get(name, (0, 0))[1]) / steps,
            }
            for name, (ms, n) in long.items()
        }
        return dict(sorted(figures.items(), key=lambda item: -item[1]["ms_per_step"]))

    with engine.ready():
        console.print("measuring the parts of a step")
        engine.generate(tasks[0])
        steps = [engine.time_steps(task) for task in tasks]
        parts = {
            name: sum(getattr(one, name) for one in steps) / len(steps)
            for name in (*STEP_PARTS_MS, "prompt_ms", "tokens_per_step")
        }
        console.print("timing every module")
        modules = per_step(time_modules)
        console.print("torch.profiler")
        operators = per_step(profile_operators)
    total = {key: sum(operator[key] for operator in operators.values()) for key in ("ms_per_step", "calls_per_step")}
    return {
        "step": parts,
        "modules": modules,
        "operators": operators,
        "all_operators": total,
    }


def rounded(value: Any) -> Any:
    """With four decimals, more than measured values are exact to."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def show(report: dict[str, Any]) -> None:
    console, step = Console(width=max(90, Console().width)), report["step"]
    step_ms = sum(step[name] for name in STEP_PARTS_MS)
    parts = ", ".join(f"{name.removesuffix('_ms')} {step[name]:.2f}" for name in STEP_PARTS_MS)
    console.print(
        f"{report['pair']} pair, K={report['num_draft_tokens']}, batch {report['batch']}: a step takes {step_ms:.2f} ms"
        f" for {step['tokens_per_step']:.2f} tokens ({parts}); a call's preparation, prompt and first step"
        f" {step['prompt_ms']:.0f} ms"
    )
    for title, name in (("time in modules, without their submodules", "modules"), ("time in operators", "operators")):
        table = Table(title=title, title_justify="left")
        table.add_column(name)
        for column in ("ms a step", "share", "calls a step"):
            table.add_column(column, justify="right")
        total_ms = (
            sum(row["ms_per_step"] for row in report["modules"].values())
            if name == "modules"
            else report["all_operators"]["ms_per_step"]
        )
        for key, row in report[name].items():
            if row["ms_per_step"] >= MIN_SHARE * total_ms:
                table.add_row(
                    key,
                    f"{row['ms_per_step']:.3f}",
                    f"{row['ms_per_step'] / total_ms:.1%}",
                    f"{row['calls_per_step']:.1f}",
                )
        console.print(table)
    total = report["all_operators"]
    console.print(f"all operators: {total['calls_per_step']:,.0f} calls and {total['ms_per_step']:.2f} ms a step")


if __name__ == "__main__":
    sys.exit(main())
