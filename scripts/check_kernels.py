"""Compile the shipped kernel configurations without a GPU and check what decides their speed and correctness.

    python scripts/check_kernels.py                        # one configuration of each op, every architecture
    python scripts/check_kernels.py --all --triton A B     # all of them, with the Triton versions in folders A and B
    python scripts/check_kernels.py --op w4a16 --arch 90

Each must have no spilled register, tensor-core instructions, 128-bit loads of all weights, at most 3.3 instructions a
4-bit weight (8 bits: 6.6) and 5 barriers (attention: 6) in the main loop, no more shared memory than the architecture
has, the layout that the inline asm requires, and a barrier between a block's stores and its counter.
Prints a table and one JSON line last; the exit code is 1 if any check fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec_kernels.configuration import ARCHS

ROOT = Path(__file__).parent.parent
OPS = ("w4a16", "w8a16", "rejection", "attention")
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
INSTRUCTIONS_A_BYTE = 6.6  # of weights
WARP = 32
# The layout in which a thread's registers have pairs of adjacent rows of K.
ADJACENT_PAIRS = r"#ttg\.dot_op<\{opIdx = 1, parent = #\w+, kWidth = 2\}>"


@dataclass
class Checked:
    """The result for one configuration, architecture and Triton. The loop is the longest one that branches backward."""

    op: str
    configuration: str
    arch: int
    triton: str
    registers: int = 0
    shared_bytes: int = 0
    spills: int = 0
    loop_instructions: int = 0
    instructions_per_weight: float | None = None
    barriers: int = 0
    wide_loads: int = 0
    tensor_core: str = ""
    failures: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every configuration, not only the first of each op")
    parser.add_argument(
        "--op", nargs="+", default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}, or another module"
    )
    parser.add_argument(
        "--arch", nargs="+", type=int, default=list(ARCHS), choices=ARCHS, metavar="N", help="90 for sm_90, …"
    )
    parser.add_argument("--triton", nargs="+", type=Path, metavar="PATH", help="folders with installed Triton versions")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        check_all(args)
        return 0
    results: list[Checked] = []
    for path in args.triton or [None]:
        if path is not None and not (path / "triton" / "__init__.py").exists():
            parser.error(
                f"no triton under {path}; install one there: pip install --target {path} --no-deps triton==3.6.0"
            )
        results += run_child(path)
    for result in results:
        result.failures += other_family(result, results)
    show(results)
    failed = [result for result in results if result.failures]
    report = {"script": "check_kernels", "provenance": origin(), "checked": len(results), "failed": len(failed)}
    report["results"] = [asdict(result) for result in results]
    text = json.dumps(report)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text.replace('{"op"', '\n{"op"') + "\n")
    print(text)
    return 1 if failed or not results else 0


def origin() -> dict[str, Any]:
    from specdec.utils.provenance import provenance

    return {
        key: value
        for key, value in provenance("cpu").items()
        if key in ("commit", "dirty", "command", "python", "date")
    }


def run_child(triton: Path | None) -> list[Checked]:
    """Run the checks in another process, with that Triton and without its interpreter; print results as they come."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [*([str(triton)] if triton else []), str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    results = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            result = Checked(**json.loads(line))
            results.append(result)
            verdict = "; ".join(result.failures) or "ok"
            print(
                f"triton {result.triton}  sm_{result.arch}  {result.op} {result.configuration}: {verdict}",
                file=sys.stderr,
            )
    if process.returncode:
        raise SystemExit(f"the checks ended early, with exit code {process.returncode}; see the error above")
    return results


def check_all(args: argparse.Namespace) -> None:
    """Compile and check, and print a JSON line for each; two at a time, since compiling releases the GIL at times."""
    sys.path.insert(0, os.getcwd())
    jobs = []
    for op in args.op:
        module = importlib.import_module(f"specdec_kernels.{op}.kernel" if op in OPS else op)
        chosen = module.CONFIGURATIONS if args.all else module.CONFIGURATIONS[:1]
        jobs += [(configuration, arch) for configuration in chosen for arch in args.arch]
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda job: check(*job), jobs):
            print(json.dumps(asdict(result)), flush=True)


def check(configuration: Any, arch: int) -> Checked:
    """Compile one configuration for one architecture and check its machine code."""
    import triton

    result = Checked(configuration.op, configuration.name, arch, triton.__version__)
    try:
        compiled = compile_for(configuration, arch)
    except Exception as error:
        result.failures.append(f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")
        return result
    sass, usage = disassemble(compiled.asm["cubin"])
    instructions, loop = loop_of(sass)
    names = [mnemonic(instruction) for _, instruction in instructions]
    loop_names = [mnemonic(instruction) for instruction in loop]
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    result.registers, stack = int(found[1]), int(found[2])
    result.shared_bytes = compiled.metadata.shared
    result.spills = stack + sum(name.startswith(("STL", "LDL")) for name in names)
    result.loop_instructions = len(loop)
    result.barriers = sum(name.startswith("BAR") for name in loop_names)
    reading = loop_names if configuration.weights_per_pass else names
    result.wide_loads = sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in reading)
    result.tensor_core = next((n for n in names if n.startswith(("HMMA", "HGMMA")) or re.match(r"UTC\w*MMA", n)), "")
    if configuration.weights_per_pass:
        threads = configuration.num_warps * WARP
        result.instructions_per_weight = round(len(loop) * threads / configuration.weights_per_pass, 2)
    result.failures += failures(configuration, result, compiled.asm["ttir"], compiled.asm["ttgir"])
    return result


def failures(configuration: Any, result: Checked, ttir: str, ttgir: str) -> list[str]:
    """The checks that a configuration's machine code fails."""
    found = []
    if result.spills:
        found.append("registers spill")
    if configuration.tensor_cores and not result.tensor_core:
        found.append("no tensor-core instruction")
    # every weight is part of a 128-bit load of a thread
    bits = (configuration.weights_per_pass or 0) * configuration.weight_bits
    needed = max(1, bits // (128 * WARP * configuration.num_warps))
    if configuration.wide_loads and result.wide_loads < needed:
        found.append(f"{result.wide_loads} loads of 128 bits, at least {needed}")
    most = INSTRUCTIONS_A_BYTE * configuration.weight_bits / 8
    if (result.instructions_per_weight or 0) > most:
        found.append(f"{result.instructions_per_weight} instructions a weight, at most {most}")
    if configuration.weights_per_pass and not result.loop_instructions:
        found.append("no main loop found")
    if result.barriers > configuration.barriers:
        found.append(f"{result.barriers} barriers in the loop, at most {configuration.barriers}")
    if result.shared_bytes > SHARED_BYTES[result.arch]:
        found.append(f"{result.shared_bytes} bytes of shared memory, at most {SHARED_BYTES[result.arch]}")
    if configuration.adjacent_pairs:
        asm = "\n".join(line for line in ttgir.splitlines() if "elementwise_inline_asm" in line)
        layouts = set(re.findall(r"x(?:i32|b?f16), (#[\w.]+(?:<\{.*?\}>)?)>", asm))
        if not layouts or any(re.fullmatch(ADJACENT_PAIRS, layout) is None for layout in layouts):
            layout = ", ".join(sorted(layouts)) or "of no asm"
            found.append(f"the asm's pairs may not be adjacent in K, in the layout {layout}")
    if configuration.ordered and (gap := unordered(ttir)):
        found.append(gap)
    return found


def other_family(result: Checked, results: list[Checked]) -> list[str]:
    """Configurations that differ in rows alone must use one tensor-core instruction, or a row's bits depend on M."""
    variant = result.configuration.rpartition("-m")[0]
    same = [
        r
        for r in results
        if variant and (r.configuration.rpartition("-m")[0], r.arch, r.triton) == (variant, result.arch, result.triton)
    ]
    families = sorted({r.tensor_core for r in same} - {""})
    return [f"its variants for few and many rows multiply with {' and '.join(families)}"] if len(families) > 1 else []


def unordered(ttir: str) -> str | None:
    """The error in the order of stores, barriers and counters, None if a barrier separates stores and counters.

    Checked in Triton's own IR, since newer versions of Triton insert a barrier before such an atomic and older ones do
    not.
    """
    events = re.findall(
        r"^\s*(?:%\S+ = )?(tt\.store|gpu\.barrier|ttg\.barrier|tt\.atomic_rmw[^:]*)", ttir, re.MULTILINE
    )
    since_store: list[str] | None = None  # None: nothing is stored yet
    num_counters = 0
    for event in events:
        if event == "tt.store":
            since_store = []
        elif not event.startswith("tt.atomic_rmw"):
            if since_store is not None:
                since_store.append(event)
        else:
            num_counters += 1
            if "acq_rel" not in event:
                return "a counter is incremented without acquire and release order"
            if since_store is None:
                return "nothing is stored before the counter is incremented"
            if not since_store:
                return "no barrier between a block's stores and its counter"
    return None if num_counters else "the blocks have no counter"


def compile_for(configuration: Any, arch: int) -> Any:
    """The configuration's compiled kernel for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = configuration.kernel.arg_names
    signature = {
        name: "constexpr" if name in configuration.constants else configuration.signature[name] for name in names
    }
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in configuration.divisible}
    source = ASTSource(configuration.kernel, signature, configuration.constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=configuration.options)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """-> SASS, resource usage; with the cuobjdump that is part of Triton."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        ]
    return outputs[0], outputs[1]


def loop_of(sass: str) -> tuple[list[tuple[int, str]], list[str]]:
    """-> (address, instruction) of the kernel, the instructions of its longest loop."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)]
    loop: list[str] = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [inside for at, inside in instructions if int(target[1], 16) <= at <= address]
            loop = max(loop, body, key=len)
    return instructions, loop


def mnemonic(instruction: str) -> str:
    """The operation with its modifiers, without a predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def show(results: list[Checked]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels, compiled ahead of time; loop: instructions of the main loop")
    for column in ("Triton", "arch", "op", "configuration"):
        table.add_column(column, no_wrap=True)
    for column in ("regs", "shared", "loop", "per weight", "barriers", "128-bit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for r in results:
        per_weight = "–" if r.instructions_per_weight is None else f"{r.instructions_per_weight:.2f}"
        cells = (r.registers, f"{r.shared_bytes:,}", r.loop_instructions, per_weight, r.barriers, r.wide_loads)
        verdict = "[red]fails" if r.failures else "ok"
        table.add_row(r.triton, f"sm_{r.arch}", r.op, r.configuration, *map(str, cells), verdict)
    console = Console(width=max(125, Console().width))
    console.print(table)
    for r in results:
        if r.failures:
            console.print(
                f"[red]fails[/]: {r.op} {r.configuration}, sm_{r.arch}, Triton {r.triton}: {'; '.join(r.failures)}"
            )
    console.print(f"{len(results)} compiled, {sum(bool(r.failures) for r in results)} fail")


if __name__ == "__main__":
    sys.exit(main())
