"""Kernels for decoding on a CPU: kernels.cpp with its headers, built once by the machine's compiler and cached.

Importing this module declares the operators; `load` loads the library that implements them, `build` builds it. A row's
result is the same, bit for bit, at any number of rows and threads and at any index.

    specdec::int4_linear(x [..., K], packed, scales, Ns, int8_inputs) -> [..., N] of each: several weights of one kind;
        see `pack`
    specdec::int8_linear(x [..., K], weight int8 [N, K], scale [N], int8_inputs) -> [..., N]; K a multiple of 16
    specdec::linear(x [..., K], weight [N, K], bias [N] or None) -> [..., N]
    specdec::attention: see specdec_kernels.attention
    specdec::rms_norm(x [..., K], weight [K], eps) -> [..., K]: the bits of PyTorch's operators
    specdec::add_rms_norm(x, y, weight, eps) -> x + y, rms_norm(x + y, weight, eps)
    specdec::rotary_attention(query [B, W, H * D], key [B, W, H' * D], value [B, W, H' * DV], cos [B, W, D], sin,
        positions [B, W] int64, intervals [B, 2, W, 1] int32, keys, values, scale) -> [B, W, H * DV]
        rotates the halves of query and key, writes key and value into the buffers keys [B, H', S, D] and values
        [B, H', S, DV] at the positions, and attends to the slots of the intervals, first to last
    specdec::attention_block(x [B, W, E], residual [B, W, E], weights, scales, Ns, int8_inputs, cos, sin, positions,
        intervals, keys, values, scale, norm, eps) -> sum, rms_norm(sum, norm, eps), where
        sum = residual + o(rotary_attention(q(x), k(x), v(x), ...)); weights: of q, k, v, o, all packed in 4 bits, or
        dense without scales
    specdec::mlp_block(x, residual, weights, scales, Ns, int8_inputs, norm, eps) -> sum, rms_norm(sum, norm, eps), where
        sum = residual + down(silu(gate(x)) * up(x)); weights: of gate, up, down
    specdec::cos_sin(x) -> PyTorch's cos(x) and sin(x)
    specdec::mean(x [..., K]) -> [..., 1], cos, sin, tanh, gelu, layer_norm: PyTorch's own, opaque to compilers
    specdec::softmax(x, dim), sum(x, dims), torch_linear(x, weight, bias): the same
    specdec::draft_limits, prompt_lookup, stage_window, greedy_ids, draw, verify, verify_block, verify_greedy, commit,
        commit_greedy: see step.h
    specdec::suffix_texts, suffix_rows, suffix_add, suffix_release, suffix_propose: see suffix_tree.h
    torch.classes.specdec.Package: a compiled forward; see package.h

x is float32 or bfloat16, and so are the results; sums are float32. With int8_inputs inputs are rounded to 8 bits, in
groups of the largest power of two up to 64 that divides the weight's groups (K, for int8_linear), symmetric, to
nearest even, and sums the products of a group in integers. Without, int4_linear rounds its inputs to bfloat16 on CPUs
with bfloat16 products (AVX512-BF16), and not on others.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, library

import specdec_kernels.attention  # noqa: F401  # declares specdec::attention

SOURCES = (Path(__file__).parent / "kernels.cpp", *sorted(Path(__file__).parent.glob("*.h")))  # the first is compiled
DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 64  # columns of the result whose weights are stored together
WORD = 8  # codes of an int32
SYMMETRIC_ZERO = 8
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-fopenmp", "-shared", "-fPIC")

_LIBRARY = library.Library("specdec", "FRAGMENT")
_LIBRARY.define("int4_linear(Tensor x, Tensor[] packed, Tensor[] scales, int[] columns, bool int8_inputs) -> Tensor[]")
_LIBRARY.define("in_huge_pages(Tensor x) -> Tensor")
_LIBRARY.define("int8_linear(Tensor x, Tensor weight, Tensor scale, bool int8_inputs) -> Tensor")
for _name in ("linear", "torch_linear"):
    _LIBRARY.define(f"{_name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
for _name in ("mean", "cos", "sin", "tanh"):
    _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
for _schema in (
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rotary_attention(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor intervals, Tensor(a!) keys, Tensor(b!) values, float scale) -> Tensor",
    "attention_block(Tensor x, Tensor residual, Tensor[] weights, Tensor[] scales, int[] columns, bool int8_inputs, "
    "Tensor cos, Tensor sin, Tensor positions, Tensor intervals, Tensor(a!) keys, Tensor(b!) values, float scale, "
    "Tensor norm, float eps) -> (Tensor, Tensor)",
    "mlp_block(Tensor x, Tensor residual, Tensor[] weights, Tensor[] scales, int[] columns, bool int8_inputs, "
    "Tensor norm, float eps) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=torch.Tag.flexible_layout)  # else the compiler copies some inputs for each call
_LIBRARY.define("cos_sin(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define("softmax(Tensor x, int dim, ScalarType? dtype=None) -> Tensor")
_LIBRARY.define("sum(Tensor x, int[1]? dim, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor")
_LIBRARY.define("gelu(Tensor x, str approximate) -> Tensor")
_LIBRARY.define("draft_limits(Tensor lengths, Tensor end, Tensor finished, int? context, int num_ids) -> Tensor")
_LIBRARY.define(
    "prompt_lookup(Tensor ids, Tensor lengths, Tensor limit, int max_ngram, int num_ids) -> (Tensor, Tensor)"
)
for _schema in (
    "suffix_texts(Tensor like, int depth) -> Tensor",
    "suffix_rows(Tensor like, int num_rows, int depth) -> Tensor",
    "suffix_add(Tensor(a!) texts, Tensor ids, int num_removed) -> ()",
    "suffix_release(Tensor(a!) rows, int row) -> ()",
    "suffix_propose(Tensor(a!) rows, Tensor texts, Tensor ids, Tensor lengths, Tensor limit, float factor,"
    " float min_probability) -> (Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema)
_LIBRARY.define(
    "stage_window(Tensor(a!) ids, Tensor lengths, Tensor draft_ids, Tensor draft_lengths, Tensor limit, int vocab_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("greedy_ids(Tensor scores) -> Tensor")
_LIBRARY.define("draw(Tensor weights, Tensor uniforms) -> Tensor")
_LIBRARY.define(
    "verify(Tensor target_probs, Tensor draft_ids, Tensor? draft_probs, Tensor draft_lengths, Tensor uniforms)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "verify_block(Tensor target_probs, Tensor draft_ids, Tensor draft_probs, Tensor draft_lengths, Tensor uniforms)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "verify_greedy(Tensor scores, Tensor draft_ids, Tensor draft_lengths) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "commit(Tensor(a!) ids, Tensor(b!) lengths, Tensor end, Tensor(c!) finished, Tensor? stop_ids, Tensor limit,"
    " Tensor draft_ids, Tensor? draft_probs, Tensor draft_lengths, Tensor accepted, Tensor next_ids, Tensor overlap,"
    " Tensor is_broken, Tensor is_nan) -> Tensor"
)
_LIBRARY.define(
    "commit_greedy(Tensor scores, Tensor(a!) ids, Tensor(b!) lengths, Tensor end, Tensor(c!) finished,"
    " Tensor? stop_ids, Tensor limit, Tensor draft_ids, Tensor draft_lengths, Tensor is_broken)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")

# Declarations of shims.h: the arguments of each operator as torch's compiler passes them to a C function.
_WEIGHTS = "const TENSOR*, int64_t, const TENSOR*, int64_t, const int64_t*, int64_t, int32_t"  # int4_linear's
_SHIMS = {
    "int4_linear": f"TENSOR, {_WEIGHTS}, ...",
    "int8_linear": "TENSOR, TENSOR, TENSOR, int32_t, TENSOR*",
    "linear": "TENSOR, TENSOR, const TENSOR*, TENSOR*",
    "rms_norm": "TENSOR, TENSOR, double, TENSOR*",
    "add_rms_norm": "TENSOR, TENSOR, TENSOR, double, TENSOR*, TENSOR*",
    "cos_sin": "TENSOR, TENSOR*, TENSOR*",
    "attention": "TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, double, TENSOR*",
    "rotary_attention": f"{9 * 'TENSOR, '}double, TENSOR*",
    "attention_block": f"TENSOR, TENSOR, {_WEIGHTS}, {6 * 'TENSOR, '}double, TENSOR, double, TENSOR*, TENSOR*",
    "mlp_block": f"TENSOR, TENSOR, {_WEIGHTS}, TENSOR, double, TENSOR*, TENSOR*",
}

_LOADING = threading.Lock()
_IS_LOADED: bool | None = None  # None: not tried yet
_WARNED: list[str] = []  # reasons for which this process did not load the library


def load() -> bool:
    """Load the library: -> whether the operators work. Any process may have built it, for this CPU and PyTorch.

    The disk is searched once; a library that another process builds later is loaded by the next process.
    """
    global _IS_LOADED
    if _IS_LOADED is None:
        with _LOADING:
            if _IS_LOADED is None:
                try:
                    path = built_at()
                    _IS_LOADED = path.exists() and _loads(path)
                except OSError:  # no folder, or one that cannot be read
                    _IS_LOADED = False
    return _IS_LOADED


def works_on(device: torch.device) -> bool:
    """Whether the operators work on tensors of this device."""
    return device.type == "cpu" and (load() if _IS_LOADED is None else _IS_LOADED)


def _loads(path: Path) -> bool:
    try:
        reason = untrusted(path)
        if reason is None:
            ctypes.CDLL(str(path.resolve()), mode=ctypes.RTLD_GLOBAL)  # compiled packages call the functions of shims.h
            torch.ops.load_library(path.resolve())
            return True
    except OSError as error:
        reason = f"{path} does not load ({error}); delete it to build it again"
    if reason not in _WARNED:
        _WARNED.append(reason)
        warnings.warn(f"specdec's CPU kernels are not used: {reason}", stacklevel=3)
    return False


def build() -> None:
    """Build the library, in some twenty seconds, and load it.

    Raises RuntimeError where there is no compiler or it fails, OSError where the cache folder cannot be written or
    trusted.
    """
    global _IS_LOADED
    if load():
        return
    path = make_cache_folder() / built_at().name
    if not path.exists():
        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("no C++ compiler was found: neither $CXX nor g++ nor clang++ is on the PATH")
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch_folder = Path(torch.__file__).parent
        folders = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
        command = [compiler, *FLAGS, *folders, str(SOURCES[0]), "-o", str(unfinished), "-ltorch_cpu", "-lc10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.splitlines()
                errors = [line for line in lines if "error" in line] or lines or ["no reason given"]
                raise RuntimeError(f"{compiler} could not build {SOURCES[0].name}: {errors[0]}")
            unfinished.chmod(0o700)
            unfinished.replace(path)  # atomic
        finally:
            unfinished.unlink(missing_ok=True)
    _IS_LOADED = None
    if not load():
        raise RuntimeError(_WARNED[-1] if _WARNED else f"{path} is gone")


def find_compiler() -> str | None:
    """The path of the C++ compiler that builds the library: $CXX, g++ or clang++; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def c_shims() -> dict[torch._ops.OpOverload, list[str]]:
    """The C functions that torch's compiler may call for an operator, for `custom_ops_to_c_shims` of its settings.

    The library's symbols are seen by compiled packages on Linux alone.
    """
    if sys.platform != "linux":
        return {}
    return {
        getattr(torch.ops.specdec, name).default: [
            f"AOTITorchError aoti_torch_cpu_{name}({arguments.replace('TENSOR', 'AtenTensorHandle')})"
        ]
        for name, arguments in _SHIMS.items()
    }


def was_warned_of(error: Exception) -> bool:
    """Whether `load` has warned with the message of an error of `build`."""
    return str(error) in _WARNED


def cache_folder() -> Path:
    """The folder for compiled code: $SPECDEC_CACHE, else specdec in the user's cache folder. OSError without a home."""
    folder = os.environ.get("SPECDEC_CACHE")
    if folder:
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"
    except RuntimeError as error:  # a user without an entry in the user database and without $HOME
        raise OSError(f"there is no home folder for compiled code ({error}); set SPECDEC_CACHE to a folder") from error


def make_cache_folder() -> Path:
    """The cache folder, created if missing, for its owner alone. OSError if it cannot be written or trusted."""
    folder = cache_folder()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; delete it, or set SPECDEC_CACHE to a folder")
    if (reason := untrusted(folder)) is not None:
        raise PermissionError(reason)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to; set SPECDEC_CACHE to a folder that can")
    return folder


def untrusted(path: Path) -> str | None:
    """Why code must not be loaded from the cache folder or a file in it, None if it may. OSError if it is missing.

    Another user could have written it, unless it and every folder above it belong to this user or to root and nobody
    else may write there; in a folder with the sticky bit, such as /tmp, others cannot touch what is not theirs. POSIX
    only.
    """
    if os.name != "posix":
        return None
    path = Path(os.path.realpath(path))
    own_levels = 1 if path.is_dir() else 2  # the file and the cache folder: a sticky bit does not protect these
    for depth, level in enumerate((path, *path.parents)):
        status = os.stat(level)
        if status.st_uid not in (0, os.geteuid()):
            return f"{level} belongs to another user; remove it, or set SPECDEC_CACHE to a folder of your own"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (depth < own_levels or not status.st_mode & stat.S_ISVTX):
            return f"other users may write to {level}; chmod go-w it, or set SPECDEC_CACHE to a folder of your own"
    return None


def built_at() -> Path:
    """The library's path, whose name is a hash of everything that it depends on."""
    sources = (path.read_text(encoding="utf-8") for path in SOURCES)
    return cache_folder() / f"kernels-{fingerprint(*sources)}.so"


def fingerprint(*parts: str) -> str:
    """A hash of the code to compile, the machine, and the PyTorch that it is compiled for."""
    text = "\n".join([*parts, torch.__version__, sys.version, platform.machine(), _cpu(), " ".join(FLAGS)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cpu() -> str:
    """The CPU's model and features on Linux, its name elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(features))) or platform.processor()


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes 0 … 15 [N, K], scale [N, K/G], zero [N, K/G] or None (8) -> packed and scale for specdec::int4_linear.

    packed: int32 [N'/64, K/8, 64], eight codes of a row of W in a word, the first in its lowest bits; N' is N padded to
    whole blocks of 64. scale: [1, N'/64, K/G, 64], or [2, N'/64, K/G, 64] with 8 - zero as the second; in 16 bits if
    the scale has them, else float32.
    """
    padding = -codes.shape[0] % BLOCK
    blocks = F.pad(codes, (0, 0, 0, padding)).view(-1, BLOCK, codes.shape[1] // WORD, WORD).int()
    words = torch.zeros(blocks.shape[:3], dtype=torch.int32, device=codes.device)
    for i in range(WORD):
        words |= blocks[..., i] << 4 * i
    parts = [scale.float()] if zero is None else [scale.float(), SYMMETRIC_ZERO - zero.float()]
    dtype = scale.dtype if scale.dtype in (torch.bfloat16, torch.float16) else torch.float32
    scales = torch.stack([F.pad(part, (0, 0, 0, padding)).view(-1, BLOCK, part.shape[1]).mT for part in parts])
    words, scales = words.transpose(1, 2).contiguous(), scales.to(dtype).contiguous()
    is_on_cpu = codes.device.type == "cpu" and load()
    return (in_huge_pages(words), in_huge_pages(scales)) if is_on_cpu else (words, scales)


def in_huge_pages(x: Tensor) -> Tensor:
    """A contiguous copy of x on the CPU, in large pages where Linux gives them, which are read faster."""
    y: Tensor = torch.ops.specdec.in_huge_pages(x)
    return y


def unpack(packed: Tensor) -> Tensor:
    """packed [N'/64, K/8, 64] -> codes 0 … 15, uint8 [N', K]."""
    packed_bytes = packed.view(torch.uint8).unflatten(-1, (BLOCK, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.stack((packed_bytes & 15, packed_bytes >> 4), dim=-1).flatten(-2)


@library.register_fake("specdec::int4_linear", lib=_LIBRARY)
def _(x: Tensor, packed: list[Tensor], scales: list[Tensor], columns: list[int], int8_inputs: bool) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], count) for count in columns]


@library.register_fake("specdec::int8_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, scale: Tensor, int8_inputs: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@library.register_fake("specdec::linear", lib=_LIBRARY)
@library.register_fake("specdec::torch_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@library.register_fake("specdec::mean", lib=_LIBRARY)
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1)


@library.register_fake("specdec::rms_norm", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@library.register_fake("specdec::add_rms_norm", lib=_LIBRARY)
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@library.register_fake("specdec::rotary_attention", lib=_LIBRARY)
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    intervals: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(*positions.shape, query.shape[2] // keys.shape[3] * values.shape[3])


@library.register_fake("specdec::attention_block", lib=_LIBRARY)
@library.register_fake("specdec::mlp_block", lib=_LIBRARY)
def _(x: Tensor, residual: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@library.register_fake("specdec::cos_sin", lib=_LIBRARY)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@library.register_fake("specdec::softmax", lib=_LIBRARY)
def _(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.softmax(x, dim, dtype)


@library.register_fake("specdec::sum", lib=_LIBRARY)
def _(x: Tensor, dim: list[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.sum(x, dim, keepdim, dtype=dtype)


@library.register_fake("specdec::cos", lib=_LIBRARY)
@library.register_fake("specdec::sin", lib=_LIBRARY)
@library.register_fake("specdec::tanh", lib=_LIBRARY)
@library.register_fake("specdec::gelu", lib=_LIBRARY)
@library.register_fake("specdec::layer_norm", lib=_LIBRARY)
def _(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)
