"""Interpreted kernels stand for compiled ones: a matrix instruction computes a row the same way wherever it lies in its tile."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

with torch.device(
    "cpu"
):  # torch remembers its constructors on first use here: before a test puts another torch.empty in place
    torch.empty(0)


@pytest.fixture(autouse=True)
def rows_of_a_dot_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's matmul is a BLAS, which on some processors rounds a row by its place; in float64 that is gone before float32."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
