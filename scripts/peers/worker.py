"""Engines in other processes: a line of JSON in, a line of JSON out.

Every peer's worker answers the same messages: "load" a pipeline by name once, then "generate" with it. What they hold
is at the head of llamacpp/worker.cpp. A figure that a peer does not report is null.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.engines import CallResult, StepMeans, Task


class PeerFailed(Exception):
    """A peer could not be set up, or is set up and does not work; either ends the run."""


class Worker:
    """A peer's process. An error there raises PeerFailed here. log: a file for what it prints."""

    def __init__(self, runtime: str, command: Sequence[str], log: Path) -> None:
        self.runtime, self.log = runtime, log
        log.parent.mkdir(parents=True, exist_ok=True)
        # Each engine sets its own number of threads.
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        pipe = subprocess.PIPE
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=environment | {"HF_HUB_OFFLINE": "1"}
            )

    def request(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise PeerFailed(f"{self.runtime}'s process ended with {self.process.wait()}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.runtime} failed: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass
class RemoteEngine:
    """A pipeline in a worker process: the target alone, with a draft model, or with n-gram lookup (lookup=True).

    weights: names the format of the target's weights. ngram: ids that a lookup matches, None where the peer has no
    such setting. options: what else the peer's "load" takes.
    """

    worker: Worker
    name: str
    weights: str
    target: Path
    threads: int
    draft: Path | None = None
    lookup: bool = False
    num_draft_tokens: int | None = None
    ngram: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runtime = self.worker.runtime
        draft = None if self.draft is None else str(self.draft)
        load = {"target": str(self.target), "draft": draft, "lookup": self.lookup, "threads": self.threads}
        load |= self.options
        self.pipeline = json.dumps(load)  # one serves every K
        self.forward_bytes: int | None = self.worker.request(op="load", name=self.pipeline, **load)["bytes"]

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def warm_up(self, task: Task) -> None:
        pass

    def _generate(self, task: Task, new_tokens: int) -> dict[str, Any]:
        settings = {"prompts": task.prompts, "new_tokens": new_tokens, "sampled": task.sampled, "seed": task.seed}
        settings |= {"k": self.num_draft_tokens, "ngram": self.ngram}
        return self.worker.request(op="generate", name=self.pipeline, **settings)

    def generate(self, task: Task) -> CallResult:
        answer = self._generate(task, task.new_tokens)
        return CallResult(answer["ids"], answer["seconds"], answer["cpu_seconds"])  # of the call, without the pipe

    def time_steps(self, task: Task) -> StepMeans:
        """A worker reports sums over a call, so those of a call of one token, which is the prompt, are subtracted."""
        whole, prompt = self._generate(task, task.new_tokens), self._generate(task, 1)
        count = whole["steps"] - prompt["steps"]

        def mean_ms(name: str) -> float | None:
            return None if whole[name] is None else 1000 * (whole[name] - prompt[name]) / count

        draft_ms, target_ms, all_ms = mean_ms("draft_s"), mean_ms("target_s"), mean_ms("seconds")
        assert all_ms is not None
        return StepMeans(
            None if whole["accepted"] is None else task.num_tokens / (task.num_tokens - whole["accepted"]),
            1000 * prompt["seconds"],
            draft_ms,
            target_ms,
            None,
            all_ms - (draft_ms or 0) - (target_ms or 0),
        )
