"""How each model of a pair runs its decoding forwards: eagerly, compiled ahead of time, or recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from specdec_kernels import cpu
from torch import Tensor

from specdec.runtime.cpu_compile.eligibility import MASKS_BY_SLOT, why_not_compiled
from specdec.runtime.cpu_compile.forward import load_package
from specdec.runtime.cpu_compile.packages import build_packages, first_line, package_path
from specdec.runtime.cuda_graphs import Graphs, why_not_recorded
from specdec.runtime.identity.snapshot import Identity, enter_layouts
from specdec.runtime.pair import PairMember
from specdec.runtime.runner import ModelRunner
from specdec.runtime.support import TRIAL_TOLERANCE, precision_of
from specdec.runtime.trial import TRIAL_SLOTS, RaggedBatch
from specdec.utils.numerics import relative_error
from specdec.utils.warn import warn

Compile = Literal["auto"] | bool


def prepare(members: Sequence[PairMember], compile: Compile, graphs: Graphs | None = None) -> None:
    """Set how each runner executes its forwards; what was set before is removed.

    compile: True compiles what is not on disk yet, with a progress bar; what cannot be compiled runs eagerly, with one
    warning that gives the reason. "auto" uses what an earlier process has left on disk. False: all models run eagerly.
    graphs: where given, steps are recorded in them instead, for all members or for none.
    """
    for member in members:
        member.runner.compiled = member.runner.graphs = None
    if compile is False:
        return
    if graphs is not None:
        _record_steps(members, graphs)
    elif all(member.runner.model.device.type == "cpu" for member in members):
        _use_compiled_forwards(members, compile)


def _use_compiled_forwards(members: Sequence[PairMember], compile: Compile) -> None:
    if compile is True and (failures := build_packages(members)):
        warn(f"specdec runs without compiled forwards: {'; '.join(failures)}")
    if not cpu.load():
        return
    for member in members:
        if why_not_compiled(member.runner) is None and (reason := _load(member)) is not None:
            warn(f"the {member.name} runs eagerly: {reason}")


def _load(member: PairMember) -> str | None:
    """Give a member its package, if there is one: -> why it cannot be loaded, else None."""
    identity = Identity(member.runner.model)
    try:
        package = package_path(member, identity)
        if not package.exists():
            return None
    except OSError:  # no cache folder, or one that cannot be read: nothing was compiled there
        return None
    try:
        if (reason := cpu.untrusted(package)) is not None:
            return reason
        member.runner.compiled = load_package(member, package, identity)
    except Exception as error:  # the package may be damaged, or the disk that it is unpacked to full
        return f"{package} does not load ({first_line(error)}); delete it"
    return None


def _record_steps(members: Sequence[PairMember], graphs: Graphs) -> None:
    """Let the runners record their steps if a trial of each passes; else none does, with a warning that says why."""
    for member in members:
        enter_layouts(member.runner.model)
        reason = MASKS_BY_SLOT if member.runner.masks_by_slot else why_not_recorded(member.runner.model)
        if reason is None:
            member.runner.graphs = graphs
            reason = _try_recorded_steps(member.runner, graphs)
        if reason is not None:
            if graphs.failure is None:  # a failed recording has already warned
                graphs.failure = reason
                warn(f"specdec runs without CUDA graphs, and slower: of the {member.name}, {reason}")
            break
    if graphs.failure is not None:
        for member in members:
            member.runner.graphs = None


@torch.no_grad()
def _try_recorded_steps(runner: ModelRunner, graphs: Graphs) -> str | None:
    """Compare recorded forwards to eager ones over steps of a ragged batch: -> what is wrong, None: nothing."""
    batch = RaggedBatch(runner, [9, 4], torch.Generator().manual_seed(0))

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        return runner.forward(ids, positions).logits

    error = 0.0
    try:
        runner.begin(2, TRIAL_SLOTS)
        batch.prefill(runner)
        runner.reserve(TRIAL_SLOTS)
        eager = ModelRunner(runner.model, runner.feature_layers)
        batch.prefill(eager)
        for offset in range(4):  # run eagerly, recorded, replayed, replayed
            ids, positions = batch.window(2, offset)
            got = graphs.run((runner, "trial"), forward, ids, positions).clone()
            error = max(error, relative_error(got, eager.forward(ids, positions).logits))
    except (RuntimeError, ValueError, IndexError) as failure:  # a model may not take buffers longer than its text
        return first_line(failure)
    finally:
        runner.begin(0)
    if graphs.failure is None and not error <= TRIAL_TOLERANCE[precision_of(runner.model)]:
        return f"the logits of a replay are wrong (relative error {error:.1e})"
    return graphs.failure
