"""A kernel is trusted on a device after a trial there, whatever a compiler, a driver or a new GPU makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_PASSED: dict[tuple[torch.device, str], bool] = {}


def passes(device: torch.device, kernel: str, trial: Callable[[], float]) -> bool:
    """Whether the named kernel passed its trial on a CUDA device; run once. Said where it did not, and it is not used then.

    trial: -> the relative error of a small launch; it may raise whatever compilers and drivers raise.
    """
    if device.type != "cuda":
        return True
    known = _PASSED.get((device, kernel))
    if known is None:
        if torch.cuda.is_current_stream_capturing():  # a graph can hold no trial; warming up before it runs one
            return True
        try:
            known = _PASSED[device, kernel] = _run(device, kernel, trial)
        except torch.OutOfMemoryError:  # says nothing of the kernel; the next time there may be room
            return False
    return known


def _run(device: torch.device, kernel: str, trial: Callable[[], float]) -> bool:
    try:
        with torch.cuda.device(device), torch.no_grad():
            error = trial()
        failure = "" if error < 1e-2 else f"its result was wrong by {error:.1e}"  # NaN is wrong
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if failure:
        name = torch.cuda.get_device_name(device)
        warnings.warn(
            f"specdec's kernel {kernel} is not used on {name}: {failure}; PyTorch's operators take its place, which is slower",
            stacklevel=3,
        )
    return not failure


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|, by the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
