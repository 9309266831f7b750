"""Compiled forwards on disk: the path of a package, and how a missing one is compiled, tried and stored.

A package is in the cache folder of specdec_kernels.cpu, under the same rules of trust. Its name is a fingerprint of all
that it depends on, except for the values of the weights, so one that no longer fits is not found. It gets its name only
after a trial on this machine.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from specdec_kernels import cpu
from transformers.utils.logging import tqdm

from specdec.runtime.cpu_compile.eligibility import why_not_compiled
from specdec.runtime.cpu_compile.forward import BUFFER_SHAPES, CompiledForward
from specdec.runtime.cpu_compile.tracing import must_be_bit_exact, trace
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.pair import PairMember
from specdec.runtime.support import TRIAL_TOLERANCE, precision_of
from specdec.runtime.trial import RaggedBatch
from specdec.utils.numerics import relative_error

PACKAGE = Path(__file__).parents[2]  # specdec
TRACED = (
    *("runtime/cpu_compile", "runtime/kv_cache", "runtime/attention", "runtime/model_forward.py"),
    *("drafters/heads.py", "drafters/eagle3.py", "drafters/peagle.py", "drafters/dflash.py", "drafters/dspark.py"),
    "drafters/mtp.py",
    *("quant/batch_invariant.py", "quant/cpu.py", "quant/experts.py", "quant/fused_linear.py"),
    *("quant/heads.py", "quant/int4.py", "quant/int8.py", "quant/linear.py"),
)
PROGRESS_FORMAT = "{desc} |{bar}| {n}/{total} [{elapsed}]"
INDUCTOR_SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.threads": 1,  # the generated loops are small; specdec's kernels between them start threads of their own
}
_FAILURES: dict[Path, str] = {}  # packages that this process failed to compile, and why; it does not try again


@cache
def traced_sources() -> tuple[Path, ...]:
    """The modules of specdec whose code is traced or decides what is compiled: every module below TRACED."""
    roots = [PACKAGE / name for name in TRACED]
    return tuple(path for root in roots for path in ([root] if root.suffix else sorted(root.rglob("*.py"))))


@cache
def _source_text() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in traced_sources())


def package_path(member: PairMember, identity: Identity) -> Path:
    """Where a member's package is, compiled or not. OSError without a cache folder."""
    runner = member.runner
    settings = getattr(runner.model, "settings", None)  # of a draft head, whose forward depends on them
    own = str(member.exact), str(runner.feature_layers), str(settings)
    fingerprint = cpu.fingerprint(cpu.built_at().name, transformers.__version__, _source_text(), identity.digest, *own)
    return cpu.cache_folder() / f"forward-{fingerprint}.pt2"


def build_packages(members: Sequence[PairMember]) -> list[str]:
    """Compile what is missing on disk: -> a message for each failure. Errors of compilers and disks are not raised."""
    try:
        if cpu.load() and not any(map(_is_missing, members)):
            return _failures(members)
        if torch.is_autocast_enabled("cpu"):
            return ["nothing is compiled under torch.autocast; leave it and enable the model again"]
        return _build_missing(members)
    except OSError as error:
        return [] if cpu.was_warned_of(error) else [f"the cache folder cannot be used: {first_line(error)}"]


def _build_missing(members: Sequence[PairMember]) -> list[str]:
    """One process compiles a file, others that need it wait and find it; different files are compiled at once."""
    description = "compiling the kernels for this CPU"
    folder = cpu.make_cache_folder()
    with tqdm(total=1 + 2 * len(members), desc=description, bar_format=PROGRESS_FORMAT) as bar:
        try:
            with FileLock(folder / ".lock"):
                cpu.build()
        except Exception as error:
            return [] if cpu.was_warned_of(error) else [f"the kernels could not be built: {first_line(error)}"]
        bar.update()
        for member in filter(_is_missing, members):
            bar.set_description(f"compiling the {member.name} for this CPU")
            identity = Identity(member.runner.model)
            package = package_path(member, identity)
            try:
                with FileLock(package.with_suffix(".lock")):
                    if not package.exists():
                        _compile(member, package, identity, bar.update)
            except Exception as error:
                _FAILURES[package] = first_line(error)
            finally:
                member.runner.begin(0)
    return _failures(members)


def _failures(members: Sequence[PairMember]) -> list[str]:
    failures = []
    for member in members:
        if (reason := why_not_compiled(member.runner)) is not None:
            failures.append(f"the {member.name} cannot be compiled: {reason}")
        elif (reason := _FAILURES.get(package_path(member, Identity(member.runner.model)))) is not None:
            failures.append(f"the {member.name} could not be compiled: {reason}")
    return failures


def _is_missing(member: PairMember) -> bool:
    """Whether a model can be compiled, is not on disk, and has not failed to compile in this process."""
    if why_not_compiled(member.runner) is not None:
        return False
    package = package_path(member, Identity(member.runner.model))
    return package not in _FAILURES and not package.exists()


def _compile(member: PairMember, package: Path, identity: Identity, on_progress: Callable[[], Any]) -> None:
    """Trace, compile, try and store a package; on_progress is called after tracing and at the end."""
    from torch._inductor.utils import fresh_cache  # takes a second to import

    program, buffer_shapes = trace(member)
    on_progress()
    settings = INDUCTOR_SETTINGS | {
        "emulate_precision_casts": member.exact,
        "aot_inductor.custom_ops_to_c_shims": cpu.c_shims(),
        "aot_inductor.metadata": {BUFFER_SHAPES: json.dumps(buffer_shapes)},
    }
    content = io.BytesIO()  # torch's own file writer aborts the process where the disk is full
    unfinished = package.with_suffix(f".{os.getpid()}.pt2")
    try:
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(dir=package.parent) as folder,
            fresh_cache(dir=folder),
        ):
            warnings.simplefilter("ignore")  # torch warns of changes in later versions
            torch._inductor.aoti_compile_and_package(program, package_path=content, inductor_configs=settings)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.getbuffer())
        _try_package(member, unfinished, identity)
        unfinished.replace(package)  # atomic: a package is complete and tried, or absent
    finally:
        unfinished.unlink(missing_ok=True)
    on_progress()


@torch.no_grad()
def _try_package(member: PairMember, package: Path, identity: Identity) -> None:
    """Raise RuntimeError where the compiled logits differ from the eager ones, on one row and on a ragged batch."""
    runner = member.runner
    compiled = CompiledForward(member, package, identity)
    generator = torch.Generator().manual_seed(0)
    tolerance = 0.0 if must_be_bit_exact(member) else TRIAL_TOLERANCE[precision_of(runner.model)]
    for lengths in ([9], [9, 4, 7]):
        batch = RaggedBatch(runner, lengths, generator)
        ids, positions = batch.window(3)
        runner.begin(len(lengths))
        batch.prefill(runner)
        eager = runner.forward(ids, positions).logits
        features = runner.read_features(positions) if runner.feature_layers else None
        runner.begin(len(lengths))
        batch.prefill(runner)
        if not compiled.renew():
            raise RuntimeError("the model changed while it was compiled")
        runner.compiled = compiled
        got = runner.forward(ids, positions).logits
        runner.compiled = None
        error = relative_error(got, eager)
        if features is not None:
            error = max(error, relative_error(runner.read_features(positions), features))
        if not error <= tolerance:
            raise RuntimeError(f"the compiled forward gives other logits (relative error {error:.1e})")


def first_line(error: Exception) -> str:
    """An error in one line; that of a full disk, where a compiler's output contains it."""
    lines = (str(error).strip() or "no reason given").splitlines()
    disk_full = os.strerror(errno.ENOSPC)
    return f"{type(error).__name__}: {next((disk_full for line in lines if disk_full in line), lines[0])}"
