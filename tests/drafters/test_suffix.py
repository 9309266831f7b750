"""Suffix decoding: the tree's proposals, what it keeps of finished texts, and texts that repeat each other."""

from __future__ import annotations

import copy
import json
import pickle
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel

import specdec
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.drafters.suffix import FinishedTexts, SuffixDecoding
from specdec.drafters.suffix_tree import NOTHING, Node, Proposal, SuffixTree, Text
from specdec.utils import embedded
from tests.generation.test_concurrency import in_threads
from tests.helpers.families import family, prompts

SCENARIOS = json.loads((Path(__file__).parents[1] / "data" / "suffix_proposals.json").read_text(encoding="utf-8"))
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=4)


def tree_of(texts: Sequence[Sequence[int]], depth: int) -> tuple[SuffixTree, list[Text]]:
    tree, appended = SuffixTree(depth), [Text() for _ in texts]
    for text, ids in zip(appended, texts, strict=True):
        for token in ids:
            tree.append(text, token)
    return tree, appended


def paths(node: Node, before: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    """The count of every path below a node, id by id; checks the order and the links of all children."""
    found = {}
    in_order = [node.first] if node.first else []
    while in_order and in_order[-1].next:
        in_order.append(in_order[-1].next)
    assert in_order == sorted(node.children.values(), key=lambda child: (-child.count, in_order.index(child)))
    assert [child.previous for child in in_order] == [None, *in_order[:-1]][: len(in_order)]
    assert node.last is (in_order[-1] if in_order else None)
    by_count = {count: [child for child in in_order if child.count == count] for count in {c.count for c in in_order}}
    assert node.ends == {count: [children[0], children[-1]] for count, children in by_count.items()}
    for token, child in node.children.items():
        ids = child.ids[child.start : child.start + child.length]
        assert child.parent is node
        assert (token, len(ids)) == (ids[0], child.length)
        assert node.parent is None or child.count < node.count  # else they would be one node
        for length in range(1, child.length + 1):
            found[before + tuple(ids[:length])] = child.count
        found |= paths(child, before + tuple(ids))
    return found


def occurrences(texts: Sequence[Sequence[int]], depth: int) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(ids[start:end])
        for ids in texts
        for start in range(len(ids))
        for end in range(start + 1, min(len(ids), start + depth) + 1)
    )


@pytest.mark.parametrize("number", range(len(SCENARIOS)))
def test_proposals_are_those_of_arctic_inference(number: int) -> None:
    scenario = SCENARIOS[number]
    tree, texts, num_compared = SuffixTree(scenario["depth"]), [], 0
    for event in scenario["events"]:
        if "append" in event:
            texts.append(Text())
            for token in event["append"]:
                tree.append(texts[-1], token)
        elif "remove" in event:
            tree.remove(texts[event["remove"]].ids)
        else:
            max_ids, factor, min_probability = event["limits"]
            got = tree.propose(event["context"], max_ids, factor, min_probability)
            assert (got.ids, float(got.score)) == (event["ids"], event["score"])
            num_compared += 1
    assert num_compared >= 8


@given(TEXTS, st.integers(2, 6))
@settings(deadline=None)
def test_counts_are_the_numbers_of_occurrences(texts: list[list[int]], depth: int) -> None:
    tree, _ = tree_of(texts, depth)
    assert paths(tree.root) == occurrences(texts, depth)


@given(TEXTS, st.integers(2, 6), st.integers(0, 4))
@settings(deadline=None)
def test_a_removed_text_leaves_nothing(texts: list[list[int]], depth: int, num_removed: int) -> None:
    tree, appended = tree_of(texts, depth)
    removed = appended[:num_removed]
    for text in removed:
        tree.remove(text.ids)
        text.ids.clear()  # no node refers to its ids
    assert paths(tree.root) == occurrences(texts[num_removed:], depth)


@given(TEXTS, st.integers(2, 6), st.integers(0, 5), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.1, 0.5]))
@settings(deadline=None)
def test_a_proposal_is_the_most_frequent_path_behind_the_last_ids(
    texts: list[list[int]], depth: int, max_ids: int, factor: float, min_probability: float
) -> None:
    tree, appended = tree_of(texts, depth)
    text = appended[-1]
    counts = occurrences(texts, depth)
    got = tree.propose(text.ids[-depth:], max_ids, factor, min_probability)
    own = tree.propose_for(text, max_ids, factor, min_probability)
    assert (got.ids, got.score) == (own.ids, own.score)
    scores = []
    for match in range(1, min(depth, len(text.ids))):
        path = tuple(text.ids[-match:])
        probability, score = 1.0, 0.0
        for token in got.ids:
            following = [counts[(*path, other)] for other in range(3)]
            if counts[(*path, token)] < max(1, *following):
                break
            probability *= counts[(*path, token)] / counts[path]
            score += probability
            path = (*path, token)
        else:
            if len(got.ids) <= min(max_ids, int(match * factor)) and (not got.ids or probability >= min_probability):
                scores.append(score)
    assert not got.ids or any(abs(score - got.score) < 1e-5 for score in scores)


def test_finished_texts_are_bounded() -> None:
    finished = FinishedTexts(depth=4, max_ids=10)
    for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 9]):
        finished.add(ids)
    assert finished.num_ids == 7  # without the first
    assert finished.propose([1, 2], 1, 1.0, 0.1).ids == [9]
    finished.add(list(range(20, 40)))
    assert finished.num_ids == 10  # the last ten of it alone
    assert finished.propose([31, 32], 1, 1.0, 0.1).ids == [33]
    assert finished.propose([5, 6], 1, 1.0, 0.1).ids == []
    nothing = FinishedTexts(depth=4, max_ids=0)
    nothing.add([1, 2, 3])
    assert nothing.num_ids == 0


@pytest.fixture(params=["tensors", "operator"])
def either_tree(request: pytest.FixtureRequest) -> None:
    """Run the test with the trees of Python, and with the CPU kernels' own."""
    if request.param == "operator":
        request.getfixturevalue("cpu_kernels")


@given(st.lists(TEXTS, min_size=1, max_size=3), st.integers(2, 6), st.sampled_from([0.5, 1.0, 3.0]), st.randoms())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernels_propose_the_same(
    cpu_kernels: None, calls: list[list[list[int]]], depth: int, factor: float, rng: random.Random
) -> None:
    """Over calls whose texts grow step by step, are kept at their end, and dropped where there are too many ids."""
    finished = FinishedTexts(depth, max_ids=20)
    for texts in calls:
        width = max(map(len, texts))
        ids = torch.tensor([text + [7] * (width - len(text)) for text in texts])
        trees, grown = [SuffixTree(depth) for _ in texts], [Text() for _ in texts]
        rows = torch.ops.specdec.suffix_rows(ids, len(texts), depth)
        for _ in range(3):
            lengths = [rng.randint(max(1, len(one.ids)), len(text)) for one, text in zip(grown, texts, strict=True)]
            limits = [rng.randint(0, 4) for _ in texts]
            got, counts, scores = torch.ops.specdec.suffix_propose(
                rows, finished.kernel_tree, ids, torch.tensor(lengths), torch.tensor(limits), factor, 0.1
            )
            want = []
            for tree, one, text, length, limit in zip(trees, grown, texts, lengths, limits, strict=True):
                for token in text[len(one.ids) : length]:
                    tree.append(one, token)
                own = tree.propose_for(one, limit, factor, 0.1)
                others = finished.propose(one.ids[-depth:], limit, factor, 0.1)
                want.append(own if own.score >= others.score else others)
            rows_found = zip(got.tolist(), counts.tolist(), scores.tolist(), strict=True)
            found = [Proposal(row[:count], score) for row, count, score in rows_found]
            assert found == [one if limit else NOTHING for one, limit in zip(want, limits, strict=True)]
        for text in texts:
            finished.add(text)


def test_an_id_of_a_text_takes_half_a_kilobyte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET)
    texts = [tokenizer(prompt["prompt"]).input_ids for prompt in embedded.prompts()[:40]]
    tracemalloc.start()
    try:
        tree, _ = tree_of(texts, depth=24)
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree.root.count == sum(map(len, texts))
    assert 300 < num_bytes / tree.root.count < 600


def propose(drafter: SuffixDecoding, texts: list[list[int]], num_draft_tokens: int = 3) -> list[list[int]]:
    width = max(map(len, texts))
    prompt = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    sequences = Sequences(
        prompt,
        torch.tensor([len(text) for text in texts]),
        max_length=width + 9,
        num_draft_tokens=num_draft_tokens,
    )
    drafter.begin(sequences, Sampling())
    draft = drafter.propose(sequences, sequences.begin_step(num_draft_tokens))
    assert draft.probs is None
    return [row[:length].tolist() for row, length in zip(draft.ids, draft.lengths.tolist(), strict=True)]


@pytest.mark.usefixtures("either_tree")
def test_each_row_gets_the_better_proposal_of_its_text_and_the_finished_ones() -> None:
    drafter = SuffixDecoding(factor=2.0)
    assert propose(drafter, [[1, 2, 3, 1, 2], [3, 4, 5], [7]]) == [[3, 1, 2], [], []]
    for _ in range(3):
        drafter.finished_texts.add([4, 5, 6, 7, 8])
    drafter.finished_texts.add([1, 2, 9])
    # both know what may follow 1, 2; the first row's own text goes on for longer
    assert propose(drafter, [[1, 2, 3, 1, 2], [3, 4, 5], [7]]) == [[3, 1, 2], [6, 7, 8], []]
    assert propose(drafter.spare(), [[3, 4, 5]]) == [[6, 7, 8]]  # the same finished texts


@pytest.mark.parametrize(
    "arguments",
    [{"depth": 1}, {"factor": 0}, {"min_probability": 1.5}, {"max_ids": -1}],
    ids=lambda one: next(iter(one)),
)
def test_settings_out_of_range_are_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))} "):
        SuffixDecoding(**arguments)


@pytest.fixture
def model() -> PreTrainedModel:
    return family("llama")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_second_answer_to_the_same_prompt_is_drafted_from_the_first(
    model: PreTrainedModel, batch_size: int, either_way: None, either_tree: None
) -> None:
    call = prompts(batch_size) | {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**call)
    drafter = SuffixDecoding(factor=4.0)
    specdec.enable(model, drafter, num_draft_tokens=5)
    try:
        first, first_stats = model.generate(**call), specdec.last_stats(model)
        second, second_stats = model.generate(**call), specdec.last_stats(model)
    finally:
        specdec.disable(model)
    assert first.equal(plain)
    assert second.equal(plain)
    assert first_stats is not None
    assert second_stats is not None
    assert second_stats.num_target_forwards < first_stats.num_target_forwards
    assert drafter.finished_texts.num_ids == 2 * 24 * batch_size
    assert all(row.text.ids == [] and row.tree.root.first is None for row in drafter.rows)  # the trees are freed


def test_trees_hold_what_was_finished_before_they_were_made(cpu_kernels: None) -> None:
    """A library that is built between two calls."""
    drafter = SuffixDecoding(factor=2.0)
    drafter.finished_texts.add([4, 5, 6, 7, 8])
    assert propose(drafter, [[3, 4, 5]]) == [[6, 7, 8]]
    assert drafter.finished_texts.propose([3, 4, 5], 3, 2.0, 0.1).ids == [6, 7, 8]


def test_a_copy_has_the_settings_and_no_texts() -> None:
    drafter = SuffixDecoding(8, 2.0, 0.2, 50)
    drafter.finished_texts.add([1, 2, 3])
    for other in (copy.deepcopy(drafter), pickle.loads(pickle.dumps(drafter))):
        assert (other.depth, other.factor, other.min_probability) == (8, 2.0, 0.2)
        assert (other.finished_texts.max_ids, other.finished_texts.num_ids) == (50, 0)


def test_calls_at_the_same_time_share_finished_texts(model: PreTrainedModel) -> None:
    call = prompts(1) | {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**call)
    drafter = SuffixDecoding()
    specdec.enable(model, drafter, num_draft_tokens=3)
    try:
        texts = in_threads(*[lambda: model.generate(**call)] * 4)
        assert specdec.last_stats(model) is not None
    finally:
        specdec.disable(model)
    assert all(text.equal(plain) for text in texts)
    assert drafter.finished_texts.num_ids == 4 * 12


def test_scores_are_in_single_precision() -> None:
    """As the reference's, whose order of proposals that are nearly as good is by them."""
    tree, (text,) = tree_of([[1, 2, 1, 3, 1, 4, 1]], 4)
    assert tree.propose_for(text, 1, 4.0, 0.0).score == 0.25
    tree, (text,) = tree_of([[1, 2, 1, 3, 1]], 4)
    assert tree.propose_for(text, 1, 4.0, 0.0).score == float(torch.tensor(1 / 3, dtype=torch.float32))
