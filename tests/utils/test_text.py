"""Pieces of text, one for each id."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from specdec.utils import embedded
from specdec.utils.text import pieces

TOKENIZER = AutoTokenizer.from_pretrained(embedded.TARGET)


@given(st.text(max_size=40))
@settings(deadline=None)
def test_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    got = pieces(TOKENIZER, ids)
    assert len(got) == len(ids)
    assert "".join(got) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["日本語 é", "x = '🙂'"])
def test_a_character_of_several_ids_belongs_to_the_last_one(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    got = pieces(TOKENIZER, ids)
    assert "" in got
    assert "\ufffd" not in "".join(got)


def test_pieces_join_to_a_text_that_ends_within_a_character() -> None:
    ids = TOKENIZER("a🙂").input_ids[:-1]
    assert "".join(pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)
