"""Make interpreted kernels like compiled ones, whose matrix instructions compute a row the same way at any index."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

# On its first use torch.device caches torch's constructors: here, before a test replaces torch.empty.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def rows_of_a_dot_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounding of NumPy's matmul may depend on a row's index; in float64 that is lost on conversion to float32."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
