"""Runs sections, writes the JSON after each, prints the tables."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import gpu_suite
from gpu_suite import correctness, kernel_tests, lossless, peers
from gpu_suite.messages import first_line, log
from gpu_suite.report import as_written, origin, show
from gpu_suite.suite import ROOT, Refused, Row, Section, Skipped, Suite, failed

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        kernel_tests.SECTION,
        correctness.SECTION,
        *correctness.KERNEL_SECTIONS,
        lossless.SECTION,
        peers.SECTION,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line names: 0, 1 where one failed or was refused, 2 without a CUDA device."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not args.dry:
        log(
            "torch sees no CUDA device here, and this script measures nothing else. Run it on a machine that has one,"
            " with a CUDA build of torch; or pass --dry, which runs every section on tiny shapes and keeps no figures"
        )
        return 2
    suite = Suite(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), args.dry)
    device = torch.cuda.get_device_name(suite.device) if suite.cuda else "cpu"
    output: Path = args.output or default_output(device, args.dry)
    report: Row = {"script": "gpu_suite", "device": device, "dry": args.dry, "sections": {}}
    if output.exists():  # the other sections of the same device are kept
        previous = json.loads(output.read_text(encoding="utf-8"))
        if any(previous.get(name) != report[name] for name in ("script", "device", "dry")):
            content = "a dry run" if previous.get("dry") else "figures"
            parser.error(f"{output} holds {content} of {previous.get('device')}; pass another --output")
        report = previous
    chosen = [name for name in SECTIONS if name in args.section]
    for name in chosen:
        report["sections"][name] = run_section(SECTIONS[name], suite)
        suite.empty_cache()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log(f"written: {output}")
    for name in chosen:
        show(name, report["sections"][name])
    return 1 if any(report["sections"][name]["status"] in ("failed", "refused") for name in chosen) else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "gpu_suite", description=gpu_suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(SECTIONS)
    parser.add_argument("--section", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    output_help = "benchmarks/results/gpu_suite-<device>.json; of a dry run, a temporary file"
    parser.add_argument("--output", type=Path, help=output_help)
    dry_help = "every section on tiny shapes, without a GPU too; no figures"
    parser.add_argument("--dry", action="store_true", help=dry_help)
    return parser


def default_output(device: str, dry: bool) -> Path:
    folder, ending = (Path(tempfile.gettempdir()), "-dry") if dry else (ROOT / "benchmarks" / "results", "")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"gpu_suite-{slug}{ending}.json"


def run_section(section: Section, suite: Suite) -> Row:
    """The record of one section; an error in it becomes the record's status and reason."""
    log(f"section {section.name}")
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "provenance": origin(suite), "status": "ok"}
    started = time.perf_counter()
    try:
        suite.require(section)
        record |= section.run(suite)
    except (Refused, Skipped) as error:
        record |= {"status": type(error).__name__.lower(), "reason": str(error)}
    except Exception as error:  # the other sections run all the same
        traceback.print_exc()
        record |= failed(f"{type(error).__name__}: {first_line(error)}")
    record["seconds"] = time.perf_counter() - started
    return as_written(record, suite.dry)
