"""Checks of a kernel's results against a reference, on inputs and in memory that change with each repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_suite.messages import log
from gpu_suite.suite import Row, Suite

MAX_ERROR_RATIO = 4  # between repetitions; a larger one means that an error depends on what memory held before


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty returns NaN, or 77 for integers, so that a result that was never written does not pass."""
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    with mock.patch.object(torch, "empty", filled):
        yield


def max_relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest |result - expected| / (|expected| + rms(expected)); NaN where anything is."""
    scale = expected.abs() + expected.square().mean().sqrt()
    return ((result.double() - expected).abs() / scale).max().item()


def share_of_differences(result: Tensor, expected: Tensor) -> float:
    return (result != expected).double().mean().item()


def check_case(
    suite: Suite,
    op: str,
    case: str,
    make_inputs: Callable[[], tuple],
    call: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    same_bits: Callable[..., bool],
    error: Callable[[Tensor, Tensor], float],
    bound: float,
) -> Row:
    """Compare call(*inputs) with reference(*inputs) on new inputs in new memory; then same_bits(result, *inputs).

    Errors must stay under the bound and of one size, and every result must differ from the one before: a kernel that
    leaves an old result in place, or reads what another launch left, is right once at most.
    """
    errors, runs, changes = [], [], True
    for seed in range(suite.sizes.repetitions):
        torch.manual_seed(seed)
        inputs = make_inputs()
        with poisoned_empty():
            result = call(*inputs)
        errors.append(error(result, reference(*inputs)))
        changes &= not runs or not result.equal(runs[-1][0])
        runs.append((result, inputs))  # kept alive, so that the next ones are allocated elsewhere
    row = {"op": op, "case": case, "max_error": max(errors), "bound": bound, "changes": changes}
    row["bounded"] = all(e <= bound for e in errors)  # False for NaN
    row["stable"] = max(errors) <= MAX_ERROR_RATIO * min(errors)
    result, inputs = runs[-1]
    with poisoned_empty():
        row["same_bits"] = same_bits(result, *inputs)
    row["ok"] = all(row[name] for name in ("bounded", "stable", "changes", "same_bits"))
    log(f"  {case}: {'right' if row['ok'] else f'WRONG, {row}'}")
    return row
