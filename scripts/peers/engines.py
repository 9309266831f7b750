"""Engines that run in this process: transformers' own loops, and specdec's."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

import specdec
from specdec.quant.layers import is_4bit

Ids = list[list[int]]
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Task:
    """The input of a call: prompts of one length, so that no engine has to pad. EOS ids do not end a row."""

    prompts: Ids
    new_tokens: int
    sampled: bool = False  # temperature 1, the whole distribution; else greedy
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompts) * self.new_tokens


@dataclass(frozen=True)
class CallResult:
    """The generated ids of each row, and what the call took, prompt included.

    seconds: wall time. cpu_seconds: of all threads of the engine's process together.
    """

    ids: Ids
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class StepMeans:
    """Mean times of a call's steps. A step is one forward of the target for the whole batch.

    tokens_per_step: of a row, steps without a draft included; None where the engine does not say. prompt_ms: the call
    without its steps: preparation, the prompt and the first step. The parts are means over the other steps; None: a
    part that is in other_ms.
    """

    tokens_per_step: float | None
    prompt_ms: float
    draft_ms: float | None
    target_ms: float | None
    verification_ms: float | None
    other_ms: float


class Engine(Protocol):
    """A way to generate. Calls are made within `with engine.ready():`.

    weights: names the format of the target's weights. forward_bytes: of the weights that one forward of the target
    reads, each once, None where that is not known.
    """

    @property
    def runtime(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def num_draft_tokens(self) -> int | str | None: ...
    @property
    def threads(self) -> int: ...
    @property
    def weights(self) -> str: ...
    @property
    def forward_bytes(self) -> int | None: ...

    def ready(self) -> AbstractContextManager[None]:
        """Set up, untimed."""

    def warm_up(self, task: Task) -> None:
        """Untimed calls, where the first calls of a task take longer than later ones."""

    def generate(self, task: Task) -> CallResult:
        """One call."""

    def time_steps(self, task: Task) -> StepMeans:
        """One call whose parts are timed, which slows it down."""


@dataclass
class TransformersEngine:
    """transformers' own generate() on a target: its plain loop, or its assisted one.

    options: further arguments of generate(), such as assistant_model or prompt_lookup_num_tokens.
    """

    runtime: str
    name: str
    target: PreTrainedModel
    threads: int
    draft: PreTrainedModel | None = None
    num_draft_tokens: int | str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        dtype = str(self.target.dtype).removeprefix("torch.")
        return f"4 bits, {dtype}" if is_4bit(self.target) else dtype

    @property
    def forward_bytes(self) -> int:
        return forward_bytes(self.target)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(using_threads(self.threads))
            for model in (self.target, *([self.draft] if self.draft is not None else [])):
                stack.enter_context(override(model.generation_config, eos_token_id=None, pad_token_id=1))
            if self.draft is not None:  # K in every step, whatever the confidence of the draft
                constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
                constant["num_assistant_tokens"] = self.num_draft_tokens
                stack.enter_context(override(self.draft.generation_config, **constant))
            yield

    def warm_up(self, task: Task) -> None:
        pass

    def generate(self, task: Task) -> CallResult:
        ids = torch.tensor(task.prompts, device=self.target.device)
        sampling: dict[str, Any] = {"do_sample": task.sampled}
        if task.sampled:
            sampling |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(task.seed)
        started, cpu_started = time.perf_counter(), time.process_time()
        output = self.target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.new_tokens, **sampling | self.options
        )
        new = output[:, ids.shape[1] :].tolist()
        return CallResult(new, time.perf_counter() - started, time.process_time() - cpu_started)

    def time_steps(self, task: Task) -> StepMeans:
        models = [self.target] if self.draft is None else [self.target, self.draft]
        with TimedForwards(*models) as forwards:
            started = time.perf_counter()
            self.generate(task)
            end = time.perf_counter()
        target, draft = forwards.spans[0], [span for spans in forwards.spans[1:] for span in spans]
        begin, count = target[0][1], len(target) - 1  # after the prompt's forward
        target_s = sum(stop - start for start, stop in target[1:])
        draft_s = sum(stop - start for start, stop in draft if start > begin)
        other_s = end - begin - target_s - draft_s
        draft_ms, target_ms, other_ms = (1000 * part / count for part in (draft_s, target_s, other_s))
        return StepMeans(task.new_tokens / len(target), 1000 * (begin - started), draft_ms, target_ms, None, other_ms)


def stock_plain(runtime: str, target: PreTrainedModel, threads: int, name: str = "plain") -> TransformersEngine:
    return TransformersEngine(runtime, name, target, threads)


def stock_assisted(
    runtime: str, target: PreTrainedModel, threads: int, draft: PreTrainedModel, k: int, name: str = "assisted"
) -> TransformersEngine:
    return TransformersEngine(runtime, name, target, threads, draft, k, {"assistant_model": draft})


def stock_lookup(runtime: str, target: PreTrainedModel, threads: int, k: int) -> TransformersEngine:
    options = {"prompt_lookup_num_tokens": k}
    return TransformersEngine(runtime, "prompt lookup", target, threads, None, k, options)


@dataclass
class SpecdecEngine(TransformersEngine):
    """specdec, compiled on a CPU, in CUDA graphs on a GPU. drafter: a model, "prompt_lookup" or "none".

    On a CPU, calls raise UserWarning where a forward would run eagerly.
    """

    drafter: PreTrainedModel | str = "none"
    compiled: bool = True

    @contextmanager
    def ready(self) -> Iterator[None]:
        with super().ready(), warnings.catch_warnings():
            if self.target.device.type == "cpu" and self.compiled:  # figures of eager forwards would be another's
                warnings.filterwarnings("error", "the (target|draft) runs eagerly|specdec runs without compiled")
            self.enable()
            try:
                yield
            finally:
                specdec.disable(self.target)

    def enable(self, timing: bool = False) -> None:
        k = self.num_draft_tokens or 1
        specdec.enable(self.target, self.drafter, num_draft_tokens=k, compile=self.compiled, timing=timing)

    def warm_up(self, task: Task) -> None:
        if self.target.device.type == "cuda":  # the first calls record CUDA graphs that later ones replay
            for _ in range(WARM_UP_CALLS):
                self.generate(task)

    def time_steps(self, task: Task) -> StepMeans:
        self.enable(timing=True)
        self.warm_up(task)
        answer = self.generate(task)
        stats = specdec.last_stats(self.target)
        assert stats is not None
        assert stats.timing is not None
        timed = stats.timing.steps[1:] or stats.timing.steps  # plain steps that run together may be a single one here
        parts = ("draft_s", "target_s", "verification_s", "other_s")
        means = [1000 * sum(getattr(step, part) for step in timed) / len(timed) for part in parts]
        assert stats.tokens_per_step is not None
        return StepMeans(stats.tokens_per_step, 1000 * answer.seconds - len(timed) * sum(means), *means)


def specdec_plain(target: PreTrainedModel, threads: int) -> SpecdecEngine:
    return SpecdecEngine("specdec", "plain", target, threads)


def specdec_draft(
    target: PreTrainedModel, threads: int, draft: PreTrainedModel, k: int | str, name: str = "draft model"
) -> SpecdecEngine:
    return SpecdecEngine("specdec", name, target, threads, None, k, drafter=draft)


def specdec_lookup(target: PreTrainedModel, threads: int, k: int) -> SpecdecEngine:
    return SpecdecEngine("specdec", "prompt lookup", target, threads, None, k, drafter="prompt_lookup")


def forward_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that one forward reads: each tensor once, codes, scales and the head included.

    Of an embedding that is not the head too, a forward reads single rows, which are not counted.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head_pointers = {tensor.data_ptr() for tensor in (*head.parameters(), *head.buffers())}
    sizes: dict[int, int] = {}
    for module in model.modules():
        tensors = module._parameters | module._buffers
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if "kernel_scale" in present:  # what a 4-bit layer's kernel reads in place of these
            present = {name: tensor for name, tensor in present.items() if name not in ("weight_scale", "weight_zero")}
        for tensor in present.values():
            if module is not embedding or tensor.data_ptr() in head_pointers:
                sizes[tensor.data_ptr()] = tensor.nbytes
    return sum(sizes.values())


class TimedForwards:
    """Records when each model's forwards start and stop: spans[i] of the i-th model, (start, stop) in seconds."""

    def __init__(self, *models: PreTrainedModel) -> None:
        self.models = models
        self.spans: list[list[tuple[float, float]]] = [[] for _ in models]

    def __enter__(self) -> TimedForwards:
        for model, spans in zip(self.models, self.spans, strict=True):
            model.forward = self._timed(model.forward, spans)
        return self

    def __exit__(self, *_: object) -> None:
        for model in self.models:
            del model.forward

    @staticmethod
    def _timed(forward: Callable, spans: list[tuple[float, float]]) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = forward(*args, **kwargs)
            if result.logits.is_cuda:
                torch.cuda.synchronize()
            spans.append((started, time.perf_counter()))
            return result

        timed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # generate() reads it
        return timed


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def override(config: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a config, and restore them on exit."""
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def count_same_rows(ids: Sequence[list[int]], others: Sequence[list[int]]) -> int:
    """How many rows of two lists are equal, position by position."""
    return sum(a == b for a, b in zip(ids, others, strict=True))
