"""A trial of each kernel on each device before its first use: a compiler, driver or GPU may compute it wrongly."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

_PASSED: dict[tuple[torch.device, str], bool] = {}


def passes(device: torch.device, kernel: str, trial: Callable[[], float]) -> bool:
    """Whether the named kernel passed its trial on a CUDA device. The trial runs once; a failure gives a warning.

    trial: -> the relative error of a small launch; any exception is a failure, except that memory runs out.
    """
    if device.type != "cuda":
        return True
    has_passed = _PASSED.get((device, kernel))
    if has_passed is None:
        # A trial cannot run in a graph; the warm-up before the capture runs it.
        if torch.cuda.is_current_stream_capturing():
            return True
        try:
            has_passed = _PASSED[device, kernel] = _run(device, kernel, trial)
        except torch.OutOfMemoryError:  # not the kernel's fault; tried again at the next use
            return False
    return has_passed


def _run(device: torch.device, kernel: str, trial: Callable[[], float]) -> bool:
    try:
        with torch.cuda.device(device), torch.no_grad():
            error = trial()
        failure = "" if error < 1e-2 else f"its result has a relative error of {error:.1e}"  # NaN fails
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
    if failure:
        name = torch.cuda.get_device_name(device)
        warnings.warn(
            f"specdec's kernel {kernel} is not used on {name}: {failure}; PyTorch's operators are used"
            " instead, which is slower",
            stacklevel=3,
        )
    return not failure


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|, by the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
