"""`specdec env`: versions, devices, kernels and what is missing, for a person and for bug reports."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from specdec_kernels import cpu

import specdec
from specdec.planning.devices import GIB
from specdec.utils.provenance import installed_version, provenance
from specdec_cli.options import Options

PACKAGES = ("torch", "transformers", "accelerate", "triton", "datasets", "hydra-core", "numpy", "jinja2", "matplotlib")
EXTRAS = {  # modules that an extra of the package brings, and what for
    "experiments": (
        ("accelerate", "datasets", "hydra", "jinja2", "matplotlib", "numpy", "scipy"),
        "bench, experiment, train-drafter and report",
    ),
    "kernels": (("triton",), "kernels on a GPU"),
}


@dataclass(frozen=True)
class Missing:
    """Something that is not there: what it is for, and the line that brings it."""

    what: str
    needed_for: str
    remedy: str


def run(options: Options) -> int:
    """Print what this installation is made of."""
    report = make_report()
    if options.json:
        print(json.dumps(report))
    else:
        show(report, Console(highlight=False))
    return 0


def make_report() -> dict[str, Any]:
    """What --json prints."""
    origin = provenance("cpu")
    return {
        "specdec": specdec.__version__,
        "commit": origin["commit"],
        "dirty": origin["dirty"],
        "installed_at": str(Path(specdec.__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cpu": {
            "model": origin["cpu"],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "flags": str(origin["cpu_flags"]).split(),
            "memory_gib": round(_memory_bytes() / GIB, 1) if _memory_bytes() else None,
        },
        "gpus": _gpus(),
        "cache_folder": _cache_folder(),
        "kernels": _kernels(),
        "missing": [asdict(missing) for missing in _missing()],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report as two tables."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    commit = f", commit {report['commit'][:12]}{' with changes' if report['dirty'] else ''}" if report["commit"] else ""
    table.add_row("specdec", f"{report['specdec']}{commit}")
    table.add_row("installed at", report["installed_at"])
    table.add_row("python", f"{report['python']} on {report['system']}")
    for name, found in report["packages"].items():
        table.add_row(name, found or "not installed")
    processor = report["cpu"]
    memory = f", {processor['memory_gib']} GiB of memory" if processor["memory_gib"] else ""
    table.add_row("CPU", f"{processor['model']}, {processor['cores']} cores, {processor['threads']} threads{memory}")
    table.add_row("", f"{processor['capability']}: {' '.join(processor['flags'])}")
    for number, gpu in enumerate(report["gpus"]):
        table.add_row(f"GPU {number}", gpu)
    if not report["gpus"]:
        table.add_row("GPU", "none that this PyTorch can use")
    table.add_row("cache folder", report["cache_folder"])
    for name, state in report["kernels"].items():
        table.add_row(name, state)
    console.print(table)
    if not report["missing"]:
        console.print("\nNothing is missing.")
        return
    console.print("\nMissing, and what brings it:")
    for missing in report["missing"]:
        line = f"  {missing['what']}, for {missing['needed_for']}: {missing['remedy']}"
        console.print(line, soft_wrap=True, markup=False)  # of an extra in square brackets


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _gpus() -> list[str]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / GIB:.0f} GiB"
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        found.append(f"{properties.name}, {memory}, compute capability {capability}, {build}")
    return found


def _cache_folder() -> str:
    try:
        folder = cpu.cache_folder()
    except OSError as error:
        return str(error)
    if not folder.exists():
        return f"{folder} (not created yet)"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    reason = cpu.untrusted(folder)
    return f"{folder}, {size / 2**20:,.0f} MiB" + (f"; not used: {reason}" if reason else "")


def _kernels() -> dict[str, str]:
    return {"CPU kernels": _cpu_kernels(), "GPU kernels": _gpu_kernels()}


def _cpu_kernels() -> str:
    try:
        if cpu.load():
            return "built"
    except (OSError, RuntimeError) as error:
        return f"not usable: {error}"
    compiler = cpu.find_compiler()
    if compiler is None:
        return "not built, and no C++ compiler is on the PATH"
    return f"not built; compile=True, or --compile, builds them with {compiler}"


def _gpu_kernels() -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "triton is installed; no GPU to compile for"
    return "compiled by triton at their first use"


def _missing() -> list[Missing]:
    found = []
    for extra, (modules, needed_for) in EXTRAS.items():
        absent = [module for module in modules if find_spec(module) is None]
        if absent and (extra != "kernels" or torch.cuda.is_available()):
            found.append(Missing(", ".join(absent), needed_for, f'pip install "specdec-lossless[{extra}]"'))
    if cpu.find_compiler() is None:
        found.append(
            Missing("a C++ compiler", "the CPU kernels and compile=True", "apt-get install g++, or set CXX to one")
        )
    return found
