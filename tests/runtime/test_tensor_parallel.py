"""A model that is split over two processes: both run the same steps, whatever their clocks say."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import time
import traceback
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

import specdec
from specdec.core import timing as clock
from specdec.draft_length import adaptive
from specdec.draft_length import profiler as profiling
from specdec.generation import call as served
from specdec.runtime.cpu_compile.eligibility import why_not_compiled
from specdec.runtime.cpu_compile.packages import _is_missing
from specdec.runtime.pair import PairMember
from specdec.runtime.runner import ModelRunner
from specdec.runtime.tensor_parallel import Ranks, tensor_parallel_group
from tests.helpers.draft_length import erratic_k
from tests.helpers.families import FAMILIES, make_model, prompts

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo")

SECONDS = 180  # until processes that wait for each other are ended
NEW_TOKENS = 24


def own_clock(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Time that passes by chance, so slowly on rank 0 that a profile times each K, on rank 1 too fast for that."""
    coins, now = random.Random(rank), 0.0

    def perf_counter() -> float:
        nonlocal now
        now += coins.uniform(0, 0.5 if rank else 0.004)
        return now

    for module in (clock, profiling):
        patch.setattr(module, "time", types.SimpleNamespace(perf_counter=perf_counter))
    patch.setattr(adaptive, "perf_counter", perf_counter)
    patch.setattr(served, "COST_MODELS", weakref.WeakKeyDictionary())


class Pair:
    """The target, split over the ranks, enabled with a whole draft model on each, and what its calls gave."""

    def __init__(self, folder: Path) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(folder / "target", tp_plan="auto").eval()
        self.draft = AutoModelForCausalLM.from_pretrained(folder / "draft").eval()
        self.plain = {batch_size: self.call(batch_size)["text"] for batch_size in (1, 4)}
        specdec.enable(self.target, self.draft)

    def call(self, batch_size: int, **arguments: Any) -> dict[str, Any]:
        torch.manual_seed(5)
        asked = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | arguments
        text = self.target.generate(**prompts(batch_size), **asked)
        stats = specdec.last_stats(self.target)
        found = {"text": text.tolist(), "steps": stats and stats.num_steps}
        if stats is not None and stats.choice is not None:
            found |= {"steps_by_k": stats.choice.steps_by_k, "choice": str(stats.choice)}
        return found

    def calls(self, **arguments: Any) -> list[dict[str, Any]]:
        return [self.call(batch_size, **arguments) | {"plain": self.plain[batch_size]} for batch_size in (1, 4, 1, 4)]


class PassesOnRank0(StoppingCriteria):
    """A time limit that one rank sees pass, and the other never."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.rank == 0 and input_ids.shape[1] >= 20)


def clocks_differ(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    own_clock(patch, rank)
    return pair.calls()


def times_jump(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    erratic_k(patch, seed=rank)
    return pair.calls()


def sampled(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    erratic_k(patch, seed=rank)
    return [call | {"plain": None} for call in pair.calls(do_sample=True)]


def one_rank_has_a_profile(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each rank once."""
    found = []
    for forgetful in (0, 1):
        own_clock(patch, rank)
        pair.calls()
        if rank == forgetful:
            served.COST_MODELS.clear()
        found += pair.calls()
    return found


def a_criterion_has_a_clock(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    own_clock(patch, rank)
    calls = [pair.call(1, stopping_criteria=[PassesOnRank0(rank)]) for _ in range(2)]
    return [call | {"plain": [pair.plain[1][0][:20]]} for call in calls]


def the_device_has_another_backend(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As with NCCL: what is decided goes by a gloo group of its own, which is made once."""
    own_clock(patch, rank)
    made: list[Any] = []
    new_group = dist.new_group
    patch.setattr(dist, "get_backend", lambda group: "nccl")
    patch.setattr(dist, "new_group", lambda *args, **kwargs: made.append(new_group(*args, **kwargs)) or made[-1])
    found = pair.calls()
    assert len(made) == 1
    assert Ranks(pair.target).group is made[0]
    assert Ranks(pair.target).group is not tensor_parallel_group(pair.target)
    return found


def a_draft_is_split_too(pair: Pair, rank: int, patch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    own_clock(patch, rank)
    whole = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    split = AutoModelForCausalLM.from_pretrained(folder / "draft", tp_plan="auto").eval()
    plain = pair.target
    specdec.enable(whole, split)
    pair.target = whole
    found = pair.calls()
    pair.target = plain
    return found


def whole_models(pair: Pair, rank: int, patch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """Data parallelism: each rank calls a model of its own, one more often than the other."""
    own_clock(patch, rank)
    whole = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    assert Ranks(whole, pair.draft).group is None
    specdec.enable(whole, pair.draft)
    for _ in range(1 + 2 * rank):
        whole.generate(**prompts(1), max_new_tokens=NEW_TOKENS)
    return []


def compiling_is_left(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that was compiled of the whole model has the same name, and would not fit."""
    assert "several processes" in (why_not_compiled(ModelRunner(pair.target)) or "")
    assert not _is_missing(PairMember("target", ModelRunner(pair.target), exact=True))
    return []


CASES: list[Callable[..., list[dict[str, Any]]]] = [
    clocks_differ, times_jump, sampled, one_rank_has_a_profile, a_criterion_has_a_clock, the_device_has_another_backend,
    a_draft_is_split_too, whole_models, compiling_is_left,
]  # fmt: skip


def run_rank(rank: int, port: int, folder: Path) -> None:
    """One process: every case, with its result, or what went wrong, in a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    pair = Pair(folder)
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            try:
                more = [folder][: case.__code__.co_argcount - 3]
                result: Any = case(pair, rank, patch, *more)
            except Exception:
                result = traceback.format_exc()
        (folder / f"{case.__name__}-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
        if isinstance(result, str):
            os._exit(1)  # the other rank waits for this one
    dist.destroy_process_group()


def run_ranks(folder: Path) -> None:
    """Run two processes that leave their results in the folder; whatever they do, they have ended."""
    models: dict[str, PreTrainedModel] = {
        "target": make_model("llama", **FAMILIES["llama"]),
        "draft": make_model("llama", **FAMILIES["llama"]),
    }
    for parameter in models["draft"].parameters():  # right for the most member
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, port, folder), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    ends = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
        if process.exitcode != 0:
            ends = min(ends, time.monotonic() + 10)  # what the other rank can still do without it
    for process in processes:
        process.kill()
        process.join()


def test_ranks_run_the_same_steps(tmp_path: Path) -> None:
    run_ranks(tmp_path)
    for case in CASES:
        results = []
        for rank in (0, 1):
            path = tmp_path / f"{case.__name__}-{rank}.json"
            assert path.exists(), f"rank {rank} did not finish {case.__name__}"
            results.append(json.loads(path.read_text(encoding="utf-8")))
            assert not isinstance(results[-1], str), f"rank {rank} failed in {case.__name__}: {results[-1]}"
        assert results[0] == results[1], case.__name__
        for call in results[0]:
            assert call["plain"] in (None, call["text"]), case.__name__
        if results[0]:
            by_k = [sum(counts) for counts in zip(*(call["steps_by_k"] for call in results[0]), strict=True)]
            assert sum(by_k[1:]), f"{case.__name__} never drafted"


def test_nothing_is_sent_where_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks(make_model("llama", **FAMILIES["llama"]))
    for name in ("broadcast", "broadcast_object_list", "all_reduce", "new_group"):
        monkeypatch.setattr(dist, name, None)
    assert alone.group is None
    assert alone.is_first
    assert alone.broadcast(3) == 3
    assert alone.broadcast_choice(None) is None
    assert alone.common_graphs(None) is None
    assert alone.synchronized(bool) is bool
