"""One call served by plain decoding and by specdec, and the calls that the tests compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import specdec
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts

K = 3
WIDTH = 11  # of the padded prompts
# "model" is sometimes right (see pair). "itself", the target as its own draft model, always is: every stop then lies in
# a draft.
DRAFTERS = ("model", "itself", "prompt_lookup", "none")
# An EOS id that no text here holds: plain decoding pads a row that another criterion has ended only where there is one.
NEVER = 2


@cache
def pair(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target, and as its draft model a copy with noise on its weights: some drafts are accepted and some are not."""
    model = make_model(model_type, **FAMILIES[model_type])
    draft = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, draft


def target(model_type: str = "llama") -> PreTrainedModel:
    return pair(model_type)[0]


def drafter(kind: str = "model", model_type: str = "llama") -> Any:
    return dict(zip(("itself", "model"), pair(model_type), strict=True)).get(kind, kind)


def both(
    inputs: dict[str, Tensor], call: Any, kind: str = "model", model_type: str = "llama", k: int = K
) -> tuple[Any, Any]:
    """What a call (keywords, or a function that makes them) returns from plain decoding and from specdec."""
    model = target(model_type)
    specdec.disable(model)
    want = model.generate(**inputs, **(call() if callable(call) else call))
    specdec.enable(model, drafter(kind, model_type), num_draft_tokens=k)
    got = model.generate(**inputs, **(call() if callable(call) else call))
    assert specdec.last_stats(model) is not None, "the stock loop served the call"
    return want, got


@cache
def continuation(model_type: str, batch_size: int) -> list[list[int]]:
    """24 plain ids for each row, to pick stops and forbidden ids from."""
    specdec.disable(target(model_type))
    return target(model_type).generate(**prompts(batch_size), max_new_tokens=24)[:, WIDTH:].tolist()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 101 ids, most of them two letters long, so that stop strings straddle tokens."""
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    merges = [(a, b) for a in letters for b in letters][: VOCAB_SIZE - 3 - len(letters)]
    words = ["<pad>", "<s>", "</s>", *letters, *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", padding_side="left")


class PrefixBias(LogitsProcessor):
    """Favours an id that depends on all of the padded prefix and on the row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        favoured = (input_ids.sum(1) + 7 * input_ids.shape[1] + torch.arange(len(scores))) % scores.shape[1]
        return scores.scatter_add(1, favoured[:, None], scores.new_full((len(scores), 1), 6.0))


class StopAt(StoppingCriteria):
    """Stops where condition(texts [B, L]) -> [B] bool, or one bool for all, holds; counts its calls."""

    def __init__(self, condition: Callable[[Tensor], Tensor | bool]) -> None:
        self.condition, self.calls = condition, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.as_tensor(self.condition(input_ids)).expand(len(input_ids))


def stop_at(condition: Callable[[Tensor], Tensor | bool], **call: Any) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList([StopAt(condition)]), "eos_token_id": NEVER} | call


def stop_string(text: list[list[int]]) -> dict[str, Any]:
    """A stop string that begins inside one token of the first row's text and ends inside another."""
    written = tokenizer().decode(text[0][4:8])
    return {"stop_strings": [written[1:-1], "never written"], "tokenizer": tokenizer(), "eos_token_id": NEVER}


# Keywords of a call, given plain continuations of its prompts. Where they set no length it is 18 new ids, no multiple
# of K + 1.
CALLS: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "nothing": lambda text: {},
    "one eos": lambda text: {"eos_token_id": text[0][4]},
    "several eos": lambda text: {"eos_token_id": [text[0][9], text[-1][6]], "pad_token_id": None},
    "one id": lambda text: {"max_new_tokens": 1},
    "K ids": lambda text: {"max_new_tokens": K},
    "max_length": lambda text: {"max_length": WIDTH + 13, "max_new_tokens": None},
    "config": lambda text: {
        "generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=5, eos_token_id=text[0][4])
    },
    "min_new_tokens": lambda text: {"eos_token_id": text[0][4], "min_new_tokens": 9},
    "min_length": lambda text: {"eos_token_id": text[0][4], "min_length": WIDTH + 9},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": lambda text: {"encoder_repetition_penalty": 1.5},
    "bad_words_ids": lambda text: {"bad_words_ids": [[text[0][3]], text[-1][5:7]]},
    "suppress_tokens": lambda text: {"suppress_tokens": text[0][3:5]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": [row[0] for row in text]},
    "forced_eos_token_id": lambda text: {"eos_token_id": NEVER, "forced_eos_token_id": 9},
    "exponential_decay": lambda text: {"eos_token_id": NEVER, "exponential_decay_length_penalty": (4, 1.6)},
    "sequence_bias": lambda text: {"sequence_bias": [[[text[0][3]], -9.0], [text[-1][4:6], -9.0], [[7], 5.0]]},
    "prefix_allowed_tokens_fn": lambda text: {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + (int(ids[-1]) + len(ids) + row) % 5, VOCAB_SIZE, 5))
    },
    "logits_processor": lambda text: {"logits_processor": [PrefixBias()]},
    "renormalize_logits": lambda text: {"renormalize_logits": True, "repetition_penalty": 1.5},
    "stop_strings": stop_string,
    "criterion by length": lambda text: stop_at(lambda ids: ids.shape[1] >= WIDTH + 3),
    "criterion by content": lambda text: stop_at(lambda ids: (ids[:, -3:].sum(1) + ids.shape[1]) % 4 == 0),
    "criterion by prompt": lambda text: stop_at(
        lambda ids: ids.shape[1] >= WIDTH + 2 + 2 * (ids[:, :WIDTH] == 0).sum(1)
    ),
    "two criteria": lambda text: stop_at(
        lambda ids: ids[:, -1] % 5 == 0, eos_token_id=[NEVER, text[-1][2]], max_time=1e6
    ),
    "max_time": lambda text: {"max_time": 0.0},
}


def keywords(name: str, model_type: str = "llama", batch_size: int = 4) -> Callable[[], dict[str, Any]]:
    """The keywords of a call, made for each call: criteria and processors may have state."""
    default = {} if name == "config" else {"max_new_tokens": 18}
    return lambda: default | CALLS[name](continuation(model_type, batch_size))


class RecordingStreamer:
    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.values.append((list(value.shape), value.tolist()))

    def end(self) -> None:
        self.values.append("end")


def streamed(name: str, ids: Tensor, mask: Tensor, **call: Any) -> list[Any]:
    recorder = RecordingStreamer()
    target().generate(**prompts(1), streamer=recorder, **keywords(name, "llama", 1)())
    return recorder.values


def read_in_another_thread(ids: Tensor, mask: Tensor, **call: Any) -> str:
    streamer = TextIteratorStreamer(tokenizer(), timeout=60)
    Thread(target=target().generate, args=(ids[:1],), kwargs=call | {"streamer": streamer}).start()
    return "".join(streamer)


def piped(ids: Tensor, mask: Tensor, **call: Any) -> list[Any]:
    pipe = pipeline("text-generation", model=target(), tokenizer=tokenizer())
    return [pipe(["abcd efgh", "hello"], max_new_tokens=14, do_sample=False, batch_size=size) for size in (1, 2)]


def in_two_threads(ids: Tensor, mask: Tensor, **call: Any) -> list[Any]:
    def row_alone(row: int) -> list[Any]:
        return target().generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **call).tolist()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(row_alone, [0, 2, 3, 0, 2, 3]))


def count_calls_of_a_criterion(ids: Tensor, mask: Tensor, **call: Any) -> int:
    criterion = StopAt(lambda ids: False)
    target().generate(ids[:1], stopping_criteria=StoppingCriteriaList([criterion]), **call)
    return criterion.calls


@torch.inference_mode()
def under_inference_mode(ids: Tensor, mask: Tensor, **call: Any) -> Tensor:
    return target().generate(ids, attention_mask=mask, **call)


def again_and_again(ids: Tensor, mask: Tensor, **call: Any) -> list[Any]:
    """Other prompts, lengths, processors and stops between two equal calls."""
    with_processor, one_id = keywords("logits_processor")(), {"max_new_tokens": 1}
    rounds = [(slice(0, 4), {}), (slice(2, 3), one_id), (slice(1, 4), with_processor), (slice(0, 4), {})]
    return [target().generate(ids[rows], attention_mask=mask[rows], **call | extra).tolist() for rows, extra in rounds]


def errors_of_plain_decoding(ids: Tensor, mask: Tensor, **call: Any) -> list[str]:
    messages = []
    for wrong in (
        {"num_return_sequences": 3},
        {"num_beams": 2, "streamer": RecordingStreamer()},
        {"stop_strings": "x"},
        {"max_length": WIDTH},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]) as raised:
            target().generate(ids, attention_mask=mask, **call | {"max_new_tokens": None} | wrong)
        messages.append(str(raised.value))
    return messages


# Each gets ids [4, 11], their mask, and keywords; what it returns is the same from plain decoding and from specdec.
WAYS: dict[str, Callable[..., Any]] = {
    "positional inputs": lambda ids, mask, **call: target().generate(ids, attention_mask=mask, **call),
    "inputs=": lambda ids, mask, **call: target().generate(inputs=ids, attention_mask=mask, **call),
    "positional config": lambda ids, mask, **call: target().generate(
        ids, GenerationConfig(**call), attention_mask=mask
    ),
    "no mask": lambda ids, mask, **call: target().generate(ids, **call),
    "a bool mask": lambda ids, mask, **call: target().generate(ids, attention_mask=mask.bool(), **call),
    "int32 ids": lambda ids, mask, **call: target().generate(ids.int(), attention_mask=mask, **call),
    "no prompt": lambda ids, mask, **call: target().generate(bos_token_id=4, **call),
    "a prompt of one token": lambda ids, mask, **call: target().generate(ids[:1, -1:], **call),
    "rows of one token": lambda ids, mask, **call: target().generate(ids[:, -1:], **call),
    "top_k=1": lambda ids, mask, **call: target().generate(ids, attention_mask=mask, do_sample=True, top_k=1, **call),
    "a batch streamer": lambda ids, mask, **call: target().generate(
        ids, attention_mask=mask, streamer=RecordingStreamer(), **call
    ),
    "calls of a criterion": count_calls_of_a_criterion,
    "under inference_mode": under_inference_mode,
    "again and again": again_and_again,
    "in two threads": in_two_threads,
    "read in another thread": read_in_another_thread,
    "piped": piped,
    "errors of plain decoding": errors_of_plain_decoding,
}
STREAMED = ("nothing", "one eos", "one id", "criterion by length", "stop_strings")
WAYS |= {f"streamed, {name}": partial(streamed, name) for name in STREAMED}
