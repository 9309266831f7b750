"""One run of the suite: the device, the sizes, the checks made so far; and what a section is."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import widen_pair
from specdec_kernels import trial

from gpu_suite.messages import first_line, log
from gpu_suite.timing import MIN_CALLS, CallTimer

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class WeightFormat:
    """How a 4-bit weight is stored, and the dtype of the activations that it is multiplied by."""

    name: str
    group_size: int = 128
    asymmetric: bool = False
    e2m1: bool = False
    dtype: torch.dtype = torch.bfloat16


MAIN_FORMAT = WeightFormat("symmetric, 128")


@dataclass(frozen=True)
class Sizes:
    """What is run: the matmuls of Llama-3-8B as (K, N), its attention, its vocabulary; heads of models as (K, N)."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
    other_shape: tuple[int, int] = (4096, 28672)  # of the other formats, at 6 rows
    head_shapes: tuple[tuple[int, int], ...] = ((576, 49152), (1536, 151936), (4096, 128256))
    rows: tuple[int, ...] = (1, 2, 4, 6, 8, 16, 32, 64)
    checked_rows: tuple[int, ...] = tuple(range(1, 65))
    width: int = 6
    heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, their width
    keys: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    goal_keys: int = 8192
    attention_batches: tuple[int, ...] = (1, 16)
    vocab_size: int = 128256
    num_draft_tokens: int = 5
    rejection_batches: tuple[int, ...] = (1, 8, 32)
    copy_bytes: int = 1 << 30
    prompts: int = 24
    new_tokens: int = 64
    rounds: int = 15
    repetitions: int = 4
    target_shape: widen_pair.Shape = widen_pair.SHAPES["8b"]
    draft_shapes: tuple[tuple[str, widen_pair.Shape], ...] = tuple(
        (name, widen_pair.SHAPES[name]) for name in ("1b", "100m")
    )
    peer_batches: tuple[int, ...] = (1, 4, 16)
    peer_draft_lengths: tuple[int, ...] = (1, 3, 5)  # K
    peer_rounds: int = 3


DRY_SIZES = Sizes(
    shapes=((256, 128), (128, 384)), other_shape=(128, 256), head_shapes=((144, 75), (256, 130)), rows=(1, 16),
    checked_rows=(1, 17), width=3,
    heads=(4, 2, 16), keys=(70, 300), goal_keys=300, attention_batches=(1, 2), vocab_size=5000,
    rejection_batches=(1, 3), copy_bytes=1 << 16, prompts=2, new_tokens=6, rounds=1, repetitions=2,
    target_shape=widen_pair.Shape(384, 512, 12, 4, 1, 64, 4200, False), peer_batches=(1, 2),
    peer_draft_lengths=(2,),
    draft_shapes=(("small", widen_pair.Shape(384, 512, 2, 4, 1, 64, 4200, True)),), peer_rounds=1,
)  # fmt: skip


class Refused(Exception):
    """A section is not run because the kernel that it times is wrong."""


class Skipped(Exception):
    """A section cannot run on this machine."""


@dataclass(frozen=True)
class Section:
    """A part of the suite, which runs alone.

    run: measures; the record of the section, with `failed(reason)` merged in where a check of its own fails.
    check: compares the kernel that `run` times with a reference, one row a case; where a case fails, `run` is not
    called.
    packages: that must be installed; where one is missing, the section is skipped.
    """

    name: str
    run: Callable[[Suite], Row]
    check: Callable[[Suite], list[Row]] | None = None
    packages: tuple[str, ...] = ()


@dataclass
class Suite:
    """One run on one device. dry: tiny shapes, no figures."""

    device: torch.device
    dry: bool
    checks: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.sizes = DRY_SIZES if self.dry else Sizes()
        self.timer = CallTimer(self.cuda, self.sizes.rounds, 1 if self.dry else MIN_CALLS)
        self.dtype = self.supported(MAIN_FORMAT).dtype

    def supported(self, weight_format: WeightFormat) -> WeightFormat:
        """The format itself; in float16 under triton's interpreter, which computes bfloat16 wrongly."""
        return weight_format if self.cuda or weight_format.e2m1 else replace(weight_format, dtype=torch.float16)

    def num_copies(self, num_bytes: int) -> int:
        """The number of buffers of a size to cycle through: over three times the L2, so that none is cached."""
        if self.dry:
            return 2
        return max(2, 1 - (-3 * torch.cuda.get_device_properties(self.device).L2_cache_size // num_bytes))

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """Measured: GB/s of a copy, bytes read and written counted, and of a sum, which only reads."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 30
        source = torch.ones(min(self.sizes.copy_bytes, free // 8) // 4, device=self.device)
        target = torch.empty_like(source)
        times = self.timer.measure({"copy": [lambda: target.copy_(source)], "read": [source.sum]})
        return {
            "copy_gbps": 2 * source.nbytes / times["copy"].us / 1e3,
            "read_gbps": source.nbytes / times["read"].us / 1e3,
        }

    def check(self, section: Section) -> list[Row]:
        """The checks of a section's kernel, run once."""
        op = section.name
        assert section.check is not None
        if op not in self.checks:
            log(f"checking {op}")
            try:
                with torch.inference_mode():
                    self.checks[op] = section.check(self)
            except Exception as error:  # the other kernels are checked all the same
                traceback.print_exc()
                self.checks[op] = [{"op": op, "case": f"{type(error).__name__}: {first_line(error)}", "ok": False}]
            # a kernel that fails its trial is replaced by PyTorch operators, which are right and not what is measured
            # here
            unused = [name for (_, name), passed in trial._PASSED.items() if name.startswith(op) and not passed]
            self.checks[op] += [
                {"op": op, "case": f"{name} is not used on this device", "ok": False} for name in unused
            ]
            self.empty_cache()
        return self.checks[op]

    def require(self, section: Section) -> None:
        """Raise where a section cannot run (Skipped) or would time a kernel whose results are wrong (Refused)."""
        for package in section.packages:
            if find_spec(package) is None:
                raise Skipped(f"{package} is not installed, so the section {section.name} was not run")
        wrong = [row["case"] for row in self.check(section) if not row["ok"]] if section.check else []
        if wrong:
            raise Refused(
                f"{section.name} gives wrong results ({len(wrong)} cases, the first: {wrong[0]}), so it is not timed"
            )

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        if self.cuda:
            with suppress(
                RuntimeError
            ):  # after an illegal access every call fails, and the report must still be written
                torch.cuda.empty_cache()


def failed(reason: str) -> Row:
    """What a section merges into its record where a check of its own fails."""
    return {"status": "failed", "reason": reason}
