"""Prompt lookup equals a plain search of the text."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.drafters.prompt_lookup import PromptLookup

K = 4


@pytest.fixture(params=["tensors", "operator"], autouse=True)
def _either_search(request: pytest.FixtureRequest) -> None:
    """Run the test with the search by PyTorch's operators, and with the CPU kernels' own."""
    if request.param == "operator":
        request.getfixturevalue("cpu_kernels")


def reference_lookup(text: list[int], max_ngram: int, limit: int) -> list[int]:
    """What followed the most recent earlier occurrence of the longest n-gram that ends the text."""
    for n in range(min(max_ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + limit]
    return []


def assert_lookup_equals_the_reference(texts: list[list[int]], max_ngram: int, num_draft_tokens: int = K) -> None:
    width = max(map(len, texts))
    prompt = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    sequences = Sequences(prompt, torch.tensor([len(text) for text in texts]), max_length=width + 3, num_draft_tokens=K)
    sequences.stage(
        torch.ones(len(texts), K + 1, dtype=torch.int64)
    )  # stale ids after the text, which it must not read
    limit = sequences.begin_step(num_draft_tokens)
    drafter = PromptLookup(max_ngram)
    drafter.begin(sequences, Sampling())
    draft = drafter.propose(sequences, limit)
    assert draft.probs is None
    got = [draft.ids[row, :length].tolist() for row, length in enumerate(draft.lengths.tolist())]
    assert got == [reference_lookup(text, max_ngram, int(limit[row])) for row, text in enumerate(texts)]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, K),
)
@settings(deadline=None)
def test_prompt_lookup_proposes_what_followed_the_most_recent_longest_ngram(
    texts: list[list[int]], n: int, k: int
) -> None:
    assert_lookup_equals_the_reference(texts, max_ngram=n, num_draft_tokens=k)


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 9])
def test_prompt_lookup_is_right_on_every_short_text_of_two_ids(max_ngram: int) -> None:
    assert_lookup_equals_the_reference(
        [list(ids) for n in range(1, 8) for ids in product(range(2), repeat=n)], max_ngram
    )


def test_prompt_lookup_needs_an_ngram_of_one_or_more() -> None:
    with pytest.raises(ValueError, match="max_ngram=0 must be at least 1"):
        PromptLookup(0)
