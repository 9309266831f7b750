"""CPU time of a step without its forwards: a target whose logits are prepared; the last line is one JSON object.

    OMP_NUM_THREADS=1 python scripts/bench_step.py --output benchmarks/results/bench_step.json

Everything else is what a call runs: drafter, window, verification, commit, statistics. With specdec's CPU operators and
with PyTorch's alone, in turn. Times are the least of all rounds, since other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from common.interleaved import interleave
from common.report import emit
from specdec_kernels import cpu
from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import speculate
from specdec.core.stats import StatsCounter
from specdec.core.steps import TargetOutput
from specdec.draft_length.constant import ConstantK
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.utils.provenance import provenance

PROMPT_WIDTH = 64
CONTEXT = 4096
WARM_UP_ROUNDS = 1


class PreparedTarget:
    """A target whose forward costs nothing: the same random logits [B, W, V] at every position of a row."""

    def __init__(self, batch_size: int, max_width: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        logits = torch.randn(batch_size, 1, vocab_size, generator=torch.Generator().manual_seed(0))
        self.outputs = [TargetOutput(logits.repeat(1, width, 1)) for width in range(max_width + 1)]

    def begin(self, batch_size: int, max_slots: int) -> None:
        pass

    def prefill(self, ids: Tensor, last: Tensor) -> None:
        pass

    def reserve(self, slots: int) -> None:
        pass

    def forward(self, ids: Tensor, positions: Tensor) -> TargetOutput:
        return self.outputs[ids.shape[1]]


def step_us(target: PreparedTarget, batch_size: int, k: int, do_sample: bool, num_steps: int) -> float:
    """Microseconds of CPU time a step, mean of num_steps steps of one call."""
    prompt = torch.zeros(batch_size, PROMPT_WIDTH, dtype=torch.int64)
    sequences = Sequences(
        prompt,
        torch.full((batch_size,), PROMPT_WIDTH),
        max_length=PROMPT_WIDTH + (num_steps + 1) * (k + 1),
        context=CONTEXT,
        num_draft_tokens=k,
        stop_ids=torch.tensor([target.vocab_size]),  # never generated
    )
    counter = StatsCounter(batch_size, k)
    drafter = PromptLookup() if k else NoDrafter()
    steps = speculate(target, drafter, sequences, Sampling(do_sample=do_sample), ConstantK(k))
    started = time.thread_time()
    for _, result in zip(range(num_steps), steps, strict=False):
        counter.add(result)
    return (time.thread_time() - started) / counter.num_forwards * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.build()
    results = []
    for do_sample, vocab_size, batch_size, k in product((False, True), (4096, 49152), (1, 8), (0, 3)):
        target = PreparedTarget(batch_size, k + 1, vocab_size)

        def measure(with_operators: bool) -> Callable[[int], float]:
            def run(_: int) -> float:
                operators = nullcontext() if with_operators else mock.patch.object(cpu, "_IS_LOADED", False)
                with operators, torch.no_grad():
                    return step_us(target, batch_size, k, do_sample, args.steps)  # noqa: B023  # called at once

            return run

        candidates = {"operators_us": measure(True), "pytorch_us": measure(False)}
        spent = interleave(candidates, args.rounds, warm_up=WARM_UP_ROUNDS)
        row = {"do_sample": do_sample, "vocab_size": vocab_size, "batch_size": batch_size, "k": k}
        results.append({**row, **{name: round(min(times), 1) for name, times in spent.items()}})
        print(results[-1], flush=True)
    report = {"script": "bench_step", "provenance": provenance("cpu"), "results": results}
    emit(report, args.output)


if __name__ == "__main__":
    main()
