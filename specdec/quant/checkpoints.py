"""Quantized checkpoints as others write them -> models in the canonical 4-bit form.

The formats are in specdec/quant/formats, and our own in quantizer.py. Codes, scales and zero points are taken over as they are,
only their layout changes: in the scales' dtype the weights are bit for bit those of the format's own library.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.quant.activations import SCALE
from specdec.quant.experts import PROJECTIONS
from specdec.quant.formats import scheme_of
from specdec.quant.formats.layer import AGAIN, FLOATS, Layer, Scheme
from specdec.quant.int4 import Int4Tensor
from specdec.quant.quantizer import (
    METHOD,
    Int4Config,
    check_activation_scale,
    linear_layers,
    named_parts,
    placing,
    shape_of,
    some,
    tied_weights,
    warn_of_full_precision,
)

# Where some writers put what config.json lacks, and the method that it is of.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
HUB_CONFIGS = ["config.json", "generation_config.json", *SETTINGS_FILES, "*.py"]
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
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
    read. Experts that the model has in one tensor, but for MXFP4's, and layers of 2 or 8 bits are dequantized; a warning says so.
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
            advice = (
                "give an Int4Config as config=…" if name == "quantization_config" else "use from_pretrained for that"
            )
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
    folder: Path,
    config: Any,
    settings: dict[str, Any],
    dtype: Any,
    trust_remote_code: bool | None,
    kwargs: dict[str, Any],
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
    content = read_json(file)
    for part in (
        content,
        *(value for value in content.values() if isinstance(value, dict)),
    ):  # at the top or in text_config
        if not isinstance(part.get("quantization_config"), dict | None):
            raise ValueError(f"the quantization_config in {file} is no JSON object; {AGAIN}")
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)  # transformers would go on without it
    with named_errors(f"{file} cannot be used"):
        config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    settings = take_settings(config)
    return config, settings if settings is not None else _settings_beside(folder), rest


def take_settings(config: Any) -> dict[str, Any] | None:
    """Take out of a config what it says of its model's quantization, at its top or in its text model's part; None: nothing."""
    found = [part.__dict__.pop("quantization_config", None) for part in (config, config.get_text_config(decoder=True))]
    settings: Any = next((settings for settings in found if settings is not None), None)
    return settings.to_dict() if isinstance(settings, QuantizationConfigMixin) else settings


def _settings_beside(folder: Path) -> dict[str, Any] | None:
    """The same from a file of its own, where early writers had it."""
    for name, method in SETTINGS_FILES.items():
        if (file := folder / name).is_file():
            return {"quant_method": method} | read_json(file)
    return None


def _folder(path: str | Path, hub: Mapping[str, Any], files: list[str]) -> Path:
    """The folder that has a checkpoint's files; those of a hub id are downloaded, or found in the cache."""
    subfolder = hub.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path, subfolder)
    inside = f"{subfolder}/" if subfolder else ""
    place = {name: value for name, value in hub.items() if name != "subfolder"}
    place |= {
        "allow_patterns": [inside + name for name in files],
        "ignore_patterns": [f"{inside}*/*", f"{inside}consolidated*"],
    }
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
        f"{name} {list(found)} where the model has {list(here)}"
        for name, found, here in sorted(info["mismatched_keys"])
    ]
    found = [f"lacks {some(missing)}"] * bool(missing)
    found += [f"has {some(unexpected)}, which the model has no place for"] * bool(unexpected)
    found += [f"has {some(misshapen)} in another shape"] * bool(misshapen)
    if found:
        advice = (
            "is config.json its own, with the quantization_config that it may need?"
            if found[1:] or not missing
            else AGAIN
        )
        raise ValueError(f"the checkpoint {'; it '.join(found)}; {advice}")


def _tensor_files(folder: Path) -> dict[str, Any]:
    """The open file of each tensor; raises where there are no safetensors, or one cannot be read or is not as the index says."""
    files = sorted(folder.glob("*.safetensors"))
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    listed = {}
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(
                f"{index} is no index of safetensors files (no weight_map with a file for each tensor); {AGAIN}"
            )
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

    skeleton: the model on meta. What is quantized where it has no linear layer, or in other than 4 bits, becomes a plain weight
    of that dtype, under the checkpoint's name, for transformers to merge.
    """
    layers: dict[str, dict[str, str]] = {}
    plain = []
    for name in files:
        suffix = next((suffix for suffix in scheme.suffixes if name.endswith(suffix)), None)
        if suffix is None:
            plain.append(name)
        else:
            layers.setdefault(name.removesuffix(suffix), {})[suffix] = name
    place = placing(skeleton)
    linears, expected = linear_layers(skeleton), skeleton.state_dict()
    tensors: dict[str, Tensor] = {}
    dequantized: dict[str, list[str]] = {}  # by reason
    ignored = []
    for name, parts in layers.items():
        layer = Layer(name, {suffix: files[part].get_tensor(part) for suffix, part in parts.items()})
        key, merged = place(f"{name}.weight")
        linear = None if merged else linears.get(key.removesuffix(".weight"))
        if scheme.has_activation_scales and parts.keys() == {".scales"} and linear is None:
            tensors[f"{name}.{SCALE}"] = _activation_scale(skeleton, parts[".scales"], layer.tensors[".scales"])
            continue
        own = scheme.of(name)
        if own is None:
            raise ValueError(
                f"{name} has quantized tensors, but the checkpoint's config leaves it in full precision; {AGAIN}"
            )
        weight = own.read(layer, own)
        if not (weight.scale.float() if isinstance(weight, Int4Tensor) else weight).isfinite().all():
            raise ValueError(f"the scales of {name} have NaN or infinite values; {AGAIN}")
        if isinstance(weight, Int4Tensor) and weight.codebook is not None:
            tensors |= _expert_parts(name, weight, expected)
        elif linear is not None:
            found, there = list(weight.shape), list(shape_of(linear))
            if there != found:
                raise ValueError(f"{name}{scheme.suffixes[0]} is of a weight {found}, but this model has {there} there")
            if key in tied_weights(skeleton):
                raise ValueError(f"{name} is quantized, but config.json ties it to the embedding; untie them there")
            if isinstance(weight, Int4Tensor):
                tensors |= named_parts(key.removesuffix(".weight"), weight)
            else:
                tensors[f"{name}.weight"] = (weight.T if isinstance(linear, Conv1D) else weight).to(dtype).contiguous()
                dequantized.setdefault(f"of {own.bits} bits in the checkpoint; 4-bit layers hold 4", []).append(name)
        elif key in expected:
            tensors[f"{name}.weight"] = weight.dequantize(dtype) if isinstance(weight, Int4Tensor) else weight.to(dtype)
            dequantized.setdefault(
                "transformers has them with others in one tensor, which is no linear layer", []
            ).append(name)
        elif any(re.search(pattern, key) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()):
            ignored.append(name)
        else:
            raise ValueError(
                f"the checkpoint has 4-bit parts for {name}, where this model has no layer; is config.json its own?"
            )
    for name in plain:
        value = files[name].get_tensor(name)
        key, merged = place(name)
        if key in expected and not merged and (value.shape != expected[key].shape or not value.is_floating_point()):
            raise ValueError(
                f"{name} is {value.dtype} {list(value.shape)}, but this model has {list(expected[key].shape)} there"
            )
        owner = name.removesuffix(".bias")
        if key in expected or owner == name or owner not in layers:
            tensors[name] = value
        elif owner not in ignored and value.any():  # AutoGPTQ wrote a bias of zeros for every layer
            raise ValueError(
                f"the checkpoint has a bias {name}, this model has none there; is config.json the checkpoint's?"
            )
    warn_of_full_precision(dequantized, stacklevel=4)
    return tensors


def _activation_scale(skeleton: Any, name: str, scale: Tensor) -> Tensor:
    """AWQ's scale behind an activation function, as it is; raises where it cannot be one."""
    check_activation_scale(skeleton, name, scale)
    if not scale.float().isfinite().all() or not scale.all():
        raise ValueError(f"{name} has NaN, infinite or zero values; {AGAIN}")
    return scale


def _expert_parts(name: str, int4: Int4Tensor, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of an expert projection [E, N, K] under the names that Int4Experts gives them."""
    there = expected.get(name)
    if there is None or there.ndim != 3 or name.rpartition(".")[2] not in PROJECTIONS:
        raise ValueError(f"{name}_blocks has no place in this model; MXFP4 is read for gpt_oss")
    if there.mT.shape != int4.shape:
        raise ValueError(
            f"{name}_blocks is of experts {list(int4.shape)}, but this model has {list(there.mT.shape)} there"
        )
    assert int4.codebook is not None
    return {name: int4.weight, f"{name}_scale": int4.scale, f"{name}_codebook": int4.codebook}
