"""The profile: when it is made, what it runs and measures, and that it leaves the call as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import specdec
from specdec.core.sampling import Processor, Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import TargetOutput
from specdec.draft_length.cost_model import Profile
from specdec.draft_length.profiler import profile
from specdec.draft_length.settings import ADAPTIVE_K, MAX_DRAFT_TOKENS
from specdec.drafters.model import ModelDrafter
from specdec.generation import call as call_module
from specdec.runtime.runner import ModelRunner
from tests.helpers.draft_length import patch_settings
from tests.helpers.drafters import Random
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.plain import pair


class CountingProfile:
    """profile() that records the batch size of each run."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, target: Any, drafter: Any, sequences: Sequences, *args: Any) -> Profile:
        self.batch_sizes.append(sequences.batch_size)
        return profile(target, drafter, sequences, *args)


def test_a_profile_is_made_once_per_pair_batch_size_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = CountingProfile()
    monkeypatch.setattr(call_module, "profile", counting)
    model, draft = copy.deepcopy(family("llama")), copy.deepcopy(family("llama"))
    specdec.enable(model, draft)

    def made(batch_size: int, **call: Any) -> bool:
        before = len(counting.batch_sizes)
        model.generate(**prompts(batch_size), max_new_tokens=6, **call)
        is_new = len(counting.batch_sizes) > before
        choice = specdec.last_stats(model).choice
        assert (choice.profile_s is not None) == is_new
        return is_new

    assert [made(batch_size) for batch_size in (1, 1, 4, 1, 4)] == [True, False, True, False, False]
    assert counting.batch_sizes == [1, 4]
    assert made(1, do_sample=True)
    assert not made(1, do_sample=True)
    specdec.enable(model, "none")
    model.generate(**prompts(1), max_new_tokens=6)
    assert specdec.last_stats(model).choice is None, "there is no K to choose"
    specdec.enable(model)
    assert not made(1, assistant_model=draft), "the pair already has a profile"
    assert made(1, assistant_model=copy.deepcopy(draft))
    specdec.disable(model)
    assert not makes_profile(model, draft, counting), "the cost model is kept by disable()"
    other, its_draft = copy.deepcopy(pair("llama")[0]), copy.deepcopy(draft)
    assert makes_profile(other, its_draft, counting)


def makes_profile(model: Any, draft: Any, counting: CountingProfile) -> bool:
    before = len(counting.batch_sizes)
    specdec.enable(model, draft).generate(**prompts(1), max_new_tokens=6)
    return len(counting.batch_sizes) > before


def test_a_cost_model_does_not_keep_its_draft_model_alive() -> None:
    model, draft = copy.deepcopy(family("llama")), copy.deepcopy(family("llama"))
    specdec.enable(model)
    model.generate(**prompts(1), max_new_tokens=6, assistant_model=draft)
    reference = weakref.ref(draft)
    del draft
    gc.collect()
    assert reference() is None


def test_the_profile_of_a_drafter_that_cannot_be_hashed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unhashable(Random):
        __hash__ = None  # type: ignore[assignment]

    counting = CountingProfile()
    monkeypatch.setattr(call_module, "profile", counting)
    model = specdec.enable(copy.deepcopy(family("llama")), Unhashable(1))
    for _ in range(2):
        model.generate(**prompts(1), max_new_tokens=6)
    assert counting.batch_sizes == [1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_profile_leaves_seeds_and_sequences_as_they_were(do_sample: bool) -> None:
    model, draft = family("llama"), make_model("llama", 1, **FAMILIES["llama"])
    batch = prompts(4)
    sequences = Sequences(
        batch["input_ids"], batch["attention_mask"].sum(1), max_length=40, num_draft_tokens=MAX_DRAFT_TOKENS
    )
    ids, lengths = sequences.ids.clone(), sequences.lengths.clone()
    state = torch.get_rng_state()
    with torch.no_grad():
        result = profile(
            ModelRunner(model),
            ModelDrafter(draft, VOCAB_SIZE),
            sequences,
            Sampling(do_sample=do_sample),
            MAX_DRAFT_TOKENS,
        )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(ids, sequences.ids)
    assert torch.equal(lengths, sequences.lengths)
    for part in (result.times.draft_s, result.times.target_s, result.times.rest_s):
        assert len(part) == MAX_DRAFT_TOKENS + 1
    assert result.times.draft_s[0] == 0
    assert min(result.times.step_s) > 0
    assert result.acceptance
    assert all(0 <= acceptance <= 1.000001 for acceptance in result.acceptance)


class RecordingTarget:
    """A target with equal logits for all ids that records the widths of its forwards."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.widths: list[int] = []

    def begin(self, batch_size: int, max_slots: int) -> None:
        self.max_slots = max_slots

    def reserve(self, slots: int) -> None:
        pass

    def prefill(self, ids: torch.Tensor, last: torch.Tensor) -> None:
        pass

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> TargetOutput:
        assert int(positions.max()) < self.max_slots
        self.widths.append(ids.shape[1])
        return TargetOutput(torch.zeros(*ids.shape, VOCAB_SIZE))


@pytest.mark.parametrize(
    ("context", "prompt", "max_draft_tokens"),
    [(None, 300, 8), (64, 40, 8), (9, 5, 8), (6, 5, 5), (2, 1, 1), (None, 4, 3)],
)
def test_a_profile_runs_the_widths_that_fit(context: int | None, prompt: int, max_draft_tokens: int) -> None:
    target = RecordingTarget()
    sequences = Sequences(
        torch.ones(2, prompt, dtype=torch.int64), torch.tensor([prompt, 1]), max_length=prompt + 1, context=context
    )
    result = profile(target, Random(0), sequences, Sampling(), max_draft_tokens)
    assert len(result.times.target_s) == max_draft_tokens + 1
    assert target.max_slots <= (context or 1000)
    if context is None:
        grid = [k for k in ADAPTIVE_K.profile_grid if k < max_draft_tokens]
        assert set(target.widths) == {k + 1 for k in (0, *grid, max_draft_tokens)}


class Short(Random):
    """Proposes one id at most, and in every second step none."""

    def lengths(self, limit: torch.Tensor) -> torch.Tensor:
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return limit.clamp(max=self.num_steps % 2)


def test_widths_that_a_drafter_does_not_reach_are_timed_with_other_ids() -> None:
    target = RecordingTarget()
    sequences = Sequences(torch.ones(1, 100, dtype=torch.int64), torch.tensor([100]), max_length=101)
    result = profile(target, Short(0), sequences, Sampling(), 5)
    assert {width - 1 for width in target.widths} == {0, 1, 2, 3, 5}
    assert [target.widths.count(width) for width in (3, 4, 6)] == [2, 2, 2]
    assert len(result.times.step_s) == 6
    assert result.empty_s is not None
    assert all(drafted == min(1, drafted) for _, drafted in result.num_drafted)
    assert {drafted for _, drafted in result.num_drafted} == {0, 1}
    assert 0 < len(result.acceptance) <= len(result.num_drafted)


def test_a_slow_pair_is_not_profiled_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_settings(monkeypatch, profile_s=0.0)
    target = RecordingTarget()
    sequences = Sequences(torch.ones(1, 5, dtype=torch.int64), torch.tensor([5]), max_length=9)
    result = profile(target, Random(0), sequences, Sampling(), MAX_DRAFT_TOKENS)
    assert sorted(target.widths) == [1, 1, 2, 9, 9], (
        "one step to warm up and one timed, of K = 0 and the largest K, and the first draft with K = 1"
    )
    first, *_, last = result.times.target_s
    assert result.times.target_s[4] == pytest.approx((first + last) / 2)


def test_a_profile_calls_no_processor_that_reads_the_text() -> None:
    def refuse(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    num_rows: list[int] = []

    def pointwise(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(scores))
        return scores

    sequences = Sequences(torch.ones(1, 5, dtype=torch.int64), torch.tensor([5]), max_length=9)
    profile(
        RecordingTarget(),
        Random(0),
        sequences,
        Sampling([Processor(refuse), Processor(pointwise, needs_prefix=False)]),
        MAX_DRAFT_TOKENS,
    )
    assert num_rows
