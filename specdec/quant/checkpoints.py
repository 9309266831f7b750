"""Quantized checkpoints as others write them -> models in the canonical 4-bit form.

Read are GPTQ, AWQ (gemm), compressed-tensors (pack-quantized), MXFP4 (gpt_oss) and our own. Codes, scales and zero points are
taken over as they are, only their layout changes: in the scales' dtype the weights are bit for bit those of the format's own
library.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.quant.experts import PROJECTIONS
from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor, pack, unpack
from specdec.quant.quantizer import METHOD, Int4Config, linear_layers, named_parts, shape_of, some, tied_weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of eight lies in nibble AWQ_ORDER[i] of its word
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
HUB_CONFIGS = ["config.json", "generation_config.json", "quantize_config.json", "hf_quant_config.json", "*.py"]
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
AGAIN = "the checkpoint is damaged or incomplete, so download it again"
# Tensors that a model may lack a place for: masks, positions and frequencies that old checkpoints hold and today's code computes,
# and the parts of a multimodal checkpoint that its text model leaves out.
LEFT_OUT = re.compile(
    r"(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|causal_mask)|position_ids|embed_positions\.weights)$"
    r"|(^|\.)(vision|visual|audio|multi_modal)\w*\."
)


def load_quantized(path: str | Path, config: Int4Config | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint, its 4-bit weights as they are; one in full precision is quantized by `config` while loading.

    path: a local folder, or a hub id; of quantized checkpoints only safetensors are read. kwargs go to from_pretrained, those of
    the hub and `subfolder` too; the dtype (of all but the 4-bit weights) is the checkpoint's own unless given. Raises ValueError,
    naming path and file or tensor, where the checkpoint is damaged, does not fit its config.json, or is not of a format that is
    read. Experts that the model has in one tensor are dequantized, but for MXFP4's; a warning says so.
    """
    return load_checkpoint(path, config, default=Int4Config(), **kwargs)


def load_checkpoint(
    path: str | Path,
    config: Int4Config | None = None,
    *,
    default: Int4Config | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model of a checkpoint in the precision that it comes in; arguments and errors are those of load_quantized().

    config: quantizes a checkpoint in full precision; one that is quantized already is refused. default: the same where config is
    None, and without effect on a quantized one. device: where the model is moved.
    """
    for name in ("state_dict", "quantization_config", "output_loading_info", "ignore_mismatched_sizes"):
        if name in kwargs:
            advice = "give an Int4Config as config=…" if name == "quantization_config" else "use from_pretrained for that"
            raise ValueError(f"load_quantized() takes no {name}; {advice}")
    hub = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, "subfolder") if name in kwargs}
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype or "auto"
    with named_errors(f"no model could be loaded from {str(path)!r}"):
        folder = config_folder(path, hub)
        model_config, settings, rest = read_config(folder, **kwargs)
        method = None if settings is None else settings.get("quant_method")
        if settings is not None and config is not None:
            raise ValueError(f"it is quantized already, by {method}; leave config out, or take the original")
        if settings is not None and method != METHOD:
            code = kwargs.get("trust_remote_code")
            model, info = _load_format(_folder(path, hub, HUB_FILES), model_config, settings, dtype, code, rest)
        else:
            is_local = Path(path).is_dir()
            if is_local and (settings is not None or any(folder.glob("*.safetensors*"))):
                _tensor_files(folder)
            if settings is None and (config or default):
                kwargs["quantization_config"] = config or default
            source, place = (folder, {}) if is_local else (str(path), hub)
            arguments = LOADING | {"dtype": dtype} | place | kwargs
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
            model, info = loaded
        _check_complete(info)
        return model if device is None else model.to(device)


LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not fit is refused here, by name


def _load_format(
    folder: Path, config: Any, settings: dict[str, Any], dtype: Any, trust_remote_code: bool | None, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The model of a checkpoint of another library's format, and what transformers says of its loading."""
    scheme = scheme_of(settings)
    files = _tensor_files(folder)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    dtype = _dtype(dtype, config, files)
    tensors = _convert(files, scheme, skeleton, dtype)
    plain = [name for name in linear_layers(skeleton) if f"{name}.weight_scale" not in tensors]
    int4_config = Int4Config(scheme.group_sizes[0], scheme.symmetric, plain)
    int4_config.tensors = {name: value.to("meta") for name, value in tensors.items()}
    config.quantization_config = int4_config
    arguments = LOADING | {"dtype": dtype} | kwargs
    model, info = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, **arguments)
    model.name_or_path = model.config.name_or_path = str(folder)
    if "generation_config" not in kwargs and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Whatever fails within, in our code or another library's, is a ValueError: `what` was not done, and why, in one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, ValueError | OSError | ImportError) and reason else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, naming the file, where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object, but {str(content)[:40]!r}; {AGAIN}")
    return content


def config_folder(path: str | Path, hub: Mapping[str, Any] | None = None) -> Path:
    """The folder with a checkpoint's config. hub: `subfolder`, and from_pretrained's arguments for a hub id."""
    return _folder(path, hub or {}, HUB_CONFIGS)


def read_config(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, Any] | None, dict[str, Any]]:
    """-> a checkpoint's config without its quantization; that, or None; what of kwargs is no part of a config."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no config.json in {folder}; name a folder that save_pretrained wrote")
    if not isinstance(read_json(file).get("quantization_config"), dict | None):
        raise ValueError(f"the quantization_config in {file} is no JSON object; {AGAIN}")
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)  # transformers would go on without it
    with named_errors(f"{file} cannot be used"):
        config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    settings = settings_of(config)
    if settings is None:
        settings = _settings_beside(folder)
    else:
        del config.quantization_config
    return config, settings, rest


def settings_of(config: Any) -> dict[str, Any] | None:
    """What a config says of its model's quantization, None where it says nothing."""
    settings = getattr(config, "quantization_config", None)
    return settings.to_dict() if isinstance(settings, QuantizationConfigMixin) else settings


def _settings_beside(folder: Path) -> dict[str, Any] | None:
    """The same from a file of its own, where AutoGPTQ and ModelOpt once had it."""
    if (file := folder / "quantize_config.json").is_file():
        return {"quant_method": "gptq"} | read_json(file)
    if (file := folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"} | read_json(file)
    return None


def _folder(path: str | Path, hub: Mapping[str, Any], files: list[str]) -> Path:
    """The folder that has a checkpoint's files; those of a hub id are downloaded, or found in the cache."""
    subfolder = hub.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path, subfolder)
    inside = f"{subfolder}/" if subfolder else ""
    place = {name: value for name, value in hub.items() if name != "subfolder"}
    place |= {"allow_patterns": [inside + name for name in files], "ignore_patterns": [f"{inside}*/*", f"{inside}consolidated*"]}
    try:
        return Path(snapshot_download(str(path), **place), subfolder)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"it is no folder here and cannot be had from the hub: {reason}") from error


def _dtype(dtype: Any, config: Any, files: Mapping[str, Any]) -> Any:
    """The dtype that was asked for; for "auto" the one that config.json has, else that of a plain weight."""
    if dtype == "auto":
        plain = (file.get_tensor(name).dtype for name, file in files.items() if name.endswith(".weight"))
        dtype = config.dtype or next((found for found in plain if found in FLOATS), torch.bfloat16)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _check_complete(info: Mapping[str, Any]) -> None:
    """Raise where tensors and model did not fit; transformers fills what is missing with random numbers and goes on."""
    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not LEFT_OUT.search(name))
    misshapen = [
        f"{name} {list(found)} where the model has {list(here)}" for name, found, here in sorted(info["mismatched_keys"])
    ]
    found = [f"lacks {some(missing)}"] * bool(missing)
    found += [f"has {some(unexpected)}, which the model has no place for"] * bool(unexpected)
    found += [f"has {some(misshapen)} in another shape"] * bool(misshapen)
    if found:
        advice = "is config.json its own, with the quantization_config that it may need?" if found[1:] or not missing else AGAIN
        raise ValueError(f"the checkpoint {'; it '.join(found)}; {advice}")


@dataclass(frozen=True)
class Layer:
    """The tensors of one quantized layer, by the ends of their names; each is checked when it is taken."""

    name: str
    tensors: Mapping[str, Tensor]

    def take(self, suffix: str, dtypes: Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """One tensor; None in its shape stands for any number."""
        value = self.tensors.get(suffix)
        if value is None:
            raise ValueError(f"there is no {self.name}{suffix} beside {self.name}{min(self.tensors)}; {AGAIN}")
        fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
        if not fits or value.dtype not in dtypes:
            expected = f"{' or '.join(map(str, dtypes))} [{', '.join('any' if size is None else str(size) for size in shape)}]"
            raise ValueError(f"{self.name}{suffix} is {value.dtype} {list(value.shape)}, but must be {expected}; {AGAIN}")
        return value

    def groups(self, scheme: Scheme, suffix: str, columns: int, dim: int) -> int:
        """How many groups the scales at `suffix` have along `dim`, as the scheme has it for so many columns."""
        counts = {1 if size == -1 else columns // size for size in scheme.group_sizes if size == -1 or columns % size == 0}
        if not counts or columns % 2:
            raise ValueError(
                f"{self.name} has {columns} input columns, which group_size={scheme.group_sizes[0]} does not divide; a last group"
                f" of another width is not supported, so quantize the original with one of {GROUP_SIZES} that divides them"
            )
        found = self.take(suffix, FLOATS, None, None).shape[dim]
        if found not in counts:
            raise ValueError(
                f"{self.name}{suffix} has {found} groups, but {columns} input columns in groups of {scheme.group_sizes[0]}"
                f" make {min(counts)}; is group_size in the checkpoint's config right?"
            )
        return found

    def ordered(self, suffix: str, weight: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """Canonical codes [N, K/2] and perm: columns by the group that `suffix` gives each, where that is not their own order."""
        columns = 2 * weight.shape[1]
        group = self.take(suffix, (torch.int32, torch.int64), columns).long()
        inside = ((group >= 0) & (group < groups)).all()
        if not inside or (group.bincount(minlength=groups) != columns // groups).any():
            raise ValueError(
                f"{self.name}{suffix} must put {columns // groups} input columns into each of {groups} groups, and it does not;"
                " uneven groups are not supported, so quantize the original again"
            )
        perm = group.argsort(stable=True)
        if perm.equal(torch.arange(columns)):
            return weight, None
        return pack(unpack(weight)[:, perm]), perm.int()


@dataclass(frozen=True)
class Scheme:
    """A checkpoint's format. group_sizes: -1 for a whole row; several where the config has several groups of layers."""

    suffixes: tuple[str, ...]
    read: Callable[[Layer, Scheme], Int4Tensor]
    group_sizes: tuple[int, ...]
    symmetric: bool
    version: str = ""
    act_order: bool = False


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """The format that a quantization_config tells of; ValueError where it is not read."""
    method = settings.get("quant_method")
    known = {"gptq": _gptq_scheme, "awq": _awq_scheme, "compressed-tensors": _compressed_scheme, "mxfp4": _mxfp4_scheme}
    if not isinstance(method, str) or method not in known:
        raise ValueError(
            f"a checkpoint with quant_method={method!r} cannot be read, only {', '.join(map(repr, known))}, {METHOD!r} and full"
            " precision can; load the original, which is quantized on the way"
        )
    scheme = known[method](settings)
    for size in scheme.group_sizes:
        _require(method, {"group_size": size}, group_size=GROUP_SIZES)
    return scheme


def _require(method: str, settings: Mapping[str, Any], **wanted: Sequence[Any]) -> None:
    """Each setting must have one of its wanted values; the first is the default."""
    for name, values in wanted.items():
        value = settings.get(name, values[0])
        if value not in values:
            choice = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"this {method} checkpoint has {name}={value!r}; only {choice} can be read")


def _gptq_scheme(settings: Mapping[str, Any]) -> Scheme:
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    _require("gptq", {"checkpoint_format": version}, checkpoint_format=("gptq", "gptq_v2"))
    _require("gptq", {"bits": None} | dict(settings), bits=(4,), pack_dtype=("int32",), is_marlin_format=(False, None))
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    sizes = (settings.get("group_size", -1),)
    return Scheme(suffixes, _gptq, sizes, bool(settings.get("sym")), version, bool(settings.get("desc_act")))


def _gptq(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """qweight [K/8, N] and qzeros [K/G, N/8], eight nibbles a word; scales [K/G, N]; g_idx [K], the group of each column."""
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = 8 * qweight.shape[0], qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOATS, groups, rows)
    qzeros = layer.take(".qzeros", (torch.int32,), groups, -(-rows // 8))
    zero = _nibbles(qzeros)[:, :rows]
    if scheme.version == "gptq":  # v1 stores them less one
        zero = (zero + 1) & 15
    # There are checkpoints with v2's zero points under v1's name; where all is symmetric, only one zero point can be meant.
    if scheme.symmetric and (zero == zero[0, 0]).all() and abs(int(zero[0, 0]) - SYMMETRIC_ZERO) == 1:
        zero = torch.full_like(zero, SYMMETRIC_ZERO)
    weight, perm = _bytes(qweight.T), None
    if scheme.act_order or ".g_idx" in layer.tensors:
        weight, perm = layer.ordered(".g_idx", weight, groups)
    return Int4Tensor(weight, scales.T.contiguous(), _zero(zero.T), perm)


def _awq_scheme(settings: Mapping[str, Any]) -> Scheme:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    _require("awq", {"version": version}, version=("gemm",))
    _require("awq", {"bits": None} | dict(settings), bits=(4,), backend=("autoawq", "auto", None))
    symmetric = settings.get("zero_point") is False
    return Scheme((".qweight", ".qzeros", ".scales"), _awq, (settings.get("group_size", -1),), symmetric)


def _awq(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """qweight [K, N/8] and qzeros [K/G, N/8], eight nibbles a word in AWQ_ORDER; scales [K/G, N]."""
    qweight = layer.take(".qweight", (torch.int32,), None, None)
    columns, rows = qweight.shape[0], 8 * qweight.shape[1]
    groups = layer.groups(scheme, ".scales", columns, 0)
    scales = layer.take(".scales", FLOATS, groups, rows)
    zero = None
    if not scheme.symmetric or ".qzeros" in layer.tensors:
        qzeros = layer.take(".qzeros", (torch.int32,), groups, rows // 8)
        zero = _nibbles(qzeros).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
    codes = _nibbles(qweight).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
    return Int4Tensor(pack(codes), scales.T.contiguous(), _zero(zero))


def _compressed_scheme(settings: Mapping[str, Any]) -> Scheme:
    method = "compressed-tensors"
    _require(method, settings, format=("pack-quantized",), kv_cache_scheme=(None, {}))
    _require(method, settings.get("sparsity_config") or {}, format=("dense",))
    _require(method, settings.get("transform_config") or {}, config_groups=({},))
    groups = list((settings.get("config_groups") or {}).values())
    if not groups:
        raise ValueError("this compressed-tensors checkpoint has no config_groups, so nothing says how its weights lie")
    for group in groups:
        _require(method, group, format=("pack-quantized", None), input_activations=(None,), output_activations=(None,))
        _require(method, group.get("weights") or {"num_bits": None}, num_bits=(4,), type=("int",), strategy=("group", "channel"))
    weights = [group["weights"] for group in groups]
    sizes = {(args.get("group_size") if args.get("strategy") == "group" else -1): None for args in weights}
    symmetric = {bool(args.get("symmetric", True)) for args in weights}
    act_order = {args.get("actorder") in ("group", "dynamic", True) for args in weights}
    if len(symmetric) > 1 or len(act_order) > 1:
        raise ValueError(f"this {method} checkpoint has config_groups that differ in symmetric or actorder; that is not read")
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
    return Scheme(suffixes, _compressed, tuple(sizes), symmetric.pop(), act_order=act_order.pop())


def _compressed(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """weight_packed [N, K/8], eight nibbles a word; weight_scale [N, K/G]; weight_zero_point [N/8, K/G], packed along N."""
    rows, columns = layer.take(".weight_shape", (torch.int64, torch.int32), 2).tolist()
    packed = layer.take(".weight_packed", (torch.int32,), rows, -(-columns // 8))
    groups = layer.groups(scheme, ".weight_scale", columns, 1)
    scale = layer.take(".weight_scale", FLOATS, rows, groups)
    zero = None
    if not scheme.symmetric or ".weight_zero_point" in layer.tensors:
        if layer.tensors.get(".weight_zero_point", packed).dtype == torch.int8:  # early versions did not pack it
            zero = (layer.take(".weight_zero_point", (torch.int8,), rows, groups) + SYMMETRIC_ZERO).to(torch.uint8)
        else:
            zero = _nibbles(layer.take(".weight_zero_point", (torch.int32,), -(-rows // 8), groups).T)[:, :rows].T
    weight, perm = _bytes(packed)[:, : columns // 2], None
    unset = (layer.tensors.get(".weight_g_idx", torch.tensor(0)) == -1).all()
    if (scheme.act_order or ".weight_g_idx" in layer.tensors) and not unset:
        weight, perm = layer.ordered(".weight_g_idx", weight, groups)
    return Int4Tensor(weight.contiguous(), scale, _zero(zero), perm)


def _mxfp4_scheme(settings: Mapping[str, Any]) -> Scheme:
    return Scheme(("_blocks", "_scales"), _mxfp4, (32,), True)


def _mxfp4(layer: Layer, scheme: Scheme) -> Int4Tensor:
    """blocks [E, N, K/32, 16], the even column in the low nibble; scales [E, N, K/32], exponents of two plus 127."""
    blocks = layer.take("_blocks", (torch.uint8,), None, None, None, 16)
    scales = layer.take("_scales", (torch.uint8,), *blocks.shape[:3])
    codebook = torch.tensor(FP4_VALUES + [-value for value in FP4_VALUES])
    return Int4Tensor(blocks.flatten(-2), scales.view(torch.float8_e8m0fnu), codebook=codebook)


def _bytes(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., 4 W], the lowest byte first: words of eight nibbles, lowest first, are canonical codes."""
    return words.contiguous().view(torch.uint8)


def _nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] -> their nibbles, the lowest first, uint8 [..., 8 W]."""
    return unpack(_bytes(words))


def _zero(zero: Tensor | None) -> Tensor | None:
    """Zero points, None where all of them are the symmetric one."""
    return None if zero is None or (zero == SYMMETRIC_ZERO).all() else zero.contiguous()


def _tensor_files(folder: Path) -> dict[str, Any]:
    """The open file of each tensor; raises where there are no safetensors, or one cannot be read or is not as the index says."""
    files = sorted(folder.glob("*.safetensors"))
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    listed = {}
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} is no index of safetensors files (no weight_map with a file for each tensor); {AGAIN}")
        listed = {name: folder / Path(file).name for name, file in weight_map.items()}
        if missing := [file.name for file in sorted(set(listed.values())) if file not in files]:
            raise ValueError(f"{index.name} names {some(missing)}, which is not in {folder}; {AGAIN}")
        files = sorted(set(listed.values()))
    elif folder / "model.safetensors" in files:
        files = [folder / "model.safetensors"]
    elif len(files) > 1:
        raise ValueError(f"{folder} has several safetensors files and no index; {AGAIN}")
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")):
        raise ValueError(
            f"{folder} has only {some(pickles)}; a pickle can run code and is not read, so convert it to safetensors"
        )
    elif not files:
        raise ValueError(f"{folder} has no weights, no *.safetensors; {AGAIN}")
    found: dict[str, Any] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); {AGAIN}") from error
        found |= dict.fromkeys(opened.keys(), opened)
    if missing := sorted(listed.keys() - found.keys()):
        raise ValueError(f"{listed[missing[0]].name} has no {some(missing)}, where the index names it; {AGAIN}")
    return found


def _convert(files: Mapping[str, Any], scheme: Scheme, skeleton: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's tensors, the quantized ones in canonical form under the model's own names; one layer is read at a time.

    skeleton: the model on meta. What is quantized where it has no linear layer becomes a plain weight of that dtype, under the
    checkpoint's name, for transformers to merge.
    """
    layers: dict[str, dict[str, str]] = {}
    plain = []
    for name in files:
        suffix = next((suffix for suffix in scheme.suffixes if name.endswith(suffix)), None)
        if suffix is None:
            plain.append(name)
        else:
            layers.setdefault(name.removesuffix(suffix), {})[suffix] = name
    place = _placing(skeleton)
    linears, expected = linear_layers(skeleton), skeleton.state_dict()
    tensors: dict[str, Tensor] = {}
    dequantized, ignored = [], []
    for name, parts in layers.items():
        int4 = scheme.read(Layer(name, {suffix: files[part].get_tensor(part) for suffix, part in parts.items()}), scheme)
        if not int4.scale.float().isfinite().all():
            raise ValueError(f"the scales of {name} have NaN or infinite values; {AGAIN}")
        key, merged = place(f"{name}.weight")
        module = key.removesuffix(".weight")
        if int4.codebook is not None:
            tensors |= _expert_parts(name, int4, expected)
        elif module in linears and not merged:
            there, found = list(shape_of(linears[module])), [int4.weight.shape[0], 2 * int4.weight.shape[1]]
            if there != found:
                raise ValueError(f"{name}{scheme.suffixes[0]} is of a weight {found}, but this model has {there} there")
            if key in tied_weights(skeleton):
                raise ValueError(f"{name} is quantized, but config.json ties it to the embedding; untie them there")
            tensors |= named_parts(module, int4)
        elif key in expected:
            tensors[f"{name}.weight"] = int4.dequantize(dtype)
            dequantized.append(name)
        elif any(re.search(pattern, key) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()):
            ignored.append(name)
        else:
            raise ValueError(f"the checkpoint has 4-bit parts for {name}, where this model has no layer; is config.json its own?")
    for name in plain:
        value = files[name].get_tensor(name)
        key, merged = place(name)
        if key in expected and not merged and (value.shape != expected[key].shape or not value.is_floating_point()):
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, but this model has {list(expected[key].shape)} there")
        layer = name.removesuffix(".bias")
        if key in expected or layer == name or layer not in layers:
            tensors[name] = value
        elif layer not in ignored and value.any():  # AutoGPTQ wrote a bias of zeros for every layer
            raise ValueError(f"the checkpoint has a bias {name}, this model has none there; is config.json the checkpoint's?")
    if dequantized:
        why = "transformers has them with others in one tensor, which is no linear layer"
        warnings.warn(f"specdec keeps in full precision: {some(dequantized)} ({why})", stacklevel=3)
    return tensors


def _placing(model: Any) -> Callable[[str], tuple[str, bool]]:
    """A function from a checkpoint's name to the model's own, as transformers makes it, and whether it is merged with others."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()

    def place(name: str) -> tuple[str, bool]:
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if key not in expected and name in expected:
            return name, False
        return key, pattern is not None

    return place


def _expert_parts(name: str, int4: Int4Tensor, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of an expert projection [E, N, K] under the names that Int4Experts gives them."""
    found = [*int4.weight.shape[:2], 2 * int4.weight.shape[2]]
    there = expected.get(name)
    if there is None or name.rpartition(".")[2] not in PROJECTIONS:
        raise ValueError(f"{name}_blocks has no place in this model; MXFP4 is read for gpt_oss")
    if [there.shape[0], there.shape[2], there.shape[1]] != found:
        raise ValueError(f"{name}_blocks is of experts {found}, but this model has {list(there.mT.shape)} there")
    assert int4.codebook is not None
    return {name: int4.weight, f"{name}_scale": int4.scale, f"{name}_codebook": int4.codebook}
