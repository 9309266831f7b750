"""A kernel's launch configuration: everything needed to compile the same kernel without a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

ARCHS = (80, 86, 89, 90, 100, 120)  # compute capabilities, times ten, that every configuration compiles for


@dataclass(frozen=True)
class Configuration:
    """One shipped variant of a kernel: dispatch launches what scripts/check_kernels.py compiles.

    name: unique in its op.
    kernel: the triton.jit function.
    signature: Triton type of every argument that is not a constant ("*fp16", "i32", …), by name.
    constants: value of every constexpr argument, by name.
    divisible: names of the arguments that dispatch guarantees to be multiples of 16 (addresses, sizes, strides).
    weights_per_pass: weights that one block reads in one iteration of its main loop; None: the kernel reads none.
    weight_bits: of a weight's code.
    adjacent_pairs: the kernel's inline asm is right only if a thread's registers have pairs of adjacent rows of K.
    tensor_cores, wide_loads: the compiled kernel must multiply on tensor cores; load 128 bits at a time.
    barriers: the largest number of them in the main loop.
    ordered: the kernel's blocks synchronize at a counter, so a barrier must separate their stores from the counter.
    """

    op: str
    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int = 4
    num_stages: int = 4
    weights_per_pass: int | None = None
    weight_bits: int = 4
    adjacent_pairs: bool = False
    tensor_cores: bool = True
    wide_loads: bool = True
    barriers: int = 5
    ordered: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options of both a launch and a compilation ahead of time."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can be launched on a device; elsewhere PyTorch's own operators are used."""
    return device.type == "cuda" and _can_launch() and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _can_launch() -> bool:
    if torch.version.hip is not None:  # the kernels are not tested on AMD
        return False
    missing = ""
    if find_spec("triton") is None:
        missing = "Triton is not installed (on Linux: pip install 'specdec-lossless[kernels]')"
    elif not any(map(shutil.which, (os.environ.get("CC", ""), "clang", "gcc"))):
        missing = "Triton compiles its launcher with gcc or clang, and neither is on the PATH (install one, or set CC)"
    if missing:
        warnings.warn(f"specdec's CUDA kernels are not used, which is slower: {missing}", stacklevel=2)
    return not missing


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 is set. If it was when the kernels were imported, they run in NumPy on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
