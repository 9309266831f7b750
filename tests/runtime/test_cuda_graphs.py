"""Recorded steps: replayed in the same memory, processed by the host one step late, dropped when something changes.

The lossless tests compare texts, with eager and with recorded steps; these check what is recorded and replayed.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.core import speculative
from specdec.draft_length.profiler import profiled_draft_lengths
from specdec.runtime.cuda_graphs import Graphs
from tests.helpers.families import FAMILIES, make_model, prompts
from tests.helpers.plain import pair, stop_at
from tests.helpers.recording import CPU_RECORDINGS, CpuRecording, Log, recorded

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _recorded() -> Iterator[None]:
    with recorded():
        yield


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = copy.deepcopy(pair("llama")[0])
    yield model
    specdec.disable(model)


@cache
def noisy() -> PreTrainedModel:
    return pair("llama")[1]


def text_of(model: PreTrainedModel, batch_size: int = 4, **call: Any) -> list[list[int]]:
    call = {"max_new_tokens": 30, "do_sample": False} | call
    output: Tensor = model.generate(**prompts(batch_size), **call)
    return output.tolist()


def plain_text(model: PreTrainedModel, batch_size: int = 4, **call: Any) -> list[list[int]]:
    model = copy.deepcopy(model)
    specdec.disable(model)
    return text_of(model, batch_size, **call)


def num_replays() -> int:
    return sum(recording.num_replays for recording in CPU_RECORDINGS)


def graphs_of(model: PreTrainedModel) -> Graphs | None:
    return model.__dict__["_specdec_state"].target.graphs


def slots_of(model: PreTrainedModel) -> int:
    buffers = model.__dict__["_specdec_state"].target.cache.buffers()
    return buffers[0].shape[2] if buffers else 0


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 9, "temperature": 0.8},
    "with a stop": {"eos_token_id": 40},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("drafter", "batch_size"), [("model", 4), ("prompt_lookup", 1), ("none", 4)])
def test_no_step_waits_for_the_device_and_the_host_reads_once(
    model: PreTrainedModel, drafter: str, batch_size: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In replays too: a replay runs the operators of its recording."""
    logs: list[Log] = []
    read: list[Tensor] = []
    stock_step, stock_read = speculative.step, Tensor.tolist

    def step(*args: Any) -> Any:
        before = len(read)
        with Log() as log:
            result = stock_step(*args)
        assert len(read) == before, "a step reads a tensor on the host"
        logs.append(log)
        return result

    def tolist(tensor: Tensor) -> Any:
        read.append(tensor)
        return stock_read(tensor)

    monkeypatch.setattr(speculative, "step", step)
    specdec.enable(model, noisy() if drafter == "model" else drafter, num_draft_tokens=3)
    for _ in range(3):
        text_of(model, batch_size, **CALLS[call])
    logs.clear()
    recordings_before, replays_before = len(CPU_RECORDINGS), num_replays()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        text = model.generate(**prompts(batch_size), max_new_tokens=30, **CALLS[call])
    del text
    assert [log.synchronizing for log in logs] == [[]] * len(logs)
    assert sum(len(log.calls) for log in logs) > 100
    summaries = [tensor for tensor in read if tensor.ndim == 2 and tensor.shape[1] in (6, 9)]  # StepResult.host_summary
    assert len(summaries) == specdec.last_stats(model).num_target_forwards == len(logs) - 1, "one step is discarded"
    assert len(CPU_RECORDINGS) == recordings_before, "an equal call records nothing"
    assert num_replays() > replays_before


def test_the_log_notices_what_waits() -> None:
    x = torch.arange(4)
    for waits in (
        lambda: int(x.max()),
        lambda: bool((x > 2).any()),
        lambda: x[x > 2],
        lambda: x.nonzero(),
        lambda: x.unique(),
    ):
        with Log() as log:
            waits()
        assert log.synchronizing
    with pytest.raises(AssertionError, match="reads a tensor"):
        CpuRecording([]).record(lambda: x.tolist())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("k", [1, 4])
def test_statistics_do_not_depend_on_when_the_host_reads_a_step(
    model: PreTrainedModel, k: int, batch_size: int
) -> None:
    stats = []
    for compile in (False, True):
        specdec.enable(model, noisy(), num_draft_tokens=k, compile=compile)
        for _ in range(3):
            text_of(model, batch_size, eos_token_id=[40, 41])
        stats.append(specdec.last_stats(model))
    assert stats[0] == stats[1]
    assert num_replays()


def test_buffers_grow_and_nothing_is_cut() -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"max_position_embeddings": 4096})
    call = {"max_new_tokens": 600}
    want = plain_text(model, 1, **call)
    specdec.enable(model, copy.deepcopy(model), num_draft_tokens=8)
    text_of(model, 1)
    assert slots_of(model) == 256
    assert text_of(model, 1, **call) == want
    assert slots_of(model) >= 611
    before = len(CPU_RECORDINGS), slots_of(model)
    assert text_of(model, 1, max_new_tokens=300) == [row[:311] for row in want]
    assert (len(CPU_RECORDINGS), slots_of(model)) == before, "a shorter call reuses the buffers"
    assert text_of(model, 3, **call) == plain_text(model, 3, **call), "another batch"


def test_buffers_are_no_longer_than_the_context(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy(), num_draft_tokens=3)
    text_of(model, max_length=120, max_new_tokens=None)
    assert slots_of(model) == min(256, model.config.max_position_embeddings)


def test_the_same_seed_gives_the_same_text_recorded_or_replayed(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy(), num_draft_tokens=3)
    texts = []
    for _ in range(4):
        torch.manual_seed(7)
        texts.append(text_of(model, do_sample=True))
    assert num_replays()
    assert texts == texts[:1] * 4


def test_calls_under_inference_mode_and_others_share_recordings(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy(), num_draft_tokens=3)
    want = plain_text(model, eos_token_id=40)
    for turn in range(6):
        with torch.inference_mode(turn % 2 == 0):
            assert text_of(model, eos_token_id=40) == want
    assert num_replays()


def test_auto_chooses_among_the_profiled_lengths(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy())
    for _ in range(3):
        assert text_of(model) == plain_text(model)
        choice = specdec.last_stats(model).choice
        chosen = {k for k, count in enumerate(choice.steps_by_k) if count}
        assert chosen <= {0, *profiled_draft_lengths(len(choice.steps_by_k) - 1)}
        assert sum(choice.steps_by_k) == specdec.last_stats(model).num_target_forwards


def test_a_calls_own_draft_model_is_recorded_and_kept(model: PreTrainedModel) -> None:
    specdec.enable(model, num_draft_tokens=3)
    other = copy.deepcopy(model)
    specdec.disable(other)
    want = plain_text(model)
    for draft in (noisy(), noisy(), noisy(), other, other, noisy()):
        assert text_of(model, assistant_model=draft) == want
        assert (specdec.last_stats(model).draft_acceptance_rate == 1.0) == (draft is other)
    recordings_before, replays_before = len(CPU_RECORDINGS), num_replays()
    assert text_of(model, assistant_model=noisy()) == want
    assert len(CPU_RECORDINGS) == recordings_before
    assert num_replays() > replays_before
    assistant = weakref.ref(model.__dict__["_specdec_state"].assistant)
    text_of(model, assistant_model=other)
    gc.collect()
    assert assistant() is None, "a draft model that is no longer used is freed"


def only_warning(action: Callable[[], Any], words: str) -> Any:
    """The action's result; it must warn exactly once, with these words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    assert [words in str(warning.message) for warning in caught] == [True], caught
    return result


@pytest.mark.parametrize("after", range(5))
def test_out_of_memory_while_recording_frees_all_recordings_and_goes_on_eagerly(
    model: PreTrainedModel, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """after: how many recordings succeed; the first two are enable's trials."""
    want = plain_text(model)
    stock_record, alive = CpuRecording.record, weakref.WeakSet[CpuRecording]()

    def record(self: CpuRecording, function: Callable[[], Any]) -> Any:
        if len(CPU_RECORDINGS) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        alive.add(self)
        return stock_record(self, function)

    monkeypatch.setattr(CpuRecording, "record", record)

    def run() -> list[list[list[int]]]:
        specdec.enable(model, noisy(), num_draft_tokens=3)
        return [text_of(model) for _ in range(3)]

    texts = only_warning(
        run, "without CUDA graphs, and slower: recording one failed (OutOfMemoryError: CUDA out of memory"
    )
    assert texts == [want] * 3
    assert len(CPU_RECORDINGS) == after + 1, "it is tried once"
    CPU_RECORDINGS.clear()
    gc.collect()
    assert not alive
    assert slots_of(model) == 0, "caches are freed after each call again"


def test_a_device_that_replays_wrongly_is_detected(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuRecording, "replay", lambda self: None)
    words = "without CUDA graphs, and slower: of the target, the logits of a replay are wrong"
    only_warning(lambda: specdec.enable(model, noisy(), num_draft_tokens=3), words)
    assert text_of(model) == plain_text(model)


def test_a_model_that_waits_for_its_device_runs_eagerly(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    stock = layer.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden.isfinite().all()
        return stock(hidden, *args, **kwargs)

    layer.forward = forward
    only_warning(
        lambda: specdec.enable(model, noisy(), num_draft_tokens=3), "recording one failed (AssertionError: a recorded"
    )
    assert len(text_of(model)[0]) == 11 + 30
    assert num_replays() == 0


def test_a_model_with_hooks_runs_in_the_stock_loop_and_is_replayed_again_without_them(model: PreTrainedModel) -> None:
    want = plain_text(model)
    specdec.enable(model, noisy(), num_draft_tokens=3)
    text_of(model)
    called: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *args: called.append(1))
    replays_before = num_replays()
    with pytest.warns(UserWarning, match="a hook on lm_head would see several positions a forward"):
        assert text_of(model) == want
    assert len(called) == len(want[0]) - 11, "once for each token, as in plain decoding"
    assert specdec.last_stats(model) is None
    assert num_replays() == replays_before
    handle.remove()
    assert [text_of(model) for _ in range(3)] == [want] * 3
    assert num_replays() > replays_before


def test_a_model_on_another_device_than_it_was_enabled_on_is_not_replayed(model: PreTrainedModel) -> None:
    """A recording of one device does nothing to tensors on another."""
    specdec.enable(model, noisy(), num_draft_tokens=3)
    replays_before = num_replays()
    graphs_of(model).device = torch.device("cuda")
    assert [text_of(model) for _ in range(3)] == [plain_text(model)] * 3
    assert num_replays() == replays_before


def replace_a_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())


def write_a_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))


def change_a_setting(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = 3.0
    model.model.layers[0].self_attn.scaling *= 0.3


@pytest.mark.parametrize("change", [replace_a_weight, write_a_weight, change_a_setting, lambda model: model.double()])
@pytest.mark.parametrize("changed", ["target", "draft"])
def test_changes_between_calls_take_effect(model: PreTrainedModel, changed: str, change: Callable[..., Any]) -> None:
    draft = copy.deepcopy(model)
    specdec.enable(model, draft, num_draft_tokens=3)
    for _ in range(3):
        text_of(model)
    assert num_replays()
    change(model if changed == "target" else draft)
    for _ in range(3):
        assert text_of(model) == plain_text(model)
        assert (specdec.last_stats(model).draft_acceptance_rate < 1) == (change.__name__ != "<lambda>")


def test_a_call_that_fails_frees_its_buffers(model: PreTrainedModel) -> None:
    def fail(ids: Tensor) -> bool:
        if ids.shape[1] > 20:
            raise KeyError("of the caller")
        return False

    want = plain_text(model)
    specdec.enable(model, noisy(), num_draft_tokens=3)
    text_of(model)
    assert slots_of(model) > 0
    with pytest.raises(KeyError, match="of the caller"):
        text_of(model, **stop_at(fail))
    assert slots_of(model) == 0
    assert [text_of(model) for _ in range(3)] == [want] * 3


def test_disable_frees_the_recordings(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy(), num_draft_tokens=3)
    for _ in range(3):
        text_of(model)
    CPU_RECORDINGS.clear()
    alive = weakref.ref(graphs_of(model))
    specdec.disable(model)
    gc.collect()
    assert alive() is None


def test_compile_false_records_nothing(model: PreTrainedModel) -> None:
    specdec.enable(model, noisy(), num_draft_tokens=3, compile=False)
    assert text_of(model) == plain_text(model)
    assert graphs_of(model) is None
    assert not CPU_RECORDINGS


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("drafter", ["model", "prompt_lookup", "none"])
def test_a_gpu_generates_the_same_texts_with_graphs_and_never_synchronizes(
    model: PreTrainedModel, drafter: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_step = speculative.step

    def step(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return stock_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model, draft = model.cuda(), copy.deepcopy(noisy()).cuda()
    batch = {name: tensor.cuda() for name, tensor in prompts(batch_size).items()}
    texts = []
    for compile in (False, True):
        specdec.enable(model, draft if drafter == "model" else drafter, num_draft_tokens=3, compile=compile)
        for turn in range(4):
            if compile and turn == 3:
                monkeypatch.setattr(speculative, "step", step)
            texts.append(model.generate(**batch, max_new_tokens=60, do_sample=False).tolist())
    assert graphs_of(model).failure is None
    assert texts == texts[:1] * 8
