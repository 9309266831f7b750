"""Uninitialized memory that a test notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty return NaN, so that elements that were never written fail comparisons."""
    empty = torch.empty

    def full_of_nan(*size: int, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", full_of_nan)
