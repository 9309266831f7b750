"""Which drafter pays: tokens a step, and tokens per second compared with plain decoding, by workload and K.

    python scripts/bench_drafters.py --pair embedded --output benchmarks/results/bench_drafters-embedded.json
    python scripts/bench_drafters.py --pair smollm2 --prompts FILE --workload prompts edits json again
    python scripts/bench_drafters.py --draft build/pairs/smollm2/target --workload prompts
    python scripts/bench_drafters.py --draft specdec/assets/eagle3

Target, draft models and draft heads in 4 bits, compiled; interleaved rounds of whole calls, prompts included. Ratios
are taken within a round; "step" is what a step takes in plain steps: tokens a step over that ratio. Automatic K is also
compared with the fastest constant K of the same drafter, or with plain decoding where that is faster.

Workloads: "prompts", the embedded ones or those of a file; "edits", code that is to be written again with a change;
"json", records as JSON; "again", the prompts asked twice, of which the second time counts. In all others a drafter
begins each round without earlier answers. With a chat template, prompts are turns of a user. --draft: of a draft model
of another tokenizer, the report has the fraction of the target's ids that it can draft.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_peers import find_pair
from common.interleaved import interleave
from common.report import emit
from peers import setup
from peers.engines import override, using_threads
from peers.machine import CpuTimes
from peers.measure import ratios
from peers.pairs import NAMES, load_int4
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

import specdec
from specdec.core.interfaces import Drafter
from specdec.core.sampling import Verification
from specdec.drafters.head_checkpoint import is_head
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.resolve import check_pair, resolve_drafter, with_suffix_decoding
from specdec.drafters.suffix import FinishedTexts, SuffixDecoding
from specdec.experiments.workloads import Dataset, Stdlib, encode
from specdec.runtime.loading import load_tokenizer
from specdec.utils.provenance import provenance

WORKLOADS = ("prompts", "edits", "json", "again")
COMPILED = True
BY_TOKEN = "draft model, by token"  # verified token by token, in sampled calls
PAD = 0
PEOPLE = ("Ada Byron", "Alan Turing", "Grace Hopper", "Edsger Dijkstra", "Barbara Liskov", "Donald Knuth")
CITIES = ("London", "Paris", "New York", "Rotterdam", "Los Angeles", "Milwaukee")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A drafter with its K, which is None for plain decoding."""

    name: str
    drafter: PreTrainedModel | Drafter | str
    num_draft_tokens: int | str | None
    verification: Verification = "block"

    def __str__(self) -> str:
        return self.name if self.num_draft_tokens is None else f"{self.name} K={self.num_draft_tokens}"


@dataclass(frozen=True)
class Pass:
    """All calls of a candidate: new ids of each row; drafted and accepted ids; steps: a step of B rows counts as B."""

    ids: list[list[int]]
    seconds: float
    steps: int
    drafted: int
    accepted: int


def texts_of(workload: str, file: str | None, count: int) -> list[str]:
    """The prompts of a workload."""
    own = [prompt.turns[0] for prompt in (Stdlib() if file is None else Dataset(file)).prompts()]
    if workload in ("prompts", "again"):
        return own[:count]
    if workload == "edits":
        code = [prompt.turns[0] for prompt in Stdlib().prompts()][:count]
        return [
            f"Write this code again, with a comment above each method:\n\n{one}\n\n# The new code:\n" for one in code
        ]
    rng, prompts = random.Random(0), []
    for _ in range(count):
        records = "\n".join(f"{rng.choice(PEOPLE)}, {rng.randint(20, 90)}, {rng.choice(CITIES)}" for _ in range(6))
        keys = 'a list of objects with the keys "name", "age" and "city"'
        prompts.append(f'Write these records as JSON, as {keys}:\n\n{records}\n\n[{{"name": ')
    return prompts


class Bench:
    """One workload in batches of a size, and the candidates' passes over it."""

    def __init__(self, target: PreTrainedModel, prompts: Sequence[list[int]], args: argparse.Namespace) -> None:
        self.target, self.new_tokens, self.threads = target, args.new_tokens, args.threads
        self.prompts = prompts

    def run(self, candidate: Candidate, batch: int, sampled: bool, again: bool, seed: int) -> Pass:
        """One call for each batch of prompts; again: after the same calls, untimed."""
        k = candidate.num_draft_tokens or 1
        with (
            using_threads(self.threads),
            override(self.target.generation_config, eos_token_id=None),
            warned_as_errors(),
        ):
            specdec.enable(
                self.target,
                without_answers(candidate.drafter),
                num_draft_tokens=k,
                compile=COMPILED,
                verification=candidate.verification,
            )
            try:
                for _ in range(int(again)):
                    self._pass(batch, sampled, seed)
                return self._pass(batch, sampled, seed)
            finally:
                specdec.disable(self.target)

    def _pass(self, batch: int, sampled: bool, seed: int) -> Pass:
        torch.manual_seed(seed)
        ids: list[list[int]] = []
        seconds, steps, drafted, accepted = 0.0, 0, 0, 0
        sampling: dict[str, Any] = {"do_sample": sampled} | ({"top_k": 0, "top_p": 1.0} if sampled else {})
        for at in range(0, len(self.prompts), batch):
            rows = self.prompts[at : at + batch]
            width = max(map(len, rows))
            inputs = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            started = time.perf_counter()
            output = self.target.generate(
                inputs, attention_mask=mask, max_new_tokens=self.new_tokens, pad_token_id=PAD, **sampling
            )
            seconds += time.perf_counter() - started
            stats = specdec.last_stats(self.target)
            assert stats is not None
            ids += output[:, width:].tolist()
            steps += stats.num_target_forwards * len(rows)
            drafted += stats.num_draft_tokens
            accepted += stats.num_accepted_draft_tokens
        return Pass(ids, seconds, steps, drafted, accepted)


def without_answers(drafter: PreTrainedModel | Drafter | str) -> PreTrainedModel | Drafter | str:
    """The same drafter, whose cost model goes on, once suffix decoding has forgotten all earlier answers."""
    suffix = drafter.suffix if isinstance(drafter, SuffixHybrid) else drafter
    if isinstance(suffix, SuffixDecoding):
        suffix.finished_texts = FinishedTexts(suffix.depth, suffix.finished_texts.max_ids)
    return drafter


@contextmanager
def warned_as_errors() -> Iterator[None]:
    """Figures of forwards that run eagerly would be another's."""
    with warnings.catch_warnings(action="error" if COMPILED else "default", category=UserWarning):
        warnings.filterwarnings("ignore", message="the draft model has another tokenizer")
        yield


def compared(candidates: Sequence[Candidate], sampling: str) -> list[Candidate]:
    """Those whose texts or times can differ: greedy calls have one way to verify."""
    return [candidate for candidate in candidates if sampling == "sampled" or candidate.name != BY_TOKEN]


def measure(
    bench: Bench, candidates: Sequence[Candidate], batch: int, sampled: bool, again: bool, rounds: int, on_call: Any
) -> list[dict[str, Any]]:
    """One row for each candidate; the first is plain decoding."""

    def run(candidate: Candidate, index: int) -> Pass:
        return bench.run(candidate, batch, sampled, again, seed=index)

    passes = interleave(
        {candidate: partial(run, candidate) for candidate in candidates},
        rounds,
        warm_up=1,
        on_call=on_call,
    )
    rates = {c: [bench.new_tokens * len(one.ids) / one.seconds for one in made] for c, made in passes.items()}
    plain = candidates[0]
    rows = []
    for candidate, made in passes.items():
        tokens = sum(bench.new_tokens * len(one.ids) for one in made)
        drafted = sum(one.drafted for one in made)
        tokens_per_step = tokens / sum(one.steps for one in made)
        to_plain = ratios(rates[candidate], rates[plain])
        best = fastest_constant(candidate, rates)
        pairs = zip(made, passes[plain], strict=True)
        same = [a == b for one, other in pairs for a, b in zip(one.ids, other.ids, strict=True)]
        rows.append(
            {
                "batch": batch,
                "sampling": "sampled" if sampled else "greedy",
                "drafter": candidate.name,
                "num_draft_tokens": candidate.num_draft_tokens,
                "tokens_per_second": round(statistics.median(rates[candidate]), 1),
                "ratio_to_plain": to_plain,
                "ratio_to_best": None if best is None else ratios(rates[candidate], rates[best]),
                "best": None if best is None else best.num_draft_tokens or 0,
                "tokens_per_step": round(tokens_per_step, 3),
                "step_in_plain_steps": round(tokens_per_step / to_plain["median"], 3),
                "acceptance": round(sum(one.accepted for one in made) / drafted, 3) if drafted else None,
                "identical_rows": None if sampled else sum(same),
                "rows": len(same),
            }
        )
    return rows


def fastest_constant(auto: Candidate, rates: dict[Candidate, list[float]]) -> Candidate | None:
    """Of a candidate with automatic K: the same drafter with the fastest constant K, or plain decoding; else None."""
    if auto.num_draft_tokens != "auto":
        return None
    others = [c for c in rates if c.num_draft_tokens is None or (c.name == auto.name and c is not auto)]
    return max(others, key=lambda candidate: statistics.median(rates[candidate]))


def fastest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a workload's rows the fastest K for each batch size and way of sampling; plain decoding where none pays.

    Without automatic K, which may be plain decoding too.
    """
    calls = dict.fromkeys((row["batch"], row["sampling"]) for row in rows)
    constant = [row for row in rows if row["num_draft_tokens"] != "auto"]
    return [
        max(
            (row for row in constant if (row["batch"], row["sampling"]) == call),
            key=lambda row: float(row["ratio_to_plain"]["median"]),
        )
        for call in calls
    ]


def describe(row: dict[str, Any]) -> str:
    """The drafter and K of a row, and what holds it back, in one line."""
    call = f"batch {row['batch']}, {row['sampling']}"
    k, step = row["num_draft_tokens"], row["step_in_plain_steps"]
    if k is None:
        return f"{call}: plain decoding is fastest"
    return (
        f"{call}: {row['drafter']} K={k} is fastest, {row['ratio_to_plain']['median']:.2f} times plain;"
        f" {row['tokens_per_step']:.2f} tokens a step that takes {step:.2f} plain ones, so {(k + 1) / step:.2f} times"
        " if all K were proposed and accepted"
    )


def show(report: dict[str, Any]) -> None:
    """One table for each workload, with the fastest drafters below."""
    console = Console(width=max(120, Console().width))
    for workload, rows in report["workloads"].items():
        table = Table(title=f"{report['pair']}, {workload}", title_justify="left")
        for column in ("batch", "", "drafter", "K"):
            table.add_column(column)
        for column in ("tokens/s", "over plain", "low … high", "over best K", "tokens a step", "step", "accepted"):
            table.add_column(column, justify="right")
        table.add_column("plain texts", justify="right")
        for row in rows:
            ratio, acceptance = row["ratio_to_plain"], row["acceptance"]
            spread = f"{ratio['low']:.2f} … {ratio['high']:.2f}"
            best = "" if row["best"] is None else f"{row['ratio_to_best']['median']:.2f} (K={row['best']})"
            table.add_row(
                str(row["batch"]), row["sampling"], row["drafter"], str(row["num_draft_tokens"] or "–"),
                f"{row['tokens_per_second']:.0f}", f"{ratio['median']:.2f}", spread, best,
                f"{row['tokens_per_step']:.2f}", f"{row['step_in_plain_steps']:.2f}",
                "–" if acceptance is None else f"{acceptance:.0%}",
                "–" if row["identical_rows"] is None else f"{row['identical_rows']}/{row['rows']}",
            )  # fmt: skip
        console.print(table)
        for row in fastest(rows):
            console.print(describe(row), highlight=False)


def _add(drafters: dict[str, PreTrainedModel | Drafter | str], name: str, drafter: PreTrainedModel | Drafter) -> None:
    if name in drafters:
        raise ValueError(f"--draft names two drafters of one kind ({name}); give one of each")
    drafters[name] = drafter


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help=f"{', '.join(NAMES)}, or a folder with target/ and draft/")
    parser.add_argument(
        "--draft",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a further draft model, or a draft head; repeatable",
    )
    parser.add_argument(
        "--prompts", help="a json or jsonl file, or a dataset on the hub; default: the embedded prompts"
    )
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["prompts", "again"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sampling", nargs="+", choices=("greedy", "sampled"), default=["greedy", "sampled"])
    parser.add_argument("--num-draft-tokens", nargs="+", default=["3", "6", "auto"], metavar="K")
    parser.add_argument("--count", type=int, default=16, help="prompts of a workload (16)")
    parser.add_argument("--max-prompt-tokens", type=int, default=256, help="of a longer prompt the last ones (256)")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    logging.disable_progress_bar()
    origin = provenance("cpu")
    try:
        pair = find_pair(args.pair, console)
        target, tokenizer = pair.load_int4(args.dtype), load_tokenizer(str(pair.target))
        as_chat = getattr(tokenizer, "chat_template", None) is not None
        prompts = {
            name: [
                encode((text,), [], tokenizer, as_chat)[-args.max_prompt_tokens :]
                for text in texts_of(name, args.prompts, args.count)
            ]
            for name in args.workload
        }
        drafters: dict[str, PreTrainedModel | Drafter | str] = {}
        if pair.draft is not None:
            draft = pair.load_draft(args.dtype, int4=True)
            drafters |= dict.fromkeys(("draft model", BY_TOKEN), draft)
            drafters["suffix + draft model"] = with_suffix_decoding(draft, target)
        drafters |= {"prompt lookup": resolve_drafter("prompt_lookup", target), "suffix": SuffixDecoding()}
        coverage = None
        for path in args.draft:
            if is_head(str(path), target.config):
                head: Any = resolve_drafter(path, target)
                head.quantize(setup.GROUP_SIZE)
                _add(drafters, head.head.kind.partition(" ")[2], head)
                continue
            further = load_int4(path, args.dtype)
            _add(drafters, "further draft", further)
            with warned_as_errors():
                shared = check_pair(target, further)
            coverage = 1.0 if shared is None else round(shared.coverage, 4)
    except ValueError as error:
        console.print(f"bench_drafters: {error}", style="red")
        return 1
    lengths = [int(k) if k.isdecimal() else k for k in args.num_draft_tokens]
    candidates = [Candidate("plain", "none", None)]
    candidates += [
        Candidate(name, drafter, k, "token" if name == BY_TOKEN else "block")
        for name, drafter in drafters.items()
        for k in lengths
    ]
    before = CpuTimes.now()
    workloads: dict[str, list[dict[str, Any]]] = {}
    with Progress(console=console) as progress:
        num_compared = sum(len(compared(candidates, sampling)) for sampling in args.sampling)
        total = len(prompts) * len(args.batch) * num_compared * (1 + args.rounds)
        task = progress.add_task("", total=total)
        for name, ids in prompts.items():
            bench, workloads[name] = Bench(target, ids, args), []
            for batch in args.batch:
                for sampling in args.sampling:

                    def on_call(
                        candidate: Candidate, index: int, what: str = f"{name}, batch {batch}, {sampling}"
                    ) -> None:
                        progress.update(task, advance=1, description=f"{what}: {candidate}")

                    chosen, is_sampled = compared(candidates, sampling), sampling == "sampled"
                    workloads[name] += measure(bench, chosen, batch, is_sampled, name == "again", args.rounds, on_call)
    after = CpuTimes.now()
    idle = None if before is None or after is None else round(before.idle_otherwise(after), 3)
    report = {
        "script": "bench_drafters",
        "pair": pair.name,
        "provenance": origin | {"idle_otherwise": idle},
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "draft": [str(path) for path in args.draft],
        "draft_coverage": coverage,
        "workloads": workloads,
    }
    show(report)
    emit(report, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
