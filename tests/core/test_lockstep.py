"""Callbacks of unknown kind are called as plain decoding calls them: same arguments, same number, same order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import ConfidenceCriteria, StoppingCriteria

import specdec
from specdec.core import lockstep, sampling
from tests.generation import test_distribution
from tests.helpers.draft_length import erratic_k
from tests.helpers.drafters import Uneven
from tests.helpers.families import VOCAB_SIZE, prompts
from tests.helpers.plain import NEVER, WIDTH, K, both, continuation, drafter, stop_string, target

NEW_TOKENS = 20


class Record:
    """What callbacks were called with, in one list for all of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []

    def add(self, name: str, ids: Tensor, scores: Any) -> None:
        kept = (
            scores.clone()
            if isinstance(scores, Tensor)
            else None
            if scores is None
            else [s.clone() for s in scores[-2:]]
        )
        self.calls.append((name, (ids.dtype, ids.tolist()), kept))


class Stateful(LogitsProcessor):
    """Favours ids by a count of its calls and a checksum of all that it ever saw; one_id: forbids the others."""

    def __init__(self, record: Record, seed: int, one_id: bool = False) -> None:
        self.record, self.one_id = record, one_id
        self.coins = random.Random(seed)
        self.calls = self.seen = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.record.add("processor", input_ids, scores)
        self.calls += 1
        self.seen = (31 * self.seen + int(input_ids.sum())) % 9973
        favoured = (scores.argmax(-1) + self.seen * torch.arange(len(scores)) + self.calls // 3) % scores.shape[1]
        if self.one_id:
            return torch.full_like(scores, -torch.inf).scatter(1, favoured[:, None], 0.0)
        if self.coins.random() < 0.4:
            scores[torch.arange(len(scores)), favoured] += 5.0  # in place, as some do
            return scores
        if self.coins.random() < 0.3:
            return scores.masked_fill(torch.arange(scores.shape[1]) % 7 == self.calls % 7, -torch.inf)
        return scores * 1.5


class Tracking(StoppingCriteria):
    """Keeps a tracker for each row; answers by row, once for the batch, or by what it reads in the scores."""

    def __init__(self, record: Record, seed: int, rows: int, kind: str) -> None:
        self.record, self.kind = record, kind
        self.coins = random.Random(seed)
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.record.add("criterion", input_ids, scores)
        assert not kwargs
        self.ended |= (input_ids[:, -1] + input_ids.shape[1]) % 13 == self.coins.randrange(13)
        if self.kind == "scores":
            return self.ended | (scores[-1].softmax(-1).amax(-1) > 0.97)
        return {"rows": self.ended, "all": bool(self.ended.all()), "any": bool(self.ended.sum() > 1)}[self.kind]


class Streamer:
    def __init__(self, record: Record) -> None:
        self.record = record

    def put(self, value: Tensor) -> None:
        self.record.add("streamer", value, None)

    def end(self) -> None:
        self.record.calls.append(("end", None, None))


def assert_same(want: Record, got: Record) -> None:
    assert [call[:2] for call in got.calls] == [call[:2] for call in want.calls]
    for one, other in zip(want.calls, got.calls, strict=True):
        torch.testing.assert_close(one[2], other[2], atol=2e-4, rtol=1e-4)


def run(seed: int, batch_size: int, do_sample: bool) -> tuple[Any, Record]:
    """One call with random callbacks, the same ones for the same seed."""
    coins = random.Random(seed)
    record = Record()
    kinds = coins.choices(["rows", "all", "any", "scores"], k=2)
    call = {
        "logits_processor": [Stateful(record, seed + i, do_sample and i == 0) for i in range(2 - do_sample)],
        "stopping_criteria": [Tracking(record, seed + i, batch_size, kind) for i, kind in enumerate(kinds)],
        "streamer": Streamer(record) if coins.random() < 0.5 else None,
        "eos_token_id": coins.choice([None, NEVER, continuation("llama", 4)[0][7]]),
        "repetition_penalty": coins.choice([None, 1.3]),
        "pad_token_id": coins.choice([0, 5]),
    }
    output = target().generate(
        **prompts(batch_size), **call, max_new_tokens=NEW_TOKENS, do_sample=do_sample, return_dict_in_generate=True,
        output_scores=True, output_logits=True,
    )  # fmt: skip
    return output, record


CASES = [
    (seed, kind, k, batch_size, do_sample)
    for seed, (kind, k, batch_size, do_sample) in enumerate(
        (kind, k, batch_size, do_sample)
        for kind in ("model", "itself", "prompt_lookup", "none", "uneven")
        for k in (1, 4, "auto")
        for batch_size in (1, 4)
        for do_sample in (False, True)
    )
]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("seed", "kind", "k", "batch_size", "do_sample"), CASES)
def test_plain_decoding_and_ours_call_the_same_in_the_same_order(
    seed: int, kind: str, k: Any, batch_size: int, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is sampled, the first processor leaves one id, so that no random number decides."""
    erratic_k(monkeypatch, seed)
    specdec.disable(target())
    want, record = run(seed, batch_size, do_sample)
    specdec.enable(target(), Uneven(seed) if kind == "uneven" else drafter(kind), num_draft_tokens=k)
    got, ours = run(seed, batch_size, do_sample)
    assert specdec.last_stats(target()) is not None, "the stock loop served the call"
    assert got.sequences.tolist() == want.sequences.tolist()
    assert_same(record, ours)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(want[name])
        torch.testing.assert_close(got[name], want[name], atol=2e-4, rtol=1e-4)


def test_the_calls_are_no_easy_ones() -> None:
    """Some rows end, some calls end early, some drafts are accepted: else the test above shows little."""
    specdec.disable(target())
    lengths = Counter(run(seed, 4, False)[0].sequences.shape[1] - WIDTH for seed in range(24))
    assert len(lengths) > 5
    specdec.enable(target(), drafter(), num_draft_tokens=4)
    accepted = []
    for seed in range(12):
        run(seed, 4, False)
        accepted.append(specdec.last_stats(target()).num_accepted_draft_tokens)
    assert sum(accepted) > 20


def test_with_equal_random_numbers_sampled_calls_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a draft each position takes one random number a row, as plain decoding by inversion does."""

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        return sampling.draw(probs, sampling.uniforms(len(probs), device=probs.device))[:, None]

    def call() -> tuple[list[Any], Record]:
        record = Record()
        torch.manual_seed(3)
        text = target().generate(
            **prompts(4), max_new_tokens=NEW_TOKENS, do_sample=True, temperature=3.0,
            logits_processor=[Stateful(record, 0)], stopping_criteria=[Tracking(record, 1, 4, "rows")],
            eos_token_id=NEVER,
        )  # fmt: skip
        return text.tolist(), record

    specdec.disable(target())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        want, record = call()
    specdec.enable(target(), "none")
    got, ours = call()
    assert got == want
    assert_same(record, ours)


class Budget(LogitsProcessor):
    """Forces an id as the n-th new one by counting its calls, as a thinking budget does."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return (
            torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(7), 0.0) if self.calls == self.at else scores
        )


@pytest.mark.parametrize("kind", ["model", "itself", "prompt_lookup", "none"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_processor_that_counts_its_calls_gives_plain_text(batch_size: int, kind: str) -> None:
    want, got = both(prompts(batch_size), lambda: {"max_new_tokens": 12, "logits_processor": [Budget(6)]}, kind)
    assert got.tolist() == want.tolist()
    assert (got[:, WIDTH + 5] == 7).all()


def batch_streamer() -> dict[str, Any]:
    return {"streamer": Streamer(Record())}


def allowed() -> dict[str, Any]:
    """A function that stores the last text it was called with, and accepts only that text with one more id."""
    known: dict[int, list[int]] = {}

    def function(row: int, ids: Tensor) -> list[int]:
        text = ids.tolist()
        assert row not in known or text[:-1] == known[row]
        known[row] = text
        return list(range(3 + (text[-1] + row) % 5, VOCAB_SIZE, 5))

    return {"prefix_allowed_tokens_fn": function}


# Calls that had to go to the stock loop, or came out otherwise, before there was lockstep.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "guidance": lambda: {"guidance_scale": 1.5},
    "guidance with a prompt of its own": lambda: {
        "guidance_scale": 1.7, "negative_prompt_ids": prompts(4)["input_ids"].flip(0),
    },
    "a watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=5.0)},
    "SynthID": lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 1, 4], ngram_len=3)},
    "a grammar with a state": allowed,
    "a confidence": lambda: {
        "stopping_criteria": [ConfidenceCriteria(0.5)], "return_dict_in_generate": True, "output_scores": True,
        "generation_config": GenerationConfig(max_new_tokens=16, pad_token_id=0),
    },
    "a time limit": lambda: {"max_time": 1e6},
    "no time": lambda: {"max_time": 0.0, "eos_token_id": NEVER},
    "a streamer of the batch": batch_streamer,
    "stop strings without an EOS": lambda: stop_string(continuation("llama", 4)) | {"eos_token_id": None},
}  # fmt: skip


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", ["model", "itself", "prompt_lookup", "suffix"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_need_lockstep_give_plain_text(name: str, kind: str) -> None:
    rows = 1 if name == "a confidence" else 4
    default = {} if name == "a confidence" else {"max_new_tokens": 16}
    want, got = both(prompts(rows), lambda: default | CALLS[name](), kind)
    want, got = (text if isinstance(text, Tensor) else text.sequences for text in (want, got))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("kind", ["model", "itself", "prompt_lookup", "none"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_that_are_all_minus_infinity_give_what_plain_decoding_writes(
    batch_size: int, kind: str, opaque: bool
) -> None:
    """At some places every id is forbidden, by a processor that reads the text."""

    def forbid(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill((ids.sum(1, keepdim=True) + ids.shape[1]) % 4 == 0, -torch.inf)

    words = [[i] for i in range(VOCAB_SIZE)] if not opaque else None
    call = {"max_new_tokens": 14, "logits_processor": [forbid] if opaque else None, "bad_words_ids": words}
    want, got = both(prompts(batch_size), call, kind)
    assert got.tolist() == want.tolist()
    assert 0 in want[:, WIDTH:]


class Fresh(Uneven):
    """Its ids differ from call to call, or they would not be drawn from what it says they are."""

    def begin(self, sequences: Any, sampling: Any) -> None:
        self.seed += 1
        super().begin(sequences, sampling)


@pytest.mark.parametrize("kind", ["model", "uneven"])
def test_sampled_rows_in_lockstep_each_have_the_targets_distribution(kind: str) -> None:
    """Few rows a call, so that drafts are accepted and each row is cut by the others now and then."""
    model = test_distribution.new_model(0)
    rows = test_distribution.UNEVEN_PROMPTS[:2]
    inputs = {name: tensor.repeat_interleave(3, 0) for name, tensor in test_distribution.batch(rows).items()}
    draft = Fresh(0, test_distribution.V) if kind == "uneven" else test_distribution.tiny_model(1)
    specdec.enable(model, draft, num_draft_tokens=2, compile=False)
    torch.manual_seed(0)
    counts: list[Counter[Any]] = [Counter(), Counter()]
    call = test_distribution.NO_CUT | {"temperature": 0.7, "max_new_tokens": test_distribution.LENGTH}
    accepted = 0
    for _ in range(200):
        text = model.generate(**inputs, **call, logits_processor=[lambda ids, scores: scores])
        accepted += specdec.last_stats(model).num_accepted_draft_tokens
        for row, ids in enumerate(text[:, -test_distribution.LENGTH :].tolist()):
            counts[row // 3][tuple(ids)] += 1
    assert accepted > 150
    width = inputs["input_ids"].shape[1]
    p_values = [
        test_distribution.p_value(count, test_distribution.expected(row, width, "temperature"))
        for count, row in zip(counts, rows, strict=True)
    ]
    assert min(p_values) > test_distribution.SIGNIFICANCE


def test_known_callbacks_are_not_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers itself brings is served without lockstep."""
    monkeypatch.setattr(lockstep.Lockstep, "commit", None)
    call = {
        "max_new_tokens": 12, "eos_token_id": continuation("llama", 4)[0][5], "repetition_penalty": 1.2,
        "min_new_tokens": 3, "no_repeat_ngram_size": 3, "suppress_tokens": [9],
    } | stop_string(continuation("llama", 4))  # fmt: skip
    want, got = both(prompts(4), call)
    assert got.tolist() == want.tolist()


def test_an_error_in_a_callback_is_the_callers() -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > WIDTH + 4:
            raise KeyError("of the caller")
        return scores

    model = specdec.enable(target(), drafter(), num_draft_tokens=K)
    with pytest.raises(KeyError, match="of the caller"):
        model.generate(**prompts(4), max_new_tokens=9, logits_processor=[fail])
    assert model.generate(**prompts(4), max_new_tokens=9).shape == (4, WIDTH + 9)
