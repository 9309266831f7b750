"""The relative error of logits."""

from __future__ import annotations

import math

import pytest
import torch

from specdec.utils.numerics import relative_error


def test_the_error_is_relative_to_how_much_the_reference_varies() -> None:
    want = torch.tensor([[3.0, -3.0], [4.0, -4.0]])
    got = want + torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert relative_error(got, want) == pytest.approx(1 / math.sqrt(50))
    assert relative_error(got + 1000, want + 1000) == pytest.approx(1 / math.sqrt(50), rel=1e-3)
    assert relative_error(want, want) == 0
    excluded = want.clone()
    excluded[0, 1] = -torch.inf
    assert relative_error(excluded, excluded) == 0
    assert relative_error(want, excluded) == relative_error(excluded, want) == math.inf


def test_nan_is_an_infinite_error() -> None:
    want = torch.ones(2, 3)
    for got in (torch.full((2, 3), torch.nan), torch.tensor([[1.0, torch.nan, 1.0]])):
        assert relative_error(got, want) == math.inf
        assert relative_error(want, got) == math.inf


def test_a_constant_reference_gives_a_finite_error() -> None:
    assert relative_error(torch.ones(3), torch.ones(3)) == 0
    assert 1 < relative_error(torch.zeros(3), torch.ones(3)) < math.inf
