"""OpenVINO GenAI as an engine: its own virtual environment, models exported to 4 bits, a worker process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.engines import CallResult, StepMeans, Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
PYTHON = ENVIRONMENT / "bin" / "python"
EXPORTS = ROOT / "build" / "peers"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GROUP_SIZE = 64
NOT_SET_UP = (
    "OpenVINO GenAI is left out: it is not set up; `python scripts/bench_peers.py --setup-peers` does that (2 GB)"
)
OnProgress = Callable[[str], None]


class PeerFailed(Exception):
    """The peer is set up but does not work, so the run ends."""


def setup(on_progress: OnProgress) -> None:
    """Make the virtual environment; where that fails, nothing of it is left."""
    on_progress(f"making {ENVIRONMENT.name} (some 2 GB, a few minutes)")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        (torch,) = [line for line in lines if line.startswith("torch=")]
        # torch first, from the index of CPU builds: no later package then installs one with CUDA
        subprocess.run([*pip, "install", "--retries", "1", "--extra-index-url", TORCH_INDEX, torch], check=True)
        subprocess.run([*pip, "install", "--requirement", str(HERE / "requirements.txt")], check=True)
        # optimum-intel requires it, text models do not, and its usual build does not work with the CPU build of torch
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        subprocess.run([str(PYTHON), "-c", "import openvino_genai, openvino_tokenizers, optimum.intel"], check=True)
    except BaseException as error:
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        if isinstance(error, subprocess.CalledProcessError):
            raise PeerFailed(f"{ENVIRONMENT.name} could not be made, and nothing of it is left: {error}") from error
        raise
    on_progress(f"{ENVIRONMENT.name} is ready")


def is_set_up() -> bool:
    return PYTHON.exists()


def versions() -> dict[str, str]:
    names = ("openvino-genai", "optimum-intel", "nncf", "transformers")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def export(model: Path, on_progress: OnProgress) -> Path:
    """Export a model to OpenVINO's format, its linear layers in 4 bits; cached by the content of its folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.read_bytes())
    folder = EXPORTS / f"{digest.hexdigest()[:16]}-int4"
    if folder.exists():
        return folder
    on_progress(f"exporting {model} for OpenVINO, once")
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    EXPORTS.mkdir(parents=True, exist_ok=True)
    weights = ["--weight-format", "int4", "--group-size", str(GROUP_SIZE), "--ratio", "1.0"]
    program = [str(PYTHON.with_name("optimum-cli")), "export", "openvino"]
    command = [*program, "--model", str(model), "--task", "text-generation-with-past", *weights, str(partial)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise PeerFailed(f"OpenVINO's export of {model} failed:\n{done.stderr.strip()[-2000:]}")
    partial.rename(folder)
    return folder


class Worker:
    """The worker process. An error there raises PeerFailed here."""

    def __init__(self) -> None:
        EXPORTS.mkdir(parents=True, exist_ok=True)
        self.log = EXPORTS / "worker.log"
        command, pipe = [str(PYTHON), str(HERE / "openvino_worker.py")], subprocess.PIPE
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)

    def request(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise PeerFailed(f"OpenVINO's process ended with {self.process.wait()}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"OpenVINO failed: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass
class OpenVino:
    """A pipeline in the worker process: the target alone, or with a draft model and K."""

    worker: Worker
    target: Path
    threads: int
    draft: Path | None = None
    num_draft_tokens: int | None = None
    runtime: str = "OpenVINO"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = "plain" if self.draft is None else "draft model"
        self.pipeline = f"{self.draft}, {self.threads} threads"  # one serves every K
        draft = None if self.draft is None else str(self.draft)
        self.worker.request(op="load", name=self.pipeline, target=str(self.target), draft=draft, threads=self.threads)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def warm_up(self, task: Task) -> None:
        pass

    def _generate(self, task: Task, new_tokens: int) -> dict[str, Any]:
        settings = {"prompts": task.prompts, "new_tokens": new_tokens, "sampled": task.sampled, "seed": task.seed}
        return self.worker.request(op="generate", name=self.pipeline, k=self.num_draft_tokens, **settings)

    def generate(self, task: Task) -> CallResult:
        answer = self._generate(task, task.new_tokens)
        return CallResult(answer["ids"], answer["seconds"])  # of the call alone, without the pipe

    def time_steps(self, task: Task) -> StepMeans:
        """Its metrics are sums over a call, so those of a call of one token, which is the prompt, are subtracted."""
        whole, prompt = self._generate(task, task.new_tokens), self._generate(task, 1)
        count = whole["steps"] - prompt["steps"]
        draft_ms, target_ms, all_ms = (
            1000 * (whole[n] - prompt[n]) / count for n in ("draft_s", "target_s", "seconds")
        )
        row_steps = task.num_tokens - whole["accepted"]
        return StepMeans(
            task.num_tokens / row_steps,
            1000 * prompt["seconds"],
            draft_ms,
            target_ms,
            None,
            all_ms - draft_ms - target_ms,
        )
