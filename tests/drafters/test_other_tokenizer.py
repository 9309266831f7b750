"""A draft model of another tokenizer: the shared tokens, the text in its encoding, its drafts, how calls bring it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import step
from specdec.core.steps import Draft, StepResult
from specdec.drafters import shared_vocabulary
from specdec.drafters.model import ModelDrafter
from specdec.drafters.other_tokenizer import OtherTokenizerDrafter
from specdec.drafters.resolve import resolve_drafter
from specdec.drafters.shared_vocabulary import DraftText, SharedVocabulary, bytes_of_ids
from specdec.experiments.workloads import Stdlib
from specdec.runtime.runner import ModelRunner
from specdec.utils import embedded
from tests.helpers.families import CACHE_FAMILIES, FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.tokenizers import (
    byte_level,
    other_tokenizer,
    permuted,
    sentencepiece,
    shared_words,
    tokenizer_of,
    word_pair,
)

K = 4
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then it sleeps",
    "    def f(self, x):\n        return self.x + 1\n\n\nclass A:\n",
    "naïve café über 日本語のテキスト 😀😃👩‍👩‍👧 emoji",
    "1234 5678 90.12, 33 -- ## [] {}\t\t",
    *4 * ["xxxxxxxxxxxxxxxx"],
]
FRAGMENTS = [
    *"aét ﬁ\n.,0日語😀",
    "👩‍👩‍👧",
    "    ",
    "\n\n",
    " the",
    "the quick",
    "return self",
    "123",
    "é",
    "x" * 40,
    "a b c ",
]


@cache
def byte_level_tokenizer(vocab_size: int = 420, **special: str) -> Any:
    return byte_level(CORPUS * 3, vocab_size, **special or {"eos_token": "<|end|>"})


@cache
def sentencepiece_tokenizer() -> Any:
    return sentencepiece(CORPUS * 3, 700, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@cache
def embedded_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.TARGET)


PAIRS = {
    "byte-level, byte-level": lambda: (embedded_tokenizer(), byte_level_tokenizer()),
    "byte-level, sentencepiece": lambda: (byte_level_tokenizer(), sentencepiece_tokenizer()),
    "sentencepiece, byte-level": lambda: (sentencepiece_tokenizer(), embedded_tokenizer()),
}


@cache
def shared_of(pair: str) -> SharedVocabulary:
    return SharedVocabulary(*PAIRS[pair]())


def draft_token(shared: SharedVocabulary, tokenizer: Any, draft_tokenizer: Any, token: str) -> str | None:
    index = int(shared.draft_ids[tokenizer.get_vocab()[token]])
    return None if index < 0 else draft_tokenizer.convert_ids_to_tokens(index)


def test_tokens_are_compared_by_the_bytes_that_they_stand_for() -> None:
    target, draft = byte_level_tokenizer(), sentencepiece_tokenizer()
    shared = SharedVocabulary(target, draft)
    for token, want in {"Ġthe": "▁the", "Ċ": "\n", "â": "<0xE2>", "x": "x", "<|end|>": "</s>"}.items():
        assert draft_token(shared, target, draft, token) == want
    back = SharedVocabulary(draft, target)
    for token, want in {
        "▁the": "Ġthe",
        "<0xE2>": "â",
        "<0x0A>": None,
        "日": None,
        "</s>": "<|end|>",
        "<unk>": None,
    }.items():
        assert draft_token(back, draft, target, token) == want
    assert draft_token(back, draft, target, "<0x78>") is None  # of "x", which no encoding holds
    assert draft_token(back, draft, target, "x") == "x"


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_tokens_are_the_same_text_in_both(pair: str) -> None:
    target, draft = PAIRS[pair]()
    shared = shared_of(pair)
    target_bytes, draft_bytes = bytes_of_ids(target), bytes_of_ids(draft)
    ids = [(token, index) for token, index in enumerate(shared.draft_ids.tolist()) if index >= 0]
    assert len(ids) == shared.num_shared
    assert len({index for _, index in ids}) == len(ids)
    special = {target.eos_token_id}
    assert all(target_bytes[token] == draft_bytes[index] for token, index in ids if token not in special)
    assert int(shared.draft_ids[target.eos_token_id]) == draft.eos_token_id
    missing = {target_bytes[token] for token, index in enumerate(shared.draft_ids.tolist()) if index < 0}
    assert shared.coverage == shared.num_shared / len(target)
    assert 0 < shared.coverage < 1
    assert len(missing - set(draft_bytes.values())) > 0


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer, embedded_tokenizer])
@pytest.mark.parametrize("text", ["the quick brown 日本 € x", "  a\n\n\tb 😀", "…"])
def test_the_bytes_of_ids_make_up_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    values = bytes_of_ids(tokenizer())
    start = " " if tokenizer is sentencepiece_tokenizer else ""
    assert b"".join(values[index] for index in ids).decode() == start + text


def test_a_bos_token_is_the_draft_models_own() -> None:
    tokens = ["<s>", "</s>", "a", "b", "<bos>"]
    target = tokenizer_of(tokens, bos_token="<s>", eos_token="</s>")
    draft = tokenizer_of(["b", "<bos>", "a", "</s>"], bos_token="<bos>", eos_token="</s>")
    plain = DraftText(SharedVocabulary(target, draft))
    plain.append([0, 2, 3])
    assert plain.ids == [2, 0]  # "<s>" has no draft id
    from tokenizers.processors import TemplateProcessing

    draft.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    for ids in ([0, 2, 3], [2, 3]):
        text = DraftText(SharedVocabulary(target, draft))
        text.append(ids)
        assert text.ids == [1, 2, 0]


def test_special_tokens_are_read_as_those_of_the_draft_model_or_left_out() -> None:
    special = {"eos_token": "<|end|>", "bos_token": "<|user|>"}
    target = byte_level_tokenizer(430, **special, pad_token="<|pad|>")
    draft = byte_level_tokenizer(400, bos_token="<|user|>", eos_token="</s>")
    text = DraftText(SharedVocabulary(target, draft))
    text.append(target.encode("<|user|>the<|pad|> fox<|end|>\n"))
    assert draft.decode(text.ids) == "<|user|>the fox</s>\n"
    assert {draft.bos_token_id, draft.eos_token_id} <= set(text.ids)


def whole(shared: SharedVocabulary, ids: list[int]) -> list[int]:
    """The encoding of the text at once, up to its last whole character."""
    text = shared.bytes_of(ids).removeprefix(shared.added_start)
    for cut in range(4):
        try:
            return shared.draft_prefix + shared.encode(text[: len(text) - cut].decode())
        except UnicodeDecodeError:
            continue
    raise AssertionError("the text is not UTF-8")


texts = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=60).map("".join)


@pytest.mark.parametrize("pair", PAIRS)
@given(text=texts, sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
@example(text="the quick brown fox " + "x" * 151 + " the", sizes=[3])
@settings(max_examples=60, deadline=None)
def test_the_encoding_of_a_growing_text_is_that_of_the_whole_text(pair: str, text: str, sizes: list[int]) -> None:
    """After each append: characters that are split across tokens, words that grow, runs of one character."""
    ids = PAIRS[pair]()[0].encode(text, add_special_tokens=False)
    shared = shared_of(pair)
    growing, end, final = DraftText(shared), 0, []
    for size in cycle(sizes):
        growing.append(ids[end : end + size])
        end += size
        assert growing.ids == whole(shared, ids[:end])
        assert growing.ids[: len(final)] == final, "a final id has changed"
        final = growing.ids[: growing.num_final]
        if end >= len(ids):
            break
    assert growing.is_complete


def test_a_text_that_ends_within_a_character_is_not_complete() -> None:
    shared = shared_of("byte-level, sentencepiece")
    target = byte_level_tokenizer()
    ids = target.encode("a €", add_special_tokens=False)
    states = []
    text = DraftText(shared)
    for index in ids:
        text.append([index])
        states.append(text.is_complete)
    assert states == [True, True, False, False, True]
    assert sentencepiece_tokenizer().decode(text.ids) == "a €"
    text.append([ids[2], ids[0]])  # no UTF-8
    assert text.is_complete
    assert sentencepiece_tokenizer().decode(text.ids) == "a €\ufffda"


@pytest.mark.parametrize("unit", ["the quick brown fox ", "日本語の", "    return self.x + 1\n", "ab"])
def test_the_cost_of_a_step_does_not_grow_with_the_text(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, target = shared_of("byte-level, sentencepiece"), byte_level_tokenizer()
    ids = target.encode(unit * 300, add_special_tokens=False)
    want = whole(shared, ids)
    text = DraftText(shared)
    text.append(ids[:500])
    lengths: list[int] = []
    stock = SharedVocabulary.encode
    monkeypatch.setattr(SharedVocabulary, "encode", lambda self, text: lengths.append(len(text)) or stock(self, text))
    for at in range(500, len(ids), 3):
        text.append(ids[at : at + 3])
    assert text.ids == want
    steps = (len(ids) - 500) // 3
    assert max(lengths) <= 300
    assert sum(lengths) < 300 * steps
    assert len(text.ids) - text.num_final < 300


class PlainDraft:
    """What the draft model would draft without a cache, from each text encoded as a whole."""

    def __init__(self, drafter: OtherTokenizerDrafter) -> None:
        self.drafter, self.model, self.shared = drafter, drafter.runner.model, drafter.shared

    @torch.no_grad()
    def scores(self, text: list[int], drafted: list[int]) -> Tensor:
        """Logits over the target's vocabulary behind a text and drafted ids of the target."""
        ids = whole(self.shared, text) + self.shared.draft_ids[drafted].tolist()
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        draft_ids = self.shared.draft_ids[:VOCAB_SIZE]
        return logits[draft_ids.clamp(min=0)].masked_fill(draft_ids < 0, -torch.inf)


class CheckedDrafter:
    """An OtherTokenizerDrafter whose proposals are compared with the draft model on the whole texts."""

    def __init__(self, drafter: OtherTokenizerDrafter) -> None:
        self.drafter, self.plain = drafter, PlainDraft(drafter)
        self.num_compared = self.num_accepted = 0

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.drafter.begin(sequences, sampling)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        draft = self.drafter.propose(sequences, limit)
        for row, length in enumerate(draft.lengths.tolist()):
            text = sequences.ids[row, : sequences.lengths[row]].tolist()
            for index in range(length):
                drafted = draft.ids[row, :index].tolist()
                scores = self.plain.scores(text, drafted)
                if draft.probs is None:
                    assert draft.ids[row, index] == scores.argmax()
                else:
                    probs = draft.probs[row, index]
                    torch.testing.assert_close(probs, scores.softmax(-1), rtol=1e-3, atol=1e-5)
                    assert (probs[scores == -torch.inf] == 0).all()
            self.num_compared += length
        return draft

    def observe(self, result: StepResult) -> None:
        self.drafter.observe(result)
        self.num_accepted += int(result.accepted.sum())


@torch.no_grad()
def run(
    target: PreTrainedModel, drafter: CheckedDrafter, schedule: list[int], batch_size: int = 3, do_sample: bool = False,
    length: int = 40, stop_ids: Tensor | None = None,
) -> Sequences:  # fmt: skip
    """Run steps with K from the schedule, repeated, until all rows have finished."""
    batch = prompts(batch_size)
    lengths = batch["attention_mask"].sum(1)
    sequences = Sequences(batch["input_ids"], lengths, max_length=11 + length, num_draft_tokens=K, stop_ids=stop_ids)
    sampling, runner = Sampling(do_sample=do_sample), ModelRunner(target)
    torch.manual_seed(0)
    runner.begin(len(lengths))
    drafter.begin(sequences, sampling)
    runner.prefill(sequences.ids, lengths - 2)
    for k in cycle(schedule):
        if sequences.finished.all():
            return sequences
        step(runner, drafter, sequences, sampling, k)
    raise AssertionError


def noisy(model_type: str, noise: float) -> OtherTokenizerDrafter:
    model = copy.deepcopy(family(model_type))
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return other_tokenizer(model)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.5])
def test_drafts_are_those_of_the_draft_model_on_its_own_encoding(
    noise: float, batch_size: int, do_sample: bool
) -> None:
    drafter = CheckedDrafter(noisy("llama", noise))
    run(family("llama"), drafter, [K], batch_size, do_sample)
    assert drafter.num_compared > 20
    assert 0 < drafter.num_accepted < drafter.num_compared or noise == 0.5


@pytest.mark.parametrize("model_type", CACHE_FAMILIES)
def test_drafts_are_right_in_every_kind_of_attention(model_type: str) -> None:
    run(family(model_type), drafter := CheckedDrafter(noisy(model_type, 0.03)), [K])
    assert drafter.num_compared > 20


@given(st.lists(st.integers(0, K), min_size=1, max_size=6).filter(any), st.sampled_from([0, 0.03]), st.booleans(),
       st.sampled_from([9, 99]))  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_drafts_are_right_after_any_history(schedule: list[int], noise: float, do_sample: bool, stride: int) -> None:
    stop_ids = torch.arange(0, VOCAB_SIZE, stride)
    run(family("llama"), CheckedDrafter(noisy("llama", noise)), schedule, do_sample=do_sample, length=20,
        stop_ids=stop_ids)  # fmt: skip


def test_a_drafter_starts_each_call_with_new_texts() -> None:
    drafter = CheckedDrafter(noisy("llama", 0.03))
    for schedule, batch_size in (([K], 3), ([2, 0, K], 1), ([K], 3)):
        run(family("llama"), drafter, schedule, batch_size, length=12)


def test_the_context_is_that_of_the_draft_models_encoding() -> None:
    small = make_model("gpt2", **FAMILIES["gpt2"] | {"n_positions": 24})
    small.transformer.h.load_state_dict(family("gpt2").transformer.h.state_dict())
    drafter = CheckedDrafter(other_tokenizer(small))
    offered: list[int] = []
    stock = drafter.drafter.propose

    def propose(sequences: Sequences, limit: Tensor) -> Draft:
        draft = stock(sequences, limit)
        for row, count in enumerate(draft.lengths.tolist()):
            ids = whole(drafter.drafter.shared, sequences.ids[row, : sequences.lengths[row]].tolist())
            offered.append(len(ids) + count if count else 0)
        return draft

    drafter.drafter.propose = propose  # type: ignore[method-assign]
    assert run(family("gpt2"), drafter, [K], length=40).lengths.max() > 30
    assert max(offered) == 24


def test_a_row_that_ends_within_a_character_proposes_nothing_and_the_others_draft() -> None:
    target_tokenizer, draft_tokenizer = byte_level_tokenizer(), sentencepiece_tokenizer()
    shared = SharedVocabulary(target_tokenizer, draft_tokenizer)
    sizes = {"vocab_size": len(target_tokenizer)}, {"vocab_size": len(draft_tokenizer)}
    draft = make_model("llama", **FAMILIES["llama"] | sizes[1])
    rows = [target_tokenizer.encode(text, add_special_tokens=False) for text in ("the fox €", "the fox x", "€")]
    ids = [rows[0][:-1], rows[1], rows[2][:1]]
    width = max(map(len, ids))
    prompt = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    lengths = torch.tensor(list(map(len, ids)))
    drafter = OtherTokenizerDrafter(draft, len(target_tokenizer), shared)
    sequences = Sequences(prompt, lengths, max_length=40, num_draft_tokens=K)
    drafter.begin(sequences, Sampling())
    with torch.no_grad():
        assert drafter.propose(sequences, sequences.begin_step(K)).lengths.tolist() == [0, K, 0]
    target = make_model("llama", **FAMILIES["llama"] | sizes[0])
    inputs = {"input_ids": prompt, "attention_mask": (torch.arange(width) >= width - lengths[:, None]).long()}
    want = target.generate(**inputs, max_new_tokens=30)
    specdec.enable(target, drafter, num_draft_tokens=K)
    assert target.generate(**inputs, max_new_tokens=30).equal(want)  # its random bytes are seldom UTF-8
    assert specdec.last_stats(target).num_draft_tokens > 0


@cache
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.TARGET)


@cache
def draft() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded.DRAFT)


@cache
def order() -> Tensor:
    return torch.randperm(len(embedded_tokenizer()), generator=torch.Generator().manual_seed(0))


def permuted_tokenizer(folder: Path) -> Any:
    """The embedded tokenizer, with token order[i] under id i."""
    import json

    embedded_tokenizer().save_pretrained(folder)
    new_ids = {int(old): new for new, old in enumerate(order())}
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {token: new_ids[old] for token, old in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    file.write_text(json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def permuted_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded draft model and its tokenizer, both with other ids."""
    folder = tmp_path_factory.mktemp("permuted")
    permuted_tokenizer(folder)
    permuted(draft(), order()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    specdec.disable(target())


def code(count: int) -> list[dict[str, Tensor]]:
    texts = [prompt.turns[0] for prompt in Stdlib().prompts()][:count]
    return [embedded_tokenizer()(text, return_tensors="pt") for text in texts]


def enable_quietly(model: PreTrainedModel, drafter: Any, **arguments: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the draft model has another tokenizer")
        specdec.enable(model, drafter, **arguments)


def test_other_ids_of_the_same_tokens_are_accepted_as_often(permuted_draft: Path) -> None:
    results = []
    for drafter in (draft(), permuted_draft):
        enable_quietly(target(), drafter, num_draft_tokens=5)
        results.append([])
        for inputs in code(4):
            text = target().generate(**inputs, max_new_tokens=48, do_sample=False)
            stats = specdec.last_stats(target())
            results[-1].append((text.tolist(), stats.acceptance_histogram, stats.num_draft_tokens))
    assert results[0] == results[1]
    assert sum(drafted for _, _, drafted in results[0]) > 50


def test_enable_says_what_can_be_drafted_and_the_call_is_specdecs(permuted_draft: Path) -> None:
    words = r"another tokenizer than the target: 100.0% of the target's 4096 ids can be drafted"
    with pytest.warns(UserWarning, match=words) as caught:
        specdec.enable(target(), permuted_draft, num_draft_tokens=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    target().generate(**code(1)[0], max_new_tokens=8)
    assert specdec.last_stats(target()).num_accepted_draft_tokens > 0
    model = AutoModelForCausalLM.from_pretrained(permuted_draft)
    with pytest.warns(UserWarning, match=words):
        assert type(resolve_drafter(model, target())) is OtherTokenizerDrafter


def test_further_added_tokens_do_not_make_another_tokenizer(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    draft().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(resolve_drafter(tmp_path, target())) is ModelDrafter


def test_tokenizers_with_little_in_common_are_refused(tmp_path: Path) -> None:
    tokenizer_of(["日", "本", "<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(tmp_path)
    make_model("llama", **FAMILIES["llama"] | {"vocab_size": 3}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0.0% of the target's 4096 ids can be drafted, too few to draft with"):
        specdec.enable(target(), tmp_path)
    assert "_specdec_state" not in target().__dict__


def test_a_tokenizer_of_another_library_is_refused() -> None:
    class Other:
        pass

    with pytest.raises(ValueError, match="specdec cannot compare a Other"):
        bytes_of_ids(Other())  # type: ignore[arg-type]


def test_a_call_may_bring_a_draft_model_with_both_tokenizers(permuted_draft: Path) -> None:
    """In transformers' own words, also where the folders of the models have no tokenizers."""
    tokenizer = AutoTokenizer.from_pretrained(permuted_draft)
    assistant = permuted(draft(), order())
    assistant.config._name_or_path = assistant.name_or_path = ""
    inputs = code(1)[0]
    want = target().generate(**inputs, max_new_tokens=24, do_sample=False)
    specdec.enable(target(), num_draft_tokens=4)
    call = {"assistant_model": assistant, "tokenizer": embedded_tokenizer(), "assistant_tokenizer": tokenizer}
    built: list[Any] = []
    stock = shared_vocabulary.SharedVocabulary.__init__
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(SharedVocabulary, "__init__", lambda self, *args: built.append(self) or stock(self, *args))
        warnings.simplefilter("always")
        for _ in range(2):
            text = target().generate(**inputs, **call, num_assistant_tokens=4, max_new_tokens=24, do_sample=False)
            assert text.equal(want)
            assert specdec.last_stats(target()).num_accepted_draft_tokens > 4
    assert len(built) == 1
    assert ["can be drafted" in str(warning.message) for warning in caught] == [True]
    target().generate(**inputs, **call, do_sample=True, max_new_tokens=8)
    assert specdec.last_stats(target()) is not None
    target().generate(**inputs, assistant_model=assistant, max_new_tokens=24)  # taken to be of the same tokenizer
    assert specdec.last_stats(target()).num_accepted_draft_tokens <= 4


def test_copies_and_pickles_leave_the_drafter_out(permuted_draft: Path) -> None:
    model = copy.deepcopy(target())
    enable_quietly(model, permuted_draft, num_draft_tokens=3)
    inputs = code(1)[0]
    want = model.generate(**inputs, max_new_tokens=12)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "_specdec_state" not in other.__dict__
        assert other.generate(**inputs, max_new_tokens=12).equal(want)


def test_texts_are_plain_with_processors_that_read_the_text(permuted_draft: Path) -> None:
    call = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "max_new_tokens": 32, "do_sample": False}
    inputs = code(1)[0]
    want = target().generate(**inputs, **call)
    enable_quietly(target(), permuted_draft, num_draft_tokens=4)
    assert target().generate(**inputs, **call).equal(want)
    assert specdec.last_stats(target()).num_accepted_draft_tokens > 0


def test_a_draft_model_whose_head_is_smaller_than_its_tokenizer_drafts_what_it_has() -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"vocab_size": VOCAB_SIZE - 20})
    drafter = OtherTokenizerDrafter(model, VOCAB_SIZE, shared_words())
    batch = prompts(3)
    sequences = Sequences(batch["input_ids"], batch["attention_mask"].sum(1), max_length=40, num_draft_tokens=K)
    for do_sample in (False, True):
        drafter.begin(sequences, Sampling(do_sample=do_sample))
        with torch.no_grad():
            proposed = drafter.propose(sequences, sequences.begin_step(K))
        assert (shared_words().draft_ids[proposed.ids] < VOCAB_SIZE - 20).all()
        assert (shared_words().draft_ids[proposed.ids] >= 0).all()


def test_the_words_are_encoded_as_the_tests_need_it() -> None:
    tokenizer, draft_tokenizer, _ = word_pair()
    assert tokenizer.tokenize("AaBbKa") == ["Aa", "Bb", "Ka"]
    assert draft_tokenizer.tokenize("AaBb") == ["Aa", "Bb"]
    assert draft_tokenizer.tokenize("AaAb") == ["A", "aA", "b"]
    assert draft_tokenizer.tokenize("AcKa") == ["Ac", "K", "a"]
    assert 0.6 < shared_words().coverage < 1
