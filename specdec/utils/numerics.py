"""Numerical comparison of tensors."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error of logits: |got - want| / |want - mean(want)|, norms and mean over all elements.

    The mean of the reference is subtracted because softmax ignores a constant that is added to all logits: a large
    common offset would otherwise hide an error. Returns inf instead of NaN, so that the error fails every tolerance.
    Where both are -inf, as the logits of ids that a draft head lacks, they are equal.
    """
    if (is_excluded := want.isneginf()).any():
        if not got.isneginf().equal(is_excluded):
            return math.inf
        got, want = got[~is_excluded], want[~is_excluded]
    error = float((got - want).norm() / (want - want.mean()).norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
