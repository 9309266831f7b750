"""Draft: without columns that no row uses."""

from __future__ import annotations

import pytest
import torch

from specdec.core.steps import Draft


@pytest.mark.parametrize(("lengths", "width"), [([0, 0], 0), ([2, 1], 2), ([4, 0], 4), ([9, -1], 4)])
@pytest.mark.parametrize("has_probs", [False, True])
def test_a_trimmed_draft_has_the_columns_of_its_longest_row(lengths: list[int], width: int, has_probs: bool) -> None:
    """Lengths that break the protocol stay as they are, for `within` to find."""
    ids = torch.arange(8).reshape(2, 4)
    probs = torch.rand(2, 4, 5) if has_probs else None
    trimmed = Draft(ids, probs, torch.tensor(lengths)).trimmed()
    assert torch.equal(trimmed.ids, ids[:, :width])
    assert trimmed.lengths.tolist() == lengths
    if probs is None:
        assert trimmed.probs is None
    else:
        assert trimmed.probs is not None
        assert torch.equal(trimmed.probs, probs[:, :width])


def test_a_draft_on_another_device_is_not_read() -> None:
    draft = Draft(torch.zeros(2, 4, device="meta"), None, torch.zeros(2, device="meta"))
    assert draft.trimmed() is draft
