"""Provenance of a measurement: what is needed to compare and to reproduce it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(device: str) -> dict[str, str | int | bool]:
    """Commit, command, versions, device, threads and date of this run."""

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", *command], capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git
            return ""

    script = Path(sys.argv[0])
    is_relative_script = script.suffix == ".py" and not script.is_absolute()  # else a command, without its folder
    program = ["python", sys.argv[0]] if is_relative_script else [script.name]
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "command": " ".join([*program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def file_hashes(folder: str) -> dict[str, str]:
    """SHA-256 of each file of a model in a local folder, by name; empty for a hub id."""
    path = Path(folder)
    if not folder or not path.is_dir():
        return {}
    hashes = {}
    for file in sorted(path.iterdir()):
        if file.is_file():
            with file.open("rb") as content:
                hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def _cpu() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
