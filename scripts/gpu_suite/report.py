"""The report: provenance, figures as they are written to the JSON, tables as they are printed."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from gpu_suite.suite import ROOT, Row, Suite
from specdec.utils.provenance import provenance

# keys of measured values, which a dry run leaves out
FIGURE = re.compile(
    r"_us$|gbps$|^ratio|^fraction|^cost|^spread|^seconds$|^worst$|^met$|^launches|^at$|_ms$"
    r"|tokens_per_second|^cpu_ms_per_token$|^build_s$"
)


def as_written(value: Any, dry: bool, key: str = "") -> Any:
    """A value as the JSON holds it: floats with four digits, None for NaN, infinity and figures of a dry run."""
    if dry and FIGURE.search(key):
        return None
    if isinstance(value, dict):
        return {name: as_written(item, dry, name) for name, item in value.items()}
    if isinstance(value, list):
        return [as_written(item, dry) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def origin(suite: Suite) -> Row:
    """The provenance of figures. Without git, the digest of the sources replaces the commit."""
    found: Row = provenance(str(suite.device))
    files = [file for folder in ("kernels", "specdec", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))]
    found["sources_sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if suite.cuda:
        properties = torch.cuda.get_device_properties(suite.device)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": nvidia_smi(properties),
        }
    return found


def nvidia_smi(properties: Any) -> dict[str, str] | None:
    """Driver, clocks, power, temperature; None where they cannot be read."""
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    device = f"--id=GPU-{getattr(properties, 'uuid', '')}"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", device]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None
    return dict(zip(names.split(","), (part.strip() for part in line.split(",")), strict=False))


COLUMNS = {
    "checks": {"op": "op", "case": "case", "max_error": "error", "bound": "bound", "stable": "stable",
               "changes": "changes", "same_bits": "same bits", "ok": "right"},
    "w4a16": {"shape": "K->N", "rows": "M", "time_us": "us", "gbps": "GB/s", "fraction_of_copy": "of copy",
              "ratio_to_cublas": "x bf16", "ratio_to_torch_int4": "x int4", "ratio_to_dequantize": "x deq.",
              "cost_in_one_row": "T(M)/T(1)"},
    "w8a16": {"shape": "K->N", "rows": "M", "time_us": "us", "gbps": "GB/s", "fraction_of_copy": "of copy",
              "ratio_to_cublas": "x bf16", "ratio_to_torch_int8": "x int8", "ratio_to_dequantize": "x deq.",
              "cost_in_one_row": "T(M)/T(1)"},
    "other_forms": {"form": "form", "rows": "M", "time_us": "us", "gbps": "GB/s", "fraction_of_copy": "of copy",
                    "ratio_to_cublas": "x dense"},
    "attention": {"batch": "batch", "keys": "keys", "time_us": "us", "gbps": "GB/s", "bandwidth_us": "bytes, us",
                  "ratio_to_bandwidth": "ratio", "ratio_to_sdpa": "x sdpa", "ratio_to_sdpa_gqa": "x sdpa gqa"},
    "rejection": {"batch": "batch", "draft": "draft", "time_us": "us", "torch_us": "torch, us",
                  "ratio_to_torch": "x torch", "eager_us": "eager, us", "ratio_to_torch_eager": "x torch",
                  "launches": "launches",
                  "launches_torch": "torch's"},
    "lossless": {"batch": "batch", "drafter": "drafter", "texts": "texts", "identical": "identical",
                 "accepted": "accepted", "drafted": "drafted"},
    "peers": {"batch": "batch", "runtime": "runtime", "engine": "engine", "num_draft_tokens": "K",
              "tokens_per_second": "tok/s", "ratio_to_baseline": "x plain", "tokens_per_step": "tokens",
              "draft_ms": "draft", "target_ms": "target",
              "prompt_ms": "prompt", "identical_rows": "same"},
}  # fmt: skip
GOAL_STATES = {True: "met", False: "MISSED", None: "not measured"}


def format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def show_table(rows: Sequence[Row], columns: dict[str, str]) -> None:
    lines = [[*columns.values()], *([format_value(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [str.ljust if isinstance(rows[0].get(name), str) else str.rjust for name in columns]
    for line in lines:
        print("  ".join(align(text, width) for align, text, width in zip(aligned, line, widths, strict=True)).rstrip())


def show(name: str, record: Row) -> None:
    """Print a section's record: its status, tables, first difference, and goals."""
    print(f"\n{name}: {record['status']}{', ' + record['reason'] if 'reason' in record else ''}")
    if "counts" in record:
        print(", ".join(f"{number} {word}" for word, number in record["counts"].items()))
    if bandwidth := record.get("bandwidth"):
        copy, read = format_value(bandwidth["copy_gbps"]), format_value(bandwidth["read_gbps"])
        print(f"a copy moves {copy} GB/s, a sum reads {read} GB/s")
    for key, columns in (("checks", "checks"), ("results", name), ("other_forms", "other_forms")):
        if record.get(key):
            show_table(record[key], COLUMNS[columns])
    results = record.get("results", ())
    for reason in sorted({f"{k}: {v}" for row in results for k, v in row.items() if k.endswith("_absent")}):
        print(reason)
    for difference in [d for row in results for d in row.get("differences", ())][:1]:
        print("first difference: {prompt}, position {position}, margin {margin}".format(**difference))
    for one in record.get("goals", ()):
        worst = "" if one["worst"] is None else f" (worst {format_value(one['worst'])} at {one['at']})"
        print(f"{GOAL_STATES[one['met']]}: {one['goal']}{worst}")
