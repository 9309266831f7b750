"""The runtimes that are compared: which engines each offers for a set of tasks, each with its fastest settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from peers import setup
from peers.engines import (
    Engine,
    specdec_draft,
    specdec_lookup,
    specdec_plain,
    stock_assisted,
    stock_lookup,
    stock_plain,
)
from peers.measure import OnProgress, TaskSet
from peers.pairs import Pair
from peers.worker import RemoteEngine, Worker

DTYPES = ("bfloat16", "float32")
LLAMACPP_TARGETS, LLAMACPP_DRAFTS = ("Q4_0", "Q4_K_M"), ("Q4_0", "Q8_0")
NGRAMS = (2, 3)  # lengths of the n-grams that a lookup matches, where a peer has such a setting
NOT_SET_UP = "{} is left out: it is not set up; `python scripts/bench_peers.py --setup-peers` does that"


@dataclass(frozen=True)
class Conditions:
    """What engines are wanted for.

    choose: the fastest of some candidates, which have the settings that they are named by; records what it measured.
    """

    task_set: TaskSet
    threads: int
    ks: Sequence[int]
    choose: Callable[[str, Mapping[str, Engine]], Any]


class Runtime(ABC):
    """A way to run a pair. max_tokens: of a row, prompt included."""

    name: ClassVar[str]

    def __init__(self, pair: Pair, max_tokens: int, on_progress: OnProgress) -> None:
        self.pair, self.max_tokens, self.on_progress = pair, max_tokens, on_progress

    @classmethod
    def is_set_up(cls) -> bool:
        return True

    @abstractmethod
    def engines(self, conditions: Conditions) -> list[Engine]:
        """Those that can run the tasks; plain decoding is called "plain"."""

    def close(self) -> None:  # noqa: B027  # a runtime in this process has started nothing
        """End what the runtime has started."""


class Transformers(Runtime):
    """transformers' own loops on the target in full precision; assisted ones take single rows."""

    name = "transformers"

    def engines(self, conditions: Conditions) -> list[Engine]:
        threads, choose = conditions.threads, conditions.choose
        targets = {dtype: stock_plain(self.name, self.pair.load_dense(dtype), threads) for dtype in DTYPES}
        plain = choose("plain", targets)
        engines = [plain]
        if conditions.task_set.batch == 1:
            dtype = plain.weights
            if self.pair.draft is not None:
                draft = self.pair.load_draft(dtype, int4=False)
                assisted = {f"K={k}": stock_assisted(self.name, plain.target, threads, draft, k) for k in conditions.ks}
                engines.append(choose("assisted", assisted))
            lookup = {f"K={k}": stock_lookup(self.name, plain.target, threads, k) for k in conditions.ks}
            engines.append(choose("prompt lookup", lookup))
        return engines


class Specdec(Runtime):
    """specdec on the target in 4 bits, and transformers' own loop on the same model."""

    name = "specdec"

    def engines(self, conditions: Conditions) -> list[Engine]:
        threads, choose, ks = conditions.threads, conditions.choose, conditions.ks
        candidates = {dtype: specdec_plain(self.pair.load_int4(dtype), threads) for dtype in DTYPES}
        plain = choose("plain", candidates)
        target = plain.target
        dtype = next(name for name, engine in candidates.items() if engine is plain)
        engines = [stock_plain(self.name, target, threads, "4-bit, stock loop"), plain]
        if self.pair.draft is not None:
            drafts = {name: self.pair.load_draft(dtype, int4=name == "4 bits") for name in (dtype, "4 bits")}
            drafted = {
                f"draft in {name}, K={k}": specdec_draft(target, threads, draft, k)
                for name, draft in drafts.items()
                for k in ks
            }
            fixed = choose("draft model", drafted)
            engines += [fixed, specdec_draft(target, threads, fixed.drafter, "auto")]
        engines.append(choose("prompt lookup", {f"K={k}": specdec_lookup(target, threads, k) for k in ks}))
        return engines


class Peer(Runtime):
    """A runtime in a process of its own."""

    command: ClassVar[Sequence[str]]

    @cached_property
    def worker(self) -> Worker:
        return Worker(self.name, [str(word) for word in self.command], setup.BUILD / f"{type(self).__name__}.log")

    def fastest(
        self, conditions: Conditions, name: str, common: tuple[str, Path, int], candidates: Mapping[str, dict[str, Any]]
    ) -> Any:
        """The fastest of the engines called `name`, whose further settings are named by the candidates' keys.

        common: an engine's format of the weights, target and threads.
        """
        engines = {key: RemoteEngine(self.worker, name, *common, **settings) for key, settings in candidates.items()}
        return conditions.choose(name, engines)

    def close(self) -> None:
        if "worker" in self.__dict__:
            self.worker.close()


class OpenVino(Peer):
    """OpenVINO GenAI with continuous batching."""

    name = "OpenVINO"
    command = (setup.PYTHON, setup.HERE / "openvino_worker.py")

    @classmethod
    def is_set_up(cls) -> bool:
        return setup.PYTHON.exists()

    def engines(self, conditions: Conditions) -> list[Engine]:
        target, ks = setup.export_openvino(self.pair.target, self.on_progress), conditions.ks
        common = (f"4 bits, groups of {setup.GROUP_SIZE}", target, conditions.threads)
        engines: list[Engine] = [RemoteEngine(self.worker, "plain", *common)]
        if self.pair.draft is not None:
            draft = setup.export_openvino(self.pair.draft, self.on_progress)
            drafted = {f"K={k}": {"draft": draft, "num_draft_tokens": k} for k in ks}
            engines.append(self.fastest(conditions, "draft model", common, drafted))
        lookup = {f"K={k}": {"lookup": True, "num_draft_tokens": k} for k in ks}
        engines.append(self.fastest(conditions, "prompt lookup", common, lookup))
        return engines


class OnnxRuntime(Peer):
    """ONNX Runtime GenAI; it speculates for single rows alone, and looks up n-grams greedily alone."""

    name = "ONNX Runtime"
    command = (setup.PYTHON, setup.HERE / "onnxruntime_worker.py")

    @classmethod
    def is_set_up(cls) -> bool:
        return setup.PYTHON.exists()

    def engines(self, conditions: Conditions) -> list[Engine]:
        target, ks = setup.export_onnx(self.pair.target, self.on_progress), conditions.ks
        common = (f"4 bits, groups of {setup.ONNX_BLOCK_SIZE}", target, conditions.threads)
        engines: list[Engine] = [RemoteEngine(self.worker, "plain", *common)]
        if conditions.task_set.batch > 1:
            return engines
        if self.pair.draft is not None:
            both = setup.join_onnx(target, setup.export_onnx(self.pair.draft, self.on_progress))
            drafted = {f"K={k}": {"draft": both, "num_draft_tokens": k} for k in ks}
            engines.append(self.fastest(conditions, "draft model", common, drafted))
        if not conditions.task_set.sampled:
            lookup = {f"K={k}, n={n}": {"lookup": True, "num_draft_tokens": k, "ngram": n} for k in ks for n in NGRAMS}
            engines.append(self.fastest(conditions, "n-gram lookup", common, lookup))
        return engines


class LlamaCpp(Peer):
    """llama.cpp, its weights repacked for this processor; rows of a batch share a KV cache or have one each."""

    name = "llama.cpp"
    command = (setup.LLAMACPP_WORKER,)

    @classmethod
    def is_set_up(cls) -> bool:
        return setup.PYTHON.exists() and setup.LLAMACPP_WORKER.exists()

    def engines(self, conditions: Conditions) -> list[Engine]:
        ks, choose, batch = conditions.ks, conditions.choose, conditions.task_set.batch
        targets = {
            kind: setup.export_gguf(self.pair.target, kind, self.worker, self.on_progress) for kind in LLAMACPP_TARGETS
        }
        caches = {"": True} if batch == 1 else {", one cache": True, ", a cache each": False}
        context = self.max_tokens + max(ks) + 1

        def candidates(name: str, kinds: Sequence[str], **settings: Any) -> dict[str, Engine]:
            return {
                f"{kind}{cache}": RemoteEngine(
                    self.worker, name, kind, targets[kind], conditions.threads, **settings,
                    options={"rows": batch, "context": context, "unified": unified},
                )
                for kind in kinds
                for cache, unified in caches.items()
            }  # fmt: skip

        plain = choose("plain", candidates("plain", LLAMACPP_TARGETS))
        engines = [plain]
        kinds = (plain.weights,)
        if self.pair.draft is not None:
            drafts = {
                kind: setup.export_gguf(self.pair.draft, kind, self.worker, self.on_progress)
                for kind in LLAMACPP_DRAFTS
            }
            drafted = {
                f"{setting}, draft in {kind}, K={k}": engine
                for kind, draft in drafts.items()
                for k in ks
                for setting, engine in candidates("draft model", kinds, draft=draft, num_draft_tokens=k).items()
            }
            engines.append(choose("draft model", drafted))
        # It drafts nothing where fewer ids than an n-gram has follow it.
        lookup = {
            f"{setting}, K={k}, n={n}": engine
            for k in ks
            for n in NGRAMS
            if n <= k
            for setting, engine in candidates("n-gram lookup", kinds, lookup=True, num_draft_tokens=k, ngram=n).items()
        }
        if lookup:
            engines.append(choose("n-gram lookup", lookup))
        return engines


RUNTIMES: dict[str, type[Runtime]] = {
    "transformers": Transformers,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "llamacpp": LlamaCpp,
    "specdec": Specdec,
}
