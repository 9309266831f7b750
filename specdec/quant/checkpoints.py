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
from collections.abc import Callable, Mapping, Sequence
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

from specdec.quant.experts import PROJECTIONS
from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor, pack, unpack
from specdec.quant.quantizer import METHOD, Int4Config, linear_layers, named_parts, shape_of, some, tied_weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of eight lies in nibble AWQ_ORDER[i] of its word
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
AGAIN = "the checkpoint is damaged or incomplete, so download it again"


def load_quantized(path: str | Path, config: Int4Config | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint, its 4-bit weights as they are; one in full precision is quantized by `config` while loading.

    path: a local folder, or a hub id; only safetensors are read. kwargs go to from_pretrained; the dtype (of all but the 4-bit
    weights) is the checkpoint's own unless given. Raises ValueError, naming file or tensor, where the checkpoint is damaged, or
    not of a format that is read. Experts that the model has in one tensor are dequantized, but for MXFP4's; a warning says so.
    """
    for name in ("state_dict", "quantization_config", "output_loading_info"):
        if name in kwargs:
            advice = "give an Int4Config as config=…" if name == "quantization_config" else "use from_pretrained for that"
            raise ValueError(f"load_quantized() takes no {name}; {advice}")
    folder = _folder(path, {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs})
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype or "auto"
    code = {"trust_remote_code": kwargs.pop("trust_remote_code", None)}
    model_config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **code, **kwargs)
    settings = settings_of(folder, model_config)
    files = _tensor_files(folder)
    method = settings.get("quant_method") if settings is not None else None
    if settings is not None and config is not None:
        raise ValueError(f"{folder} is quantized already, by {method}; leave config out, or take the original")
    if settings is None or method == METHOD:
        if settings is None:
            kwargs["quantization_config"] = config or Int4Config()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **code, **kwargs)
        return _complete(folder, loaded)
    scheme = scheme_of(settings)
    del model_config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), **code)
    dtype = _dtype(dtype, model_config, files)
    tensors = _convert(files, scheme, skeleton, dtype)
    plain = [name for name in linear_layers(skeleton) if f"{name}.weight_scale" not in tensors]
    int4_config = Int4Config(scheme.group_sizes[0], scheme.symmetric, plain)
    int4_config.tensors = {name: value.to("meta") for name, value in tensors.items()}
    model_config.quantization_config = int4_config
    rest |= {"dtype": dtype, "output_loading_info": True}
    model = _complete(folder, type(skeleton).from_pretrained(None, config=model_config, state_dict=tensors, **rest))
    model.name_or_path = model.config.name_or_path = str(folder)
    if "generation_config" not in rest and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_as_it_is(path: str | Path, *, trust_remote_code: bool | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint, in the precision that it comes in: 4 bits where it is quantized, full precision where not.

    trust_remote_code: whether code of the checkpoint's own may run; None: transformers asks on the terminal.
    """
    kwargs["trust_remote_code"] = trust_remote_code
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    is_quantized = getattr(config, "quantization_config", None) is not None
    load: Any = load_quantized if is_quantized else AutoModelForCausalLM.from_pretrained
    model: PreTrainedModel = load(path, **kwargs)
    return model


def _folder(path: str | Path, hub: dict[str, Any]) -> Path:
    """The checkpoint's folder; a hub id is downloaded, or found in the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"], **hub))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{str(path)!r} is no folder here and cannot be had from the hub: {error}") from error


def settings_of(folder: Path, config: Any) -> dict[str, Any] | None:
    """What the checkpoint says of its quantization; AutoGPTQ once said it in a file of its own."""
    settings = getattr(config, "quantization_config", None)
    beside = folder / "quantize_config.json"
    if settings is None and beside.is_file():
        config.quantization_config = settings = {"quant_method": "gptq"} | json.loads(beside.read_text())
    return None if settings is None else dict(settings)


def _dtype(dtype: Any, config: Any, files: Mapping[str, Any]) -> Any:
    """The dtype that was asked for; for "auto" the one that config.json has, else that of a plain weight."""
    if dtype == "auto":
        plain = (file.get_tensor(name).dtype for name, file in files.items() if name.endswith(".weight"))
        dtype = config.dtype or next((found for found in plain if found in FLOATS), torch.bfloat16)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _complete(folder: Path, loaded: Any) -> PreTrainedModel:
    """The model as it was loaded, if nothing was missing; transformers would fill that with random numbers and go on."""
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {some(sorted(info['missing_keys']))}; {AGAIN}")
    return model


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
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{index} is no index of safetensors files ({error!r}); {AGAIN}") from error
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
