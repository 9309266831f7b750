"""Provenance of a measurement: what is needed to compare and to reproduce it."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

SOURCE = Path(__file__)  # a file of specdec; the repository that it lies in is specdec's
CPU_FLAGS = (  # those for which specdec or torch has other kernels
    "avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def provenance(device: str) -> dict[str, str | int | bool | None]:
    """specdec's version and commit, command, versions, device, CPU, threads and date of this run.

    commit, dirty: of specdec's own files; None for an installed package and where git is missing. triton: None where it
    is not installed.
    """
    script = Path(sys.argv[0])
    is_relative_script = script.suffix == ".py" and not script.is_absolute()  # else a command, without its folder
    program = ["python", sys.argv[0]] if is_relative_script else [script.name]
    commit, dirty = source_commit(SOURCE)
    cpuinfo = Path("/proc/cpuinfo")
    cpu, cpu_flags = cpu_of(cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else "")
    return {
        "specdec": installed_version("specdec-lossless"),
        "commit": commit,
        "dirty": dirty,
        "command": shlex.join([*program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": installed_version("triton"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
        "cpu": cpu,
        "cpu_flags": cpu_flags,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def source_commit(file: Path) -> tuple[str | None, bool | None]:
    """The commit of the git repository that tracks a file, and whether its working tree has changes.

    (None, None) where no repository tracks it: an installed package may lie in the folder of another repository.
    """

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *command], capture_output=True, text=True, check=False
            )
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return None, None
    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))


def cpu_of(cpuinfo: str) -> tuple[str, str]:
    """The CPU's model, and those of CPU_FLAGS that it has, from the text of Linux's /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # of the first core
    flags = fields.get("flags", fields.get("Features", "")).split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, " ".join(flag for flag in CPU_FLAGS if flag in flags)


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_identity(path: str, hub_commit: str | None) -> str | None:
    """What a model's files are: one SHA-256 over the files of a local folder, the commit of a hub id."""
    if hashes := file_hashes(path):
        return f"sha256 {hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()}"
    return hub_commit and f"hub commit {hub_commit}"


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
