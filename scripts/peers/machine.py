"""The machine that a run is made on: how fast it reads memory, and how much of it other programs used meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "peers"
PROC = Path("/proc")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEBIBYTE = 1 << 20
SECONDS = 0.2  # of reading, in each run
RUNS = 3  # of which the fastest counts: a thread that another program holds up makes one meaningless


@dataclass(frozen=True)
class CpuTimes:
    """CPU time since boot in clock ticks, of all CPUs together.

    total: all. busy: not idle. own: of this process and all processes that it has started.
    """

    total: int
    busy: int
    own: int

    @classmethod
    def now(cls) -> CpuTimes | None:
        """None where the system does not say."""
        try:
            first = (PROC / "stat").read_text(encoding="utf-8").splitlines()[0]
        except OSError:
            return None
        ticks = [int(word) for word in first.split()[1:9]]  # user … steal; guests are part of user
        return cls(sum(ticks), sum(ticks) - ticks[3] - ticks[4], _ticks_of_tree(os.getpid()))

    def idle_otherwise(self, later: CpuTimes) -> float:
        """Share of the CPU time between the two that no other program used, 0 … 1."""
        others = later.busy - self.busy - (later.own - self.own)
        return min(1.0, 1 - others / max(1, later.total - self.total))


def _ticks_of_tree(root: int) -> int:
    """CPU time of a process, of the living ones below it, and of those that ended and were waited for."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(int(words[1]), []).append(int(folder.name))
            ticks[int(folder.name)] = sum(map(int, words[11:15]))
    found, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        found += ticks.get(process, 0)
        waiting += children.get(process, [])
    return found


def last_level_cache_bytes() -> int | None:
    """None where the system does not say."""
    sizes = [path.read_text(encoding="utf-8").strip() for path in CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=None)


class Bandwidth:
    """Gigabytes per second of reading a buffer again and again, by its size and the number of threads.

    A buffer that fits in a cache is read from there, as the weights of a model of that size are.
    """

    def __init__(self) -> None:
        source = HERE / "bandwidth.c"
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
        self.program = BUILD / f"bandwidth-{digest}"
        self._measured: dict[tuple[int, int], float] = {}
        if not self.program.exists():
            compiler = shutil.which("cc") or shutil.which("gcc")
            if compiler is None:
                raise RuntimeError("no C compiler: the memory's bandwidth is not measured")
            BUILD.mkdir(parents=True, exist_ok=True)
            command = [compiler, "-O3", "-march=native", "-fopenmp", str(source), "-o", str(self.program)]
            subprocess.run(command, check=True)

    @staticmethod
    def memory_bytes() -> int:
        """The size of a buffer that no cache holds."""
        return max(512 * MEBIBYTE, 3 * (last_level_cache_bytes() or 0))

    def gb_per_second(self, num_bytes: int, threads: int) -> float:
        key = min(num_bytes, self.memory_bytes()) >> 16, threads
        if key not in self._measured:
            command = [str(self.program), str(max(1, key[0]) << 16), str(threads), str(SECONDS)]
            environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
            runs = [
                subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                for _ in range(RUNS)
            ]
            self._measured[key] = max(float(run.stdout) for run in runs)
        return self._measured[key]


def bounds(results: Sequence[Mapping[str, Any]], gb_per_second: Callable[[int, int], float]) -> list[dict[str, Any]]:
    """For plain decoding of single rows: the rate at which the target's weights can be read, and the share reached.

    gb_per_second: of reading so many bytes again and again with so many threads.
    """
    rows = []
    for result in results:
        size = result["forward_bytes"]
        is_plain = (result["engine"], result["batch"], result["sampling"]) == ("plain", 1, "greedy")
        if not is_plain or size is None:
            continue
        bandwidth = gb_per_second(size, result["threads"])
        bound, reached = 1e9 * bandwidth / size, result["decode_tokens_per_second"]
        row = {name: result[name] for name in ("runtime", "threads", "weights", "forward_bytes")}
        row |= {"gb_per_second": bandwidth, "bound_tokens_per_second": round(bound, 1)}
        row |= {"share": None if reached is None else round(reached / bound, 3)}
        rows.append(row)
    return rows
