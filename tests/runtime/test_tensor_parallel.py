"""A model that is split over two processes: both run the same steps, even if they measure different times."""

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
from specdec.core import timing
from specdec.draft_length import adaptive, profiler
from specdec.generation import call as generation_call
from specdec.runtime.cpu_compile.eligibility import why_not_compiled
from specdec.runtime.cpu_compile.packages import _is_missing
from specdec.runtime.pair import PairMember
from specdec.runtime.runner import ModelRunner
from specdec.runtime.tensor_parallel import Ranks, tensor_parallel_group
from tests.helpers.draft_length import erratic_k
from tests.helpers.families import FAMILIES, make_model, prompts

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch's gloo")

TIMEOUT_S = 180  # after which processes that wait for each other are killed
NEW_TOKENS = 24


def own_times(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Random times: on rank 0 so short that a profile measures every K, on rank 1 too long for that."""
    generator, now = random.Random(rank), 0.0

    def perf_counter() -> float:
        nonlocal now
        now += generator.uniform(0, 0.5 if rank else 0.004)
        return now

    for module in (timing, profiler):
        patch.setattr(module, "time", types.SimpleNamespace(perf_counter=perf_counter))
    patch.setattr(adaptive, "perf_counter", perf_counter)
    patch.setattr(generation_call, "COST_MODELS", weakref.WeakKeyDictionary())


class Pair:
    """The target, split over the ranks, enabled with a whole draft model on each rank."""

    def __init__(self, folder: Path) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(folder / "target", tp_plan="auto").eval()
        self.draft = AutoModelForCausalLM.from_pretrained(folder / "draft").eval()
        self.plain = {batch_size: self.call(batch_size)["text"] for batch_size in (1, 4)}
        specdec.enable(self.target, self.draft)

    def call(self, batch_size: int, **arguments: Any) -> dict[str, Any]:
        torch.manual_seed(5)
        arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | arguments
        text = self.target.generate(**prompts(batch_size), **arguments)
        stats = specdec.last_stats(self.target)
        found = {"text": text.tolist(), "steps": stats and stats.num_steps}
        if stats is not None and stats.choice is not None:
            found |= {"steps_by_k": stats.choice.steps_by_k, "choice": str(stats.choice)}
        return found

    def calls(self, **arguments: Any) -> list[dict[str, Any]]:
        return [self.call(batch_size, **arguments) | {"plain": self.plain[batch_size]} for batch_size in (1, 4, 1)]


class PassesOnRank0(StoppingCriteria):
    """A time limit that passes on rank 0 and never on rank 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.rank == 0 and input_ids.shape[1] >= 20)


def times_differ(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    own_times(patch, rank)
    return pair.calls()


def times_jump(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    erratic_k(patch, seed=rank)
    return pair.calls()


def sampled(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    erratic_k(patch, seed=rank)
    return [call | {"plain": None} for call in pair.calls(do_sample=True)]


def one_rank_has_a_profile(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each rank loses its profile once."""
    found = []
    for rank_without in (0, 1):
        own_times(patch, rank)
        pair.calls()
        if rank == rank_without:
            generation_call.COST_MODELS.clear()
        found += pair.calls()
    return found


def a_criterion_measures_time(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    own_times(patch, rank)
    calls = [pair.call(1, stopping_criteria=[PassesOnRank0(rank)]) for _ in range(2)]
    return [call | {"plain": [pair.plain[1][0][:20]]} for call in calls]


def the_device_has_another_backend(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As with NCCL: decisions are sent by a separate gloo group, which is made once."""
    own_times(patch, rank)
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
    own_times(patch, rank)
    whole = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    split = AutoModelForCausalLM.from_pretrained(folder / "draft", tp_plan="auto").eval()
    plain = pair.target
    specdec.enable(whole, split)
    pair.target = whole
    found = pair.calls()
    pair.target = plain
    return found


def whole_models(pair: Pair, rank: int, patch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """Data parallelism: each rank calls its own model, rank 1 more often than rank 0."""
    own_times(patch, rank)
    whole = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    assert Ranks(whole, pair.draft).group is None
    specdec.enable(whole, pair.draft)
    for _ in range(1 + 2 * rank):
        whole.generate(**prompts(1), max_new_tokens=NEW_TOKENS)
    return []


def nothing_is_compiled(pair: Pair, rank: int, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that was compiled from the whole model has the same name, and would not fit."""
    assert "several processes" in (why_not_compiled(ModelRunner(pair.target)) or "")
    assert not _is_missing(PairMember("target", ModelRunner(pair.target), exact=True))
    return []


CASES: list[Callable[..., list[dict[str, Any]]]] = [
    times_differ, times_jump, sampled, one_rank_has_a_profile, a_criterion_measures_time,
    the_device_has_another_backend, a_draft_is_split_too, whole_models, nothing_is_compiled,
]  # fmt: skip


def run_rank(rank: int, port: int, folder: Path) -> None:
    """One process: run every case, and write its result or its traceback to a file."""
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
    """Run two processes that write their results to the folder; both have ended when this returns."""
    models: dict[str, PreTrainedModel] = {
        "target": make_model("llama", **FAMILIES["llama"]),
        "draft": make_model("llama", **FAMILIES["llama"]),
    }
    for parameter in models["draft"].parameters():  # mostly right
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
    ends = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
        if process.exitcode != 0:
            ends = min(ends, time.monotonic() + 10)  # for what the other rank can still do without it
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


def test_nothing_is_sent_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Ranks(make_model("llama", **FAMILIES["llama"]))
    for name in ("broadcast", "broadcast_object_list", "all_reduce", "new_group"):
        monkeypatch.setattr(dist, name, None)
    assert alone.group is None
    assert alone.is_first
    assert alone.broadcast(3) == 3
    assert alone.broadcast_choice(None) is None
    assert alone.common_graphs(None) is None
    assert alone.synchronized(bool) is bool
