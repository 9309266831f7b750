"""Clients of generate() that keep a state of their own get from an enabled model what plain decoding gives them.

A grammar's matcher and lm-evaluation-harness' stop criterion advance by one token a call. They are right only if they
are called as plain decoding calls them: once for each position, in order, with the whole batch, finished rows padded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.utils import embedded

DRAFTERS = ("model", "prompt_lookup")
GRAMMARS_AND_DRAFTERS = [("regex", "model"), ("schema", "prompt_lookup")]
KS = (1, 4, "auto")  # how many tokens a step drafts
ONE_AND_THREE = (pytest.param(1, marks=pytest.mark.full), 3)  # batch sizes
MAX_NEW_TOKENS = 120  # more than any text of the grammars has bytes, so that every text ends with an EOS

REGEX = r"(        self\.[a-z_]{1,10} = [a-z_]{1,10}\n){1,3}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "size": {"enum": [*range(1, 21)]},
        "tags": {"type": "array", "items": {"enum": ["int", "str", "list"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
# Their constrained texts differ in length and repeat something: rows end apart, and prompt lookup finds matches.
PROMPTS = {
    "regex": [
        "class Stack:\n    def __init__(self, items, size):\n        self.items = items\n",
        "class Node:\n    def __init__(self, name, parent, value=None):\n        self.name = name\n",
        "class Reader(Base):\n    def __init__(self, stream, encoding, errors):\n        self.stream = stream\n",
    ],
    "schema": [
        'rows = [\n    {"name": "start", "size": 12, "tags": ["int"]},\n'
        '    {"name": "stop", "size": 12, "tags": ["int", "str"]},\n    ',
        '{"name": "a", "size": 1, "tags": ["str", "list"]}\n{"name": "b", "size": 2, "tags": ["str", "list"]}\n',
        'row = {"name": "key", "size": 3, "tags": ["list"]}\nrow = ',
    ],
}


def cases(batch_size: int) -> list[Any]:
    """Batch sizes 1 and batch_size with each K; the `full` ones run in make test-all only."""
    covering = {(batch_size, 4), (batch_size, "auto")}
    return [
        pytest.param(*case, marks=() if case in covering else pytest.mark.full) for case in product((1, batch_size), KS)
    ]


@cache
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.TARGET, dtype=torch.float32)


@cache
def draft() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.DRAFT, dtype=torch.float32)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")


@pytest.fixture(autouse=True)
def _plain_afterwards() -> Iterator[None]:
    yield
    specdec.disable(target())


def enable(kind: str, k: int | str) -> None:
    specdec.enable(target(), draft() if kind == "model" else kind, num_draft_tokens=k, compile=False)


def check_stats(k: int | str) -> None:
    """specdec served the last call, and drafts were accepted."""
    stats = specdec.last_stats(target())
    assert stats is not None, "the stock loop served the call"
    assert stats.num_accepted_draft_tokens > 0 or k == "auto", "no draft token was accepted, so this test shows little"


def generate(prompts: list[str], **call: Any) -> list[list[int]]:
    """The new ids of each row, with padding after its EOS."""
    inputs = tokenizer()(prompts, return_tensors="pt", padding=True)
    text = target().generate(**inputs, **{"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | call)
    return text[:, inputs["input_ids"].shape[1] :].tolist()


def decode(rows: list[list[int]]) -> list[str]:
    return tokenizer().batch_decode(rows, skip_special_tokens=True)


def satisfies(grammar: str, text: str) -> bool:
    """The whole text is one of the grammar; checked without the client's own matcher."""
    if grammar == "regex":
        return re.fullmatch(REGEX, text) is not None
    row, wanted = json.loads(text), SCHEMA["properties"]
    return (
        list(row) == ["name", "size", "tags"]
        and re.fullmatch(wanted["name"]["pattern"], row["name"]) is not None
        and row["size"] in wanted["size"]["enum"]
        and 1 <= len(row["tags"]) <= 3
        and set(row["tags"]) <= {"int", "str", "list"}
    )


class Recorded:
    """Hands calls on to a logits processor and keeps the ids of each."""

    def __init__(self, processor: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.processor, self.calls = processor, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.tolist())
        return self.processor(input_ids, scores)


@cache
def compiled_grammar(grammar: str) -> Any:
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer(), vocab_size=target().config.vocab_size)
    compiler = xgrammar.GrammarCompiler(vocabulary)
    if grammar == "regex":
        return compiler.compile_regex(REGEX)
    return compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)


def xgrammar_processor(grammar: str) -> Any:
    """A new one for each call of generate(), as xgrammar requires."""
    return pytest.importorskip("xgrammar.contrib.hf").LogitsProcessor(compiled_grammar(grammar))


@pytest.mark.parametrize(("batch_size", "k"), cases(3))
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("grammar", PROMPTS)
def test_xgrammar_greedy_text_is_plain(grammar: str, batch_size: int, kind: str, k: int | str) -> None:
    prompts = PROMPTS[grammar][:batch_size]
    want = generate(prompts, logits_processor=[xgrammar_processor(grammar)])
    lengths = {row.index(tokenizer().eos_token_id) for row in want}
    assert len(lengths) > 1 or batch_size == 1, "rows end at different places, or this test shows little"
    assert all(satisfies(grammar, text) for text in decode(want))
    enable(kind, k)
    assert generate(prompts, logits_processor=[xgrammar_processor(grammar)]) == want
    check_stats(k)


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_xgrammar_is_called_as_plain_decoding_calls_it(batch_size: int, kind: str) -> None:
    prompts = PROMPTS["schema"][:batch_size]
    plain, speculative = Recorded(xgrammar_processor("schema")), Recorded(xgrammar_processor("schema"))
    want = generate(prompts, logits_processor=[plain])
    enable(kind, 4)
    assert generate(prompts, logits_processor=[speculative]) == want
    assert speculative.calls == plain.calls
    check_stats(4)


@pytest.mark.parametrize("batch_size", ONE_AND_THREE)
@pytest.mark.parametrize(("grammar", "kind"), GRAMMARS_AND_DRAFTERS)
def test_xgrammar_holds_for_sampled_text(grammar: str, batch_size: int, kind: str) -> None:
    enable(kind, 4)
    texts = []
    for seed in range(2):
        torch.manual_seed(seed)
        processor = xgrammar_processor(grammar)
        texts += decode(generate(PROMPTS[grammar][:batch_size], logits_processor=[processor], do_sample=True))
        assert specdec.last_stats(target()).num_draft_tokens > 0
    assert len(set(texts)) > 1
    assert all(satisfies(grammar, text) for text in texts), texts


@pytest.fixture
def make_generator() -> Iterator[Callable[[str], Any]]:
    """Makes outlines' generator for a grammar. Its backend raises where an id cannot follow those of earlier calls."""
    outlines = pytest.importorskip("outlines")
    import torch._dynamo  # outlines sets suppress_errors, which would hide what fails in other tests

    def make(grammar: str) -> Any:
        kind = outlines.types.Regex(REGEX) if grammar == "regex" else outlines.types.JsonSchema(json.dumps(SCHEMA))
        return outlines.Generator(outlines.from_transformers(target(), tokenizer()), kind)

    with torch._dynamo.config.patch(suppress_errors=False), torch.compiler.set_stance("force_eager"):
        yield make


@pytest.mark.parametrize("batch_size", ONE_AND_THREE)
@pytest.mark.parametrize(("grammar", "kind"), GRAMMARS_AND_DRAFTERS)
def test_outlines_text_is_plain(make_generator: Callable[[str], Any], grammar: str, batch_size: int, kind: str) -> None:
    prompts, call = PROMPTS[grammar][:batch_size], {"max_new_tokens": MAX_NEW_TOKENS}
    generator = make_generator(grammar)  # resets its processor for each call
    want = generator.batch(prompts, do_sample=False, **call)
    assert all(satisfies(grammar, text) for text in want)
    enable(kind, 4)
    assert generator.batch(prompts, do_sample=False, **call) == want
    check_stats(4)
    torch.manual_seed(0)
    sampled = generator.batch(prompts, do_sample=True, **call)
    assert specdec.last_stats(target()) is not None
    assert all(satisfies(grammar, text) for text in sampled), sampled


class MultiTokenEOS(StoppingCriteria):
    """Stops once every row has written a string: a flag a row and one answer for all, as in lm-evaluation-harness."""

    def __init__(self, string: str, prompt_width: int, batch_size: int) -> None:
        self.string, self.prompt_width = string, prompt_width
        self.num_last_ids = len(tokenizer().encode(string, add_special_tokens=False)) + 2
        self.is_done = [False] * batch_size
        self.calls: list[list[list[int]]] = []
        self.widths: list[int | None] = [None] * batch_size  # of the text when each row was done

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.calls.append(input_ids.tolist())
        last = tokenizer().batch_decode(input_ids[:, self.prompt_width :][:, -self.num_last_ids :])
        for row, is_done in enumerate(self.is_done):
            if not is_done and self.string in last[row]:
                self.is_done[row], self.widths[row] = True, input_ids.shape[1]
        return all(self.is_done)


# Each writes "self." soon, at another place.
STOPPED = [
    "class Stack:\n    def __init__(self, items, size):\n",
    "class Node:\n    def __init__(self, name):\n        self.name = name\n\n    def parent(self):\n        return ",
    "    def test_open(self):\n        with open(name) as file:\n            ",
    "import os\n\n\nclass Reader:\n    def close(self):\n        if ",
]


@pytest.mark.parametrize(("batch_size", "k"), cases(4))
@pytest.mark.parametrize("kind", DRAFTERS)
def test_one_answer_for_a_batch_stops_it_where_plain_decoding_stops(batch_size: int, kind: str, k: int | str) -> None:
    prompts = STOPPED[:batch_size]
    width = tokenizer()(prompts, return_tensors="pt", padding=True)["input_ids"].shape[1]
    plain, speculative = (MultiTokenEOS("self.", width, batch_size) for _ in range(2))
    want = generate(prompts, stopping_criteria=StoppingCriteriaList([plain]))
    assert len(set(plain.widths)) > 1 or batch_size == 1, "rows are done at different places, or this test shows little"
    assert len(want[0]) < MAX_NEW_TOKENS, "the criterion ends the call, or this test shows little"
    enable(kind, k)
    assert generate(prompts, stopping_criteria=StoppingCriteriaList([speculative])) == want
    assert speculative.calls == plain.calls
    check_stats(k)


def generate_until(prompts: list[str], until: str) -> tuple[list[str], list[list[list[int]]], list[Any]]:
    """From lm-evaluation-harness at batch 4: its answers, and the ids and stats of each of its calls of generate()."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    outputs, stats = [], []

    class Recording(huggingface.HFLM):
        def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
            ids = super()._model_generate(*args, **kwargs)
            outputs.append(ids.tolist())
            stats.append(specdec.last_stats(target()))
            return ids

    model = Recording(pretrained=target(), tokenizer=tokenizer(), batch_size=4)
    call = {"until": [until], "max_gen_toks": 40, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, call), i) for i, prompt in enumerate(prompts)]
    return model.generate_until(requests, disable_tqdm=True), outputs, stats


@pytest.mark.full
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("until", ["self.", "\n\n"])
def test_lm_evaluation_harness_gets_plain_text(until: str, kind: str, k: int | str) -> None:
    prompts = [*STOPPED, *(prompt["prompt"][-200:] for prompt in embedded.prompts()[:4])]
    want, want_outputs, _ = generate_until(prompts, until)
    assert [len(rows) for rows in want_outputs] == [4, 4]
    enable(kind, k)
    got, outputs, all_stats = generate_until(prompts, until)
    assert got == want
    assert outputs == want_outputs  # its answers are cut at their stop strings
    for stats in all_stats:
        assert stats is not None, "the stock loop served the call"
        assert stats.num_draft_tokens > 0 or k == "auto"
