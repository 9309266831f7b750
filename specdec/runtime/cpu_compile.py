"""A model's decoding forward, compiled ahead of time for a CPU and kept on disk.

What the compiler is given is the eager forward on a ragged cache, with the batch, the window's width and the buffers' length left
open: one package serves every K and every batch, and a row's result is the same in all of them. It holds no weights; the model's
own are lent to it. Elementwise work is fused by torch's compiler; the rest stays with operators that the eager forward calls too:
specdec_kernels.cpu's, and in a target PyTorch's own means, layer norms, cosines and their like, so that a 4-bit target's logits
come out bit for bit as they do without a compiler.
"""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import transformers
from filelock import FileLock
from specdec_kernels import cpu
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import tqdm

from specdec.quant import batch_invariant as rows
from specdec.quant import cpu as int4_on_cpu
from specdec.quant import int4
from specdec.quant.batch_invariant import ATTENTION, MAX_WINDOW
from specdec.quant.quantizer import is_4bit
from specdec.runtime import model_forward
from specdec.runtime.attention import blocks, fused, override, select, stock
from specdec.runtime.cuda_graphs import Graphs, why_not_recorded
from specdec.runtime.identity import Identity, enter_layouts, opaque
from specdec.runtime.kv_cache import layers, masks, ragged, window
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.runner import ModelRunner
from specdec.runtime.support import PROBE_TOLERANCE, precision_of
from specdec.runtime.tensor_parallel import tensor_parallel_group

Compile = Literal["auto"] | bool
# What is traced, with this file.
SOURCES: tuple[ModuleType, ...] = (
    ragged, layers, masks, window, select, override, fused, blocks, stock, model_forward, int4, int4_on_cpu, rows
)  # fmt: skip
SHAPES = "buffers"  # a package's note of each layer's heads and widths, keys and values in turn
MASKS_BY_SLOT = "it tells by the number of keys where a query stands"
SIZES = (3, 5)  # rows and columns of the example that is traced; left open, as the buffers' length is


@dataclass(frozen=True)
class PairMember:
    """A model to be compiled. exact: its logits decide a text, so they keep their bits; a draft's may be rounded otherwise."""

    name: str
    runner: ModelRunner
    exact: bool


class CompiledForward:
    """ids, positions [B, W] int64 and a cache -> logits [B, W, V] float32, or [B, 1, V] of the last column.

    any_width: a window of more than MAX_WINDOW positions comes out as it does eagerly, and sooner: the model is in 4 bits.
    """

    def __init__(self, member: PairMember, package: Path, identity: Identity) -> None:
        model = member.runner.model
        self.name = member.name
        self.identity = identity  # of the model as the package was made of it
        self.warned: set[str] = set()  # reasons for eager calls
        self.model = weakref.ref(model)  # which keeps this; see _KEPT
        self.dtype = model.dtype
        self.loaded: Any = torch._inductor.aoti_load_package(str(package))
        self.names: list[str] = self.loaded.get_constant_fqns()
        self.shapes: list[list[int]] = json.loads(self.loaded.get_metadata()[SHAPES])
        self.sources = [_source(model, name.removeprefix("model.")) for name in self.names]
        self.weights: list[Tensor] = []  # lent, so they have to be there
        self.places: list[int] = []
        self.columns: dict[tuple[int, bool], Tensor] = {}
        layers = [module for module in model.modules() if isinstance(module, int4.Int4Linear)]
        self.any_width = bool(layers) and all(
            isinstance(x.kernel, int4_on_cpu.CpuKernel) and x.use_kernel for x in layers
        )

    def renew(self, unchanged: Identity | None = None) -> bool:
        """Give it the model's weights as they are now; False, with a warning, where the call that begins has to run eagerly."""
        model = self.model()
        assert model is not None
        reason = "torch.autocast is on" if torch.is_autocast_enabled("cpu") else _why_not_our_attention(model)
        if reason is None and unchanged is not self.identity:
            reason = self.identity.change()
        if reason is not None:
            if reason not in self.warned:
                self.warned.add(reason)
                warnings.warn(f"the {self.name} runs eagerly: {reason}", stacklevel=3)
            return False
        weights = [tensors[name] for tensors, name in self.sources]
        places = [weight.data_ptr() for weight in weights]
        if places != self.places:
            named = dict(zip(self.names, weights, strict=True))
            self.loaded.load_constants(named, check_full_update=True, user_managed=True)
            self.weights, self.places = weights, places
        return True

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        if not cache.layers:
            cache.fill(self.shapes, len(ids), self.dtype)
        width = ids.shape[1]
        key = width, last_only
        columns = self.columns.get(key)
        if columns is None:
            columns = torch.arange(width - 1 if last_only else 0, width)
            if width <= MAX_WINDOW:
                self.columns[key] = columns
        inputs = [ids.contiguous(), positions.contiguous(), columns, *cache.buffers()]  # strides are taken on trust
        # past the package's own __call__, which reads its signature from JSON every time
        logits: Tensor = self.loaded.loader.boxed_run(inputs)[0]
        return logits


def _source(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a tensor of this name, and its key there; the same as long as the module tree is."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    return next((held for held in (owner._parameters, owner._buffers) if key in held), vars(owner)), key


# Of each model, so that enabling it again loads nothing.
_KEPT: weakref.WeakKeyDictionary[PreTrainedModel, dict[Path, CompiledForward]] = weakref.WeakKeyDictionary()


@atexit.register
def _let_go() -> None:
    """A loaded package lies unpacked in a temporary folder until it is let go, which the interpreter's end does not do."""
    for forwards in _KEPT.values():
        for forward in forwards.values():
            forward.loaded = None


def prepare(parts: Sequence[PairMember], compile: Compile, graphs: Graphs | None = None) -> None:
    """Give each runner its compiled forward, or take it away.

    True: what is not on disk yet is compiled, with a progress bar; what cannot be is left eager, with one warning that says why.
    "auto": what an earlier process has left on disk is used. False: eager. graphs: where there are some, steps are recorded in
    them instead; for all parts or for none.
    """
    for member in parts:
        member.runner.compiled = member.runner.graphs = None
    if compile is False:
        return
    if graphs is not None:
        _record(parts, graphs)
        return
    if any(member.runner.model.device.type != "cpu" for member in parts):
        return
    if compile is True and (failures := _build(parts)):
        warnings.warn(f"specdec runs without a compiler's help: {'; '.join(failures)}", stacklevel=3)
    if not cpu.load():
        return
    for member in parts:
        if _why_not_compiled(member.runner) is not None:
            continue
        identity = Identity(member.runner.model)
        try:
            package = _package(member, identity)
            if not package.exists():
                continue
        except OSError:  # no cache folder, or one that cannot be read: nothing was compiled there
            continue
        try:
            reason = cpu.untrusted(package)
            if reason is None:
                member.runner.compiled = _load(member, package, identity)
        except Exception as error:  # a package may be torn, or the disk that it is unpacked to full
            reason = f"{package} does not load ({_said(error)}); delete it"
        if reason is not None:
            warnings.warn(f"the {member.name} runs eagerly: {reason}", stacklevel=3)


def _load(member: PairMember, package: Path, identity: Identity) -> CompiledForward:
    kept = _KEPT.setdefault(member.runner.model, {})
    forward = kept.get(package)
    if forward is None:
        forward = kept[package] = CompiledForward(member, package.resolve(), identity)
    forward.identity, forward.warned = identity, set()
    return forward


def _record(parts: Sequence[PairMember], graphs: Graphs) -> None:
    """Let the runners record what they do, where a trial of each comes out right; else say why not."""
    for member in parts:
        enter_layouts(member.runner.model)
        reason = MASKS_BY_SLOT if member.runner.masks_by_slot else why_not_recorded(member.runner.model)
        if reason is None:
            member.runner.graphs = graphs
            reason = _trial(member.runner, graphs)
        if reason is not None:
            if graphs.failure is None:  # which was said when it came
                graphs.failure = reason
                warnings.warn(
                    f"specdec runs without CUDA graphs, and slower: of the {member.name}, {reason}", stacklevel=4
                )
            break
    if graphs.failure is not None:
        for member in parts:
            member.runner.graphs = None


@torch.no_grad()
def _trial(runner: ModelRunner, graphs: Graphs) -> str | None:
    """What is wrong with a recorded forward, held against an eager one on a ragged batch that goes on; None: nothing."""
    generator = torch.Generator().manual_seed(0)
    last = torch.tensor([9, 4], device=runner.model.device)
    ids = torch.randint(runner.vocab_size, (2, 16), generator=generator).to(last.device)
    error = 0.0
    try:
        runner.begin(2, 16)
        runner.prefill(ids, last - 1)
        runner.reserve(16)

        def logits_of(ids: Tensor, positions: Tensor) -> Tensor:
            return runner.forward(ids, positions).logits

        eager = ModelRunner(runner.model)
        eager.prefill(ids, last - 1)
        for _ in range(4):  # as it is, recorded, replayed, replayed
            positions = last[:, None] + torch.arange(2, device=last.device)
            window = ids.gather(1, positions)
            got = graphs.run((runner, "trial"), logits_of, window, positions).clone()
            want = eager.forward(window, positions).logits
            error = max(error, ((got - want).norm() / (want - want.mean()).norm().clamp(min=1e-30)).item())
            last = last + 1
    except (
        RuntimeError,
        ValueError,
        IndexError,
    ) as failure:  # a model may not take buffers that are longer than its text
        return _said(failure)
    finally:
        runner.begin(0)
    if graphs.failure is None and not error <= PROBE_TOLERANCE[precision_of(runner.model)]:
        return f"a replay gave other logits (relative error {error:.1e})"
    return graphs.failure


def _why_not_compiled(runner: ModelRunner) -> str | None:
    """Why a model's forward cannot be compiled, None where it can."""
    model = runner.model
    if tensor_parallel_group(model) is not None:
        return "its weights are split over several processes"
    if model.dtype not in cpu.DTYPES:
        return f"its dtype is {model.dtype}; the CPU's kernels take float32 and bfloat16"
    if "position_ids" not in runner.parameters:
        return "its forward takes no positions"
    if runner.masks_by_slot:
        return MASKS_BY_SLOT
    return _why_not_our_attention(model) or opaque(model)


def _why_not_our_attention(model: PreTrainedModel) -> str | None:
    """Why the CPU's attention kernel does not compute what the model's own attention does, None where it does."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if not model._supports_attention_backend or implementation not in ("sdpa", ATTENTION):
        return f"its attention ({implementation}) cannot be given to the CPU's kernel"
    if implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "transformers' sdpa attention was replaced"
    return None


def _build(parts: Sequence[PairMember]) -> list[str]:
    """Compile what is missing on disk: -> what failed, and why. Compilers fail in their own ways; the models run without."""
    try:
        if cpu.load() and not any(map(_is_missing, parts)):
            return _failures(parts)
        if torch.is_autocast_enabled("cpu"):
            return ["nothing is compiled under torch.autocast; leave it and enable the model again"]
        lock = FileLock(cpu.make_cache_folder() / ".lock")  # of several processes one compiles, the others find it done
        with lock:
            return _build_missing(parts)
    except OSError as error:
        return [] if cpu.was_warned_of(error) else [f"the cache folder cannot be used: {_said(error)}"]


def _build_missing(parts: Sequence[PairMember]) -> list[str]:
    with tqdm(total=1 + 2 * len(parts), desc="compiling the kernels for this CPU", bar_format=BAR) as bar:
        try:
            cpu.build()
        except Exception as error:
            return [] if cpu.was_warned_of(error) else [f"the kernels could not be built: {_said(error)}"]
        bar.update()
        for member in filter(_is_missing, parts):
            bar.set_description(f"compiling the {member.name} for this CPU")
            identity = Identity(member.runner.model)
            package = _package(member, identity)
            try:
                _compile(member, package, identity, bar.update)
            except Exception as error:
                _FAILED[package] = _said(error)
            finally:
                member.runner.begin(0)
    return _failures(parts)


def _failures(parts: Sequence[PairMember]) -> list[str]:
    failures = []
    for member in parts:
        if (reason := _why_not_compiled(member.runner)) is not None:
            failures.append(f"the {member.name} cannot be compiled: {reason}")
        elif (reason := _FAILED.get(_package(member, Identity(member.runner.model)))) is not None:
            failures.append(f"the {member.name} could not be compiled: {reason}")
    return failures


def _is_missing(member: PairMember) -> bool:
    """Whether a model can be compiled and nobody has tried."""
    if _why_not_compiled(member.runner) is not None:
        return False
    package = _package(member, Identity(member.runner.model))
    return package not in _FAILED and not package.exists()


_FAILED: dict[Path, str] = {}  # of this process, and why: it is not tried again


def _compile(member: PairMember, package: Path, identity: Identity, advance: Callable[[], Any]) -> None:
    from torch._inductor.utils import fresh_cache  # which takes a second to import

    program, shapes = _trace(member)
    advance()
    settings = SETTINGS | {
        "emulate_precision_casts": member.exact,
        "aot_inductor.metadata": {SHAPES: json.dumps(shapes)},
    }
    content = io.BytesIO()  # torch's writer of files ends the process where a disk is full
    unfinished = package.with_suffix(f".{os.getpid()}.pt2")
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=package.parent) as own, fresh_cache(dir=own):
            warnings.simplefilter("ignore")  # torch's, of what it will do by and by
            torch._inductor.aoti_compile_and_package(program, package_path=content, inductor_configs=settings)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.getbuffer())
        _check(member, unfinished, identity)
        unfinished.replace(package)  # whole and tried, or not there
    finally:
        unfinished.unlink(missing_ok=True)
    advance()


def _said(error: Exception) -> str:
    lines = (str(error).strip() or "no reason given").splitlines()
    full = os.strerror(errno.ENOSPC)  # a compiler says so behind much else
    return f"{type(error).__name__}: {next((full for line in lines if full in line), lines[0])}"


BAR = "{desc} |{bar}| {n}/{total} [{elapsed}]"
SETTINGS = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.threads": 1,  # it writes small pieces between kernels; those find their threads themselves
}


def _package(member: PairMember, identity: Identity) -> Path:
    """Where a model's compiled forward lies. Its name tells all that it depends on, but for the weights' values."""
    sources = [
        Path(path).read_text(encoding="utf-8") for path in (__file__, *(module.__file__ or "" for module in SOURCES))
    ]
    versions = cpu.built_at().name, transformers.__version__
    return (
        cpu.cache_folder() / f"forward-{cpu.fingerprint(*versions, *sources, identity.digest, str(member.exact))}.pt2"
    )


class _Traced(nn.Module):
    """The forward as a function of tensors alone."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.model = runner.model
        self.runner = [runner]  # no module, and not to be looked for one

    def forward(self, ids: Tensor, positions: Tensor, columns: Tensor, buffers: list[Tensor]) -> Tensor:
        cache = RaggedCache.over(buffers, positions)
        return self.runner[0].model_forward.call(ids, positions, cache, torch.int32, columns).float()


@torch.no_grad()
def _trace(member: PairMember) -> tuple[Any, list[list[int]]]:
    """The forward as an exported program, with all that must keep its bits as operators no compiler looks into.

    And of each buffer of the cache, [B, H, S, D], the heads and the width.
    """
    runner = member.runner
    batch, width = SIZES
    runner.begin(batch)
    ids = torch.ones(batch, 2 * width, dtype=torch.int64)
    runner.prefill(ids, torch.full((batch,), width - 1))  # makes the buffers
    positions = torch.arange(width, 2 * width).repeat(batch, 1)
    buffers = [buffer.clone() for buffer in runner.cache.buffers()]
    any_size = torch.export.Dim.DYNAMIC
    shapes = (
        {0: any_size, 1: any_size},
        {0: any_size, 1: any_size},
        {0: any_size},
        [{0: any_size, 2: any_size}] * len(buffers),
    )
    with override.attention_override(runner.config):
        program = torch.export.export(
            _Traced(runner),
            (ids[:, width:].contiguous(), positions, torch.arange(width), buffers),
            dynamic_shapes=shapes,
            strict=False,
        )
    keeps_bits = _keeps_bits(member)
    for node in program.graph.nodes:
        _keep(node, member.exact, keeps_bits)
    _join(program.graph)
    program.graph_module.recompile()
    return program, [[buffer.shape[1], buffer.shape[3]] for buffer in buffers]


def _keeps_bits(member: PairMember) -> bool:
    """Whether the compiled logits must be the eager ones bit for bit: a 4-bit target's."""
    return member.exact and is_4bit(member.runner.model)


def _keep(node: Any, exact: bool, keeps_bits: bool) -> None:
    """Put one of our operators in the place of a node that it computes, and computes better or to the very bit.

    A 4-bit model's own linear layers call specdec::linear eagerly; what calls PyTorch's (a router) keeps to it.
    """
    aten, ours = torch.ops.aten, torch.ops.specdec
    if node.op != "call_function":
        return
    if node.target == aten.linear.default:
        x, weight = node.args[0].meta["val"], node.args[1].meta["val"]
        if x.dtype == weight.dtype and x.dtype in cpu.DTYPES:
            node.target = ours.torch_linear.default if keeps_bits else ours.linear.default
            node.args = (*node.args, None)[:3]
    elif not exact:
        return
    elif node.target == aten.mean.dim and node.args[1:] == ([-1], True) and not node.kwargs:
        node.target, node.args = ours.mean.default, node.args[:1]
    elif node.target == aten.gelu.default:
        node.target, node.args, node.kwargs = (
            ours.gelu.default,
            (node.args[0], node.kwargs.get("approximate", "none")),
            {},
        )
    elif node.target == aten.layer_norm.default and len(node.args[1]) == 1:
        x, _, weight, bias, eps = (*node.args, *(None, None, None, None, 1e-5)[len(node.args) :])[:5]
        node.target, node.args, node.kwargs = ours.layer_norm.default, (x, weight, bias, eps), {}
    elif node.target in (aten.cos.default, aten.sin.default, aten.tanh.default, aten.softmax.int, aten.sum.dim_IntList):
        node.target = getattr(ours, node.target.overloadpacket.__name__).default


def _join(graph: Any) -> None:
    """Let 4-bit layers that take the same input (q, k, v; gate, up) share a call: the same sums, looked up in one place."""
    layers: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target == torch.ops.specdec.int4_linear.default:
            x, _, [scale], _ = node.args
            form = scale.meta["val"]
            layers.setdefault((x, form.shape[1], form.dtype), []).append(node)
    for (x, *_), nodes in layers.items():
        if len(nodes) == 1:
            continue
        packed, scales, columns = ([one for node in nodes for one in node.args[at]] for at in (1, 2, 3))
        with graph.inserting_before(nodes[0]):
            together = graph.call_function(torch.ops.specdec.int4_linear.default, (x, packed, scales, columns))
        together.meta["val"] = [value for node in nodes for value in node.meta["val"]]
        for at, node in enumerate(nodes):
            [result] = node.users  # the one of its list
            result.args = (together, at)
            graph.erase_node(node)


@torch.no_grad()
def _check(member: PairMember, package: Path, identity: Identity) -> None:
    """Raise where the compiled forward computes something else than the eager one, on a ragged batch and on one row."""
    runner = member.runner
    compiled = CompiledForward(member, package, identity)
    generator = torch.Generator().manual_seed(0)
    tolerance = 0.0 if _keeps_bits(member) else PROBE_TOLERANCE[precision_of(runner.model)]
    for lengths in ([9], [9, 4, 7]):
        last = torch.tensor(lengths)
        ids = torch.randint(runner.vocab_size, (len(lengths), 16), generator=generator)
        positions = last[:, None] + torch.arange(3)
        window = ids.gather(1, positions)
        runner.begin(len(lengths))
        runner.prefill(ids, last - 1)
        eager = runner.forward(window, positions).logits
        if not compiled.renew():
            raise RuntimeError("the model changed while it was compiled")
        runner.compiled = compiled
        got = runner.forward(window, positions).logits
        runner.compiled = None
        error = ((got - eager).norm() / (eager - eager.mean()).norm().clamp(min=1e-30)).item()
        if not error <= tolerance:
            raise RuntimeError(f"it came out of the compiler with other logits (relative error {error:.1e})")
