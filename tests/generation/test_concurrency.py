"""Calls of one model that overlap, in several threads or one inside another: each gives the text it gives alone."""

from __future__ import annotations

import copy
import gc
import queue
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria

import specdec
from specdec.core.steps import StepResult
from specdec.draft_length import profiler as profiling
from specdec.drafters.model import ModelDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.resolve import with_suffix_decoding
from specdec.generation import call as call_module
from specdec.generation import state as state_module
from specdec.runtime.attention import override as attention
from tests.generation.test_distribution import (
    DRAFTERS,
    NO_CUT,
    PROMPT,
    SIGNIFICANCE,
    batch,
    expected,
    new_model,
    p_value,
    tiny_model,
)
from tests.helpers.drafters import Random, Uneven
from tests.helpers.families import VOCAB_SIZE, prompts
from tests.helpers.plain import pair
from tests.helpers.recording import CPU_RECORDINGS, recorded
from tests.helpers.tokenizers import other_tokenizer

TIMEOUT_S = 30
NEW_TOKENS = 18
DRAFTING = ("num_assistant_tokens", "prompt_lookup_num_tokens", "assistant_model")  # what plain decoding is not given

# Calls that differ in all that a call may have of its own: batch, K, drafter, processors.
JOBS: tuple[dict[str, Any], ...] = (
    prompts(1, seed=11),
    prompts(4, seed=12) | {"num_assistant_tokens": 2, "eos_token_id": 40},
    prompts(2, seed=13) | {"repetition_penalty": 1.5, "do_sample": True, "top_k": 1},
    prompts(1, seed=14) | {"prompt_lookup_num_tokens": 2},
)


@cache
def stock() -> PreTrainedModel:
    return copy.deepcopy(pair("llama")[0])


@cache
def draft_model() -> PreTrainedModel:
    return copy.deepcopy(pair("llama")[1])


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A model of the test's own. Whatever a test does, its calls must release all that they acquired."""
    model = copy.deepcopy(stock())
    yield model
    if "_specdec_state" in model.__dict__:
        assert_idle(model)


def state_of(model: PreTrainedModel) -> Any:
    return model.__dict__["_specdec_state"]


def assert_idle(model: PreTrainedModel) -> None:
    state = state_of(model)
    assert not state.is_target_in_use
    assert not state.calls
    assert not state_module._DRAFTERS_IN_USE


def text_of(model: PreTrainedModel, job: dict[str, Any]) -> list[list[int]]:
    output: Tensor = model.generate(**{"max_new_tokens": NEW_TOKENS} | job)
    return output.tolist()


def plain_text(job: dict[str, Any], model: PreTrainedModel | None = None) -> list[list[int]]:
    return text_of(model or stock(), {name: value for name, value in job.items() if name not in DRAFTING})


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What each function returns or raises, called in a thread of its own; none may hang."""
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    return results


@contextmanager
def meeting(num_calls: int, num_steps: int = 2) -> Iterator[None]:
    """Within, this many calls wait for each other: before a profile, and after each of their first steps."""
    barrier = threading.Barrier(num_calls, timeout=TIMEOUT_S)
    stock_speculate, stock_profile = call_module.speculate, call_module.profile

    def speculate(*args: Any, **kwargs: Any) -> Iterator[StepResult]:
        for step, result in enumerate(stock_speculate(*args, **kwargs)):
            if step < num_steps:
                barrier.wait()
            yield result

    def profile(*args: Any, **kwargs: Any) -> Any:
        barrier.wait()
        return stock_profile(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_module, "speculate", speculate)
        patch.setattr(call_module, "profile", profile)
        yield


def assert_overlapping_texts(model: PreTrainedModel, jobs: tuple[dict[str, Any], ...], rounds: int = 1) -> None:
    """Every job's text is plain while the others run, and afterwards, alone."""
    texts = [plain_text(job) for job in jobs]
    for _ in range(rounds):
        with meeting(len(jobs)):
            assert in_threads(*(partial(text_of, model, job) for job in jobs)) == texts
        stats = specdec.last_stats(model)
        assert stats.num_emitted_tokens in [emitted(job, text) for job, text in zip(jobs, texts, strict=True)]
        assert_idle(model)
    assert text_of(model, jobs[0]) == texts[0]
    assert_idle(model)


def emitted(job: dict[str, Any], text: list[list[int]]) -> int:
    """Ids of a text, without the padding after a row's stop."""
    width, stop = job["input_ids"].shape[1], job.get("eos_token_id")
    rows = [row[width:] for row in text]
    return sum(row.index(stop) + 1 if stop in row else len(row) for row in rows)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("kind", "num_calls"),
    [
        ("model", 4), ("model", 2), ("other_tokenizer", 2), ("prompt_lookup", 4), ("suffix", 2), ("suffix+model", 4),
        ("none", 2),
    ],
)  # fmt: skip
def test_overlapping_calls_give_plain_text(model: PreTrainedModel, kind: str, num_calls: int) -> None:
    drafters = {
        "model": draft_model,
        "other_tokenizer": lambda: other_tokenizer(draft_model()),
        "suffix+model": lambda: with_suffix_decoding(draft_model(), model),
    }
    specdec.enable(model, drafters[kind]() if kind in drafters else kind, num_draft_tokens=3)
    assert_overlapping_texts(model, JOBS[:num_calls], rounds=2)


@pytest.mark.usefixtures("either_way")
def test_two_first_calls_of_a_kind_profile_both_and_give_plain_text(model: PreTrainedModel) -> None:
    specdec.enable(model, draft_model())
    jobs = prompts(1, seed=11), prompts(1, seed=12)
    assert_overlapping_texts(model, jobs)
    assert specdec.last_stats(model).choice is not None


@pytest.mark.usefixtures("either_way")
def test_overlapping_calls_may_bring_an_assistant_model(model: PreTrainedModel) -> None:
    specdec.enable(model, num_draft_tokens=3)
    other = copy.deepcopy(draft_model())
    jobs = tuple(
        prompts(size, seed=seed) | {"assistant_model": draft, "num_assistant_tokens": 3}
        for size, seed, draft in ((1, 11, draft_model()), (4, 12, draft_model()), (2, 13, other))
    )
    assert_overlapping_texts(model, jobs, rounds=2)


@pytest.mark.usefixtures("cpu_kernels")
def test_compiled_calls_overlap() -> None:
    model, draft = pair("llama")
    specdec.enable(model, draft, num_draft_tokens=3, compile=True)
    assert specdec.generation.enable.decoding_of(model) == "compiled"
    try:
        assert_overlapping_texts(model, JOBS[:3])
    finally:
        specdec.disable(model)


class Within(LogitsProcessor, StoppingCriteria):
    """A callback of either kind that calls `function` at its third position, and changes nothing."""

    def __init__(self, function: Callable[[], Any], is_criterion: bool) -> None:
        self.function, self.is_criterion = function, is_criterion
        self.calls, self.results = 0, []

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            self.results.append(self.function())
        return torch.zeros(len(input_ids), dtype=torch.bool) if self.is_criterion else scores


# generate() called from within a call, by the loop that serves it
INNER: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    "ours": lambda model, job: text_of(model, job),
    "past ours": lambda model, job: LlamaForCausalLM.generate(model, **job, max_new_tokens=NEW_TOKENS).tolist(),
    "of the stock loop": lambda model, job: text_of(model, job | {"num_beams": 2}),
}


def inner_plain_text(name: str, job: dict[str, Any]) -> list[list[int]]:
    return plain_text(job | ({"num_beams": 2} if name == "of the stock loop" else {}))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("is_criterion", [True, False], ids=["criterion", "processor"])
@pytest.mark.parametrize("name", INNER)
def test_a_callback_may_call_generate(model: PreTrainedModel, name: str, is_criterion: bool) -> None:
    specdec.enable(model, draft_model(), num_draft_tokens=3)
    outer, inner = prompts(2, seed=21), prompts(1, seed=22)
    for _ in range(2):
        callback = Within(lambda: INNER[name](model, inner), is_criterion)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            kind = "stopping_criteria" if is_criterion else "logits_processor"
            text = text_of(model, outer | {kind: [callback]})
        assert text == plain_text(outer)
        assert callback.results == [inner_plain_text(name, inner)]
        assert specdec.last_stats(model).num_emitted_tokens == 2 * NEW_TOKENS


class PassingStreamer:
    """A streamer that passes each value to a consumer, and goes on when the consumer has taken it."""

    def __init__(self) -> None:
        self.values: queue.Queue[Any] = queue.Queue(maxsize=1)
        self.taken: queue.Queue[None] = queue.Queue()

    def put(self, value: Any) -> None:
        self.values.put(value, timeout=TIMEOUT_S)
        self.taken.get(timeout=TIMEOUT_S)

    def end(self) -> None:
        self.put(None)

    def consume(self, between: Callable[[], Any]) -> tuple[list[int], list[Any]]:
        """All ids, and what `between` returned after each value."""
        ids, results = [], []
        while (value := self.values.get(timeout=TIMEOUT_S)) is not None:
            ids += value.flatten().tolist()
            results.append(between())
            self.taken.put(None)
        self.taken.put(None)
        return ids, results


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", INNER)
def test_the_consumer_of_a_streamer_may_call_generate(model: PreTrainedModel, name: str) -> None:
    specdec.enable(model, draft_model(), num_draft_tokens=3)
    outer, inner = prompts(1, seed=21) | {"max_new_tokens": 6}, prompts(2, seed=22)
    streamer = PassingStreamer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text, (ids, results) = in_threads(
            lambda: text_of(model, outer | {"streamer": streamer}),
            lambda: streamer.consume(lambda: INNER[name](model, inner)),
        )
    assert text == plain_text(outer) == [ids]
    assert results == 7 * [inner_plain_text(name, inner)]


class CallingStreamer:
    """A streamer that calls `function` in its own thread, first while generate() prepares: it is given the prompt."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.results = function, []

    def put(self, value: Tensor) -> None:
        self.results.append(self.function())

    def end(self) -> None:
        self.results.append(self.function())


@pytest.mark.parametrize("name", INNER)
def test_a_streamer_may_call_generate_itself(model: PreTrainedModel, name: str) -> None:
    specdec.enable(model, draft_model(), num_draft_tokens=3)
    outer, inner = prompts(1, seed=21) | {"max_new_tokens": 4}, prompts(2, seed=22)
    streamer = CallingStreamer(lambda: INNER[name](model, inner))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = text_of(model, outer | {"streamer": streamer, "num_assistant_tokens": 2})
    assert text == plain_text(outer)
    assert streamer.results == 6 * [inner_plain_text(name, inner)]
    num_stock = sum("specdec leaves this call" in str(warning.message) for warning in caught)
    assert num_stock == (0 if name == "ours" else 6), "the stock loop serves the inner calls alone"
    stats = specdec.last_stats(model)
    assert stats.num_emitted_tokens == 4
    assert len(stats.acceptance_histogram) == 3, "the outer call's K"


# Calls of transformers alone, by the model that specdec has enabled
STOCK_CALLS: dict[str, Callable[[PreTrainedModel, dict[str, Any]], Any]] = {
    "beams": lambda model, job: text_of(model, job | {"num_beams": 2}),
    "hidden states": lambda model, job: model.generate(
        **job, max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True
    ).hidden_states[-1][-1],
    "forward": lambda model, job: model(**job).logits,
    "loop of forwards": lambda model, job: [model(**job).logits.sum().item() for _ in range(20)],
}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", STOCK_CALLS)
def test_stock_calls_of_another_thread_are_left_alone(model: PreTrainedModel, name: str) -> None:
    specdec.enable(model, draft_model(), num_draft_tokens=3)
    job, other = prompts(2, seed=31), prompts(4, seed=32)
    want = STOCK_CALLS[name](copy.deepcopy(stock()), other)  # hidden states leave transformers' hooks on the model
    inside, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert may_end.wait(TIMEOUT_S)

    def stock_call() -> Any:
        assert inside.wait(TIMEOUT_S)
        try:
            return STOCK_CALLS[name](model, other)
        finally:
            may_end.set()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        text, got = in_threads(lambda: text_of(model, job | {"stopping_criteria": [Within(hold, True)]}), stock_call)
    assert text == plain_text(job)
    assert got.equal(want) if isinstance(want, Tensor) else got == want


class OwnLookup(PromptLookup):
    """A drafter derived from a stateless one, with state of its own."""

    def begin(self, sequences: Any, sampling: Any) -> None:
        self.sequences = sequences

    def propose(self, sequences: Any, limit: Tensor) -> Any:
        assert sequences is self.sequences, "another call has begun"
        return super().propose(sequences, limit)


class Around:
    """A drafter that wraps another."""

    def __init__(self, inner: ModelDrafter) -> None:
        self.inner, self.runner = inner, inner.runner
        self.begin, self.propose, self.observe = inner.begin, inner.propose, inner.observe


SHARED: dict[str, Callable[[], Any]] = {
    "a draft model": draft_model,
    "a ModelDrafter": lambda: ModelDrafter(draft_model(), VOCAB_SIZE),
    "a draft model of another tokenizer": lambda: other_tokenizer(draft_model()),
    "a PromptLookup": PromptLookup,
    "a subclass of PromptLookup": OwnLookup,
    "random": lambda: Random(1),
    "uneven": lambda: Uneven(1),
}
EXCLUSIVE = ("a subclass of PromptLookup", "random", "uneven")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", SHARED)
def test_two_targets_may_share_a_drafter(model: PreTrainedModel, name: str) -> None:
    """One that cannot be copied serves one call at a time; other calls go to the stock loop, with a reason."""
    drafter, second = SHARED[name](), copy.deepcopy(stock())
    for target in (model, second):
        specdec.enable(target, drafter, num_draft_tokens=3)
    jobs = prompts(2, seed=41), prompts(1, seed=42)
    barrier = threading.Barrier(2, timeout=TIMEOUT_S)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = in_threads(
            lambda: text_of(model, jobs[0] | {"stopping_criteria": [Within(barrier.wait, True)]}),
            lambda: text_of(second, jobs[1] | {"stopping_criteria": [Within(barrier.wait, True)]}),
        )
    assert texts == [plain_text(job) for job in jobs]
    stock_calls = [str(warning.message) for warning in caught if "specdec leaves this call" in str(warning.message)]
    assert len(stock_calls) == (name in EXCLUSIVE)
    assert all(f"its drafter, a {type(drafter).__name__}, serves another call" in words for words in stock_calls)
    assert [specdec.last_stats(target) is None for target in (model, second)].count(True) == len(stock_calls)
    assert_idle(second)
    for target, job in zip((model, second), jobs, strict=True):
        assert text_of(target, job) == plain_text(job)
        assert specdec.last_stats(target).num_draft_tokens > 0


def test_drafters_that_wrap_one_model_drafter_serve_one_call_at_a_time(model: PreTrainedModel) -> None:
    inner = ModelDrafter(draft_model(), VOCAB_SIZE)
    second = copy.deepcopy(stock())
    specdec.enable(model, inner, num_draft_tokens=3)
    specdec.enable(second, Around(inner), num_draft_tokens=3)
    nested = Within(lambda: text_of(second, prompts(2, seed=42)), is_criterion=True)
    with pytest.warns(UserWarning, match="its drafter, a Around, serves another call"):
        text = text_of(model, prompts(1, seed=41) | {"stopping_criteria": [nested]})
    assert text == plain_text(prompts(1, seed=41))
    assert nested.results == [plain_text(prompts(2, seed=42))]
    assert text_of(second, prompts(2, seed=42)) == plain_text(prompts(2, seed=42))
    assert specdec.last_stats(second) is not None


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("first_fails", [True, False])
@pytest.mark.parametrize("kind", ["model", "random"])
def test_a_call_that_fails_leaves_the_other_alone(model: PreTrainedModel, kind: str, first_fails: bool) -> None:
    """first_fails: the call on the model's own runner."""
    specdec.enable(model, draft_model() if kind == "model" else Random(1), num_draft_tokens=3)
    jobs = prompts(2, seed=51), prompts(1, seed=52)
    started, failed = threading.Event(), threading.Event()

    def fail() -> None:
        started.set()
        assert other_started.wait(TIMEOUT_S)
        raise Stopped

    def go_on() -> None:
        other_started.set()
        if kind != "random":
            assert failed.wait(TIMEOUT_S)

    other_started = threading.Event()

    def failing() -> Any:
        if not first_fails:
            assert other_started.wait(TIMEOUT_S)
        try:
            return text_of(model, jobs[0] | {"stopping_criteria": [Within(fail, True)]})
        finally:
            failed.set()

    def going_on() -> Any:
        if first_fails:
            assert started.wait(TIMEOUT_S)
        return text_of(model, jobs[1] | {"stopping_criteria": [Within(go_on, True)]})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        error, text = in_threads(failing, going_on)
    assert isinstance(error, Stopped)
    assert text == plain_text(jobs[1])
    assert_idle(model)
    runners = []
    stock_decode = specdec.generation.enable.decode
    with pytest.MonkeyPatch.context() as patch:
        decode = lambda *args, **kwargs: runners.append(args[1:3]) or stock_decode(*args, **kwargs)  # noqa: E731
        patch.setattr(specdec.generation.enable, "decode", decode)
        assert text_of(model, jobs[0]) == plain_text(jobs[0])
    assert runners == [(state_of(model).target, state_of(model).drafter)]


def caches() -> list[Tensor]:
    """Key and value buffers that are alive: [B, H, S, D] with this family's heads and width."""
    CPU_RECORDINGS.clear()
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return [tensor for tensor in alive if tensor.ndim == 4 and tensor.shape[1::2] == (2, 8) and tensor.numel()]


@pytest.mark.parametrize(("kind", "is_recorded"), [("model", True), ("assistant", False), ("none", True)])
def test_the_caches_of_idle_calls_are_freed(model: PreTrainedModel, kind: str, is_recorded: bool) -> None:
    """Except those of recorded steps: two layers' keys and values, of the model's own runners alone."""
    before = len(caches())
    jobs = JOBS[:3]
    if kind == "assistant":
        jobs = tuple(job | {"assistant_model": draft_model(), "num_assistant_tokens": 3} for job in jobs)
    with recorded() if is_recorded else warnings.catch_warnings():
        specdec.enable(model, {"model": draft_model(), "assistant": None, "none": "none"}[kind], num_draft_tokens=3)
        with meeting(3):
            in_threads(*(partial(text_of, model, job) for job in jobs))
        state = state_of(model)
        drafter = state.assistant if kind == "assistant" else state.drafter
        runners = [member.runner for member in state.members(drafter)]
        kept = {id(buffer) for runner in runners for buffer in runner.cache.buffers()}
        assert len(kept) == (0 if not is_recorded else 4 * len(runners))
        del drafter, runners, state
        text_of(model, jobs[0])
        if not is_recorded:
            assert len(caches()) == before
        specdec.disable(model)
    assert len(caches()) == before


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["model", "prompt_lookup", "none"])
def test_a_seed_gives_the_same_text_on_any_runner(model: PreTrainedModel, kind: str, batch_size: int) -> None:
    specdec.enable(model, draft_model() if kind == "model" else kind, num_draft_tokens=3)
    job = prompts(batch_size, seed=61) | {"do_sample": True, "top_k": 20}

    def seeded() -> list[list[int]]:
        torch.manual_seed(7)
        return text_of(model, job)

    texts = [seeded() for _ in range(3)]
    inside, may_end = threading.Event(), threading.Event()

    def idle() -> None:
        inside.set()
        assert may_end.wait(TIMEOUT_S)

    def second() -> Any:
        assert inside.wait(TIMEOUT_S)
        try:
            return seeded()
        finally:
            may_end.set()

    _, text = in_threads(lambda: text_of(model, prompts(1) | {"stopping_criteria": [Within(idle, True)]}), second)
    assert [*texts, text] == 4 * [text]


@pytest.mark.parametrize("kind", ["model", "other_tokenizer", "prompt_lookup", "suffix"])
def test_overlapping_sampled_calls_keep_their_distribution(kind: str) -> None:
    samples = 2000
    drafters = {"model": tiny_model(1), "other_tokenizer": DRAFTERS["other_tokenizer"](tiny_model(0))}
    model = specdec.enable(new_model(0), drafters.get(kind, kind), num_draft_tokens=2)
    torch.manual_seed(0)

    def counts(call: dict[str, Any]) -> Counter[Any]:
        text = model.generate(**batch((PROMPT,) * samples), **NO_CUT | call, max_new_tokens=3)[:, -3:]
        return Counter(map(tuple, text.tolist()))

    with meeting(2, num_steps=1):  # one step may write a whole text
        one, other = in_threads(partial(counts, {"temperature": 0.7}), partial(counts, {"top_k": 3}))
    assert p_value(one, expected(PROMPT, len(PROMPT), "temperature")) > SIGNIFICANCE
    assert p_value(other, expected(PROMPT, len(PROMPT), "top_k")) > SIGNIFICANCE


def test_a_profile_does_not_take_back_random_numbers_that_another_call_drew(model: PreTrainedModel) -> None:
    """Otherwise that call would draw them again, for the rest of its text."""
    specdec.enable(model, draft_model())
    states: list[Tensor] = []
    stock_step = profiling.step

    def step(*args: Any) -> StepResult:
        if not states:
            states.append(torch.get_rng_state())
            job = prompts(1) | {"num_assistant_tokens": 2, "do_sample": True, "top_k": 5}
            in_threads(lambda: text_of(model, job))
        return stock_step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "step", step)
        text_of(model, prompts(3, seed=71))
    assert not states[0].equal(torch.get_rng_state())


def test_a_config_may_be_copied_and_saved_while_a_forward_runs() -> None:
    """Another thread may do so; what the forward changes in the config is in neither."""
    config = copy.deepcopy(stock().config)
    before = config.to_dict()
    with attention.attention_override(config), attention.attention_override(config):
        assert attention.implementation_of(config) == "sdpa"
        assert config.to_dict() == before
        copied = copy.deepcopy(config)
    assert vars(copied).keys() == vars(config).keys()
    assert config._attn_implementation == attention.implementation_of(config) == "sdpa"
