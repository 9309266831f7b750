"""The embedded pair in large shapes, the target in 4 bits: specdec against transformers' own loops, greedy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
import widen_pair
from peers.engines import Engine, SpecdecEngine, specdec_draft, specdec_plain, stock_assisted, stock_plain
from peers.measure import TaskSet, Tuning, compare, tune
from transformers import AutoTokenizer, PreTrainedModel

from gpu_suite.messages import log
from gpu_suite.rows import goal
from gpu_suite.suite import Row, Section, Suite
from specdec.quant.quantizer import Int4Config
from specdec.runtime.loading import load
from specdec.utils import embedded

PROMPT_TOKENS = 64
GROUP_SIZE = 64
LONG_STEP = 3  # tokens a step, from which drafting should double the speed


def run(suite: Suite) -> Row:
    sizes = suite.sizes
    options = {"device": str(suite.device), "dtype": torch.bfloat16 if suite.cuda else torch.float32}
    started = time.perf_counter()
    original = load(str(widen_pair.ORIGINAL), "float32", "cpu")
    target = widen_pair.widen(original, sizes.target_shape, int4=Int4Config(GROUP_SIZE), **options)
    suite.synchronize()
    built = {"parameters": sizes.target_shape.num_parameters, "build_s": time.perf_counter() - started}
    log(f"  built {built['parameters'] / 1e6:,.0f} million parameters in {built['build_s']:.0f} s")
    source = load(str(embedded.DRAFT), "float32", "cpu")
    drafts = {name: widen_pair.widen(source, shape, **options) for name, shape in sizes.draft_shapes}
    tokenizer = AutoTokenizer.from_pretrained(str(embedded.TARGET))
    encoded = (tokenizer(prompt["prompt"]).input_ids for prompt in embedded.prompts())
    prompts = [ids[:PROMPT_TOKENS] for ids in encoded if len(ids) >= PROMPT_TOKENS]
    results, tunings = [], []
    for batch in sizes.peer_batches:
        task_set = TaskSet(batch, False, prompts[: max(batch, 2)], sizes.new_tokens)
        engines, tuned = make_engines(target, drafts, task_set, sizes.peer_draft_lengths)
        for engine in engines:
            if isinstance(engine, SpecdecEngine):
                engine.compiled = suite.cuda  # a dry run on a CPU would compile for minutes
        results += compare(engines, task_set, sizes.peer_rounds, log_progress)
        tunings += tuned
    for row in results:
        row |= {f"ratio_to_{name}": row[f"ratio_to_{name}"]["median"] for name in ("baseline", "own_plain")}
    add_bounds(results, sizes.new_tokens)
    goals = [goal("8 billion parameters built in a minute", "build_s", max, 60, [built]), *make_goals(results)]
    return built | {"results": results, "tuned": [asdict(one) for one in tunings], "goals": goals}


def log_progress(text: str) -> None:
    log(f"  {text}")


def make_engines(
    target: PreTrainedModel, drafts: dict[str, PreTrainedModel], task_set: TaskSet, draft_lengths: Sequence[int]
) -> tuple[list[Engine], list[Tuning]]:
    """transformers' plain loop, its assisted one with the best K (batch 1 only), and specdec, on one 4-bit target."""
    threads, tunings = torch.get_num_threads(), []
    engines: list[Engine] = [stock_plain("transformers", target, threads)]
    for name, draft in drafts.items() if task_set.batch == 1 else ():
        candidates = {
            k: stock_assisted("transformers", target, threads, draft, k, f"assisted by {name}") for k in draft_lengths
        }
        best, tuning = tune(f"transformers assisted by {name}", candidates, task_set, log_progress)
        engines.append(best)
        tunings.append(tuning)
    engines.append(specdec_plain(target, threads))
    engines += [
        specdec_draft(target, threads, draft, k, f"draft {name}")
        for name, draft in drafts.items()
        for k in (*draft_lengths, "auto")
    ]
    return engines, tunings


def add_bounds(results: Sequence[Row], new_tokens: int) -> None:
    """Add to each row with a constant K what the cost model allows, and the share of time without work.

    ratio_bound: tokens per step * T_target(1) / (T_target(K+1) + K T_draft). fraction_idle: of the step of an untimed
    call, what the device did not spend on the draft, the target or the verification.
    """
    for row in results:
        if row["runtime"] != "specdec" or row["num_draft_tokens"] in (None, "auto"):
            continue
        plain = next(
            r for r in results if (r["runtime"], r["engine"], r["batch"]) == ("specdec", "plain", row["batch"])
        )
        row["ratio_bound"] = row["tokens_per_step"] * plain["target_ms"] / (row["target_ms"] + row["draft_ms"])
        row["fraction_of_bound"] = row["ratio_to_own_plain"] / row["ratio_bound"]
        call_ms = 1000 * row["batch"] * new_tokens / row["tokens_per_second"] - row["prompt_ms"]
        busy_ms = row["draft_ms"] + row["target_ms"] + row["verification_ms"]
        row["fraction_idle"] = 1 - busy_ms * new_tokens / row["tokens_per_step"] / call_ms


def make_goals(results: Sequence[Row]) -> list[Row]:
    """Goals for a pair of these sizes; a goal is left out where no row is about it."""
    single = [row for row in results if "ratio_bound" in row and row["batch"] == 1]
    assisted = [row for row in results if row["engine"].startswith("assisted")]
    long_steps = [row for row in single if row["tokens_per_step"] >= LONG_STEP]
    largest_batch = max(row["batch"] for row in results)
    auto = [row for row in results if row["num_draft_tokens"] == "auto" and row["batch"] == largest_batch]
    goals = [
        goal("launch gaps under 5 % of a step, batch 1", "fraction_idle", max, 0.05, single),
        goal("90 % of the cost model's bound, batch 1", "fraction_of_bound", min, 0.9, single),
    ]
    if long_steps:
        best = max(long_steps, key=lambda row: row["ratio_to_own_plain"])
        text = "2 times plain decoding with graphs, of 3 tokens a step, batch 1"
        goals.append(goal(text, "ratio_to_own_plain", min, 2.0, [best]))
    if assisted:
        fastest = max(row["tokens_per_second"] for row in single)
        ratio = fastest / max(row["tokens_per_second"] for row in assisted)
        goals.append(goal("3 times transformers' assisted decoding", "ratio", min, 3.0, [{"ratio": ratio, "batch": 1}]))
    if not any(row["tokens_per_step"] == 1 for row in auto):  # K = 0 meets the goal too
        text = f"1.3 times plain decoding at batch {largest_batch}, or K = 0"
        goals.append(goal(text, "ratio_to_own_plain", min, 1.3, auto))
    return goals


SECTION = Section("peers", run)
