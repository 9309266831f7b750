"""Quantized checkpoints as others write them -> models in the canonical 4-bit form.

The formats are in specdec/quant/formats, and our own in quantizer.py. Codes, scales and zero points are taken over as they are,
only their layout changes: in the scales' dtype the weights are bit for bit those of the format's own library.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
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
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]


def load_quantized(path: str | Path, config: Int4Config | None = None, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint, its 4-bit weights as they are; one in full precision is quantized by `config` while loading.

    path: a local folder, or a hub id; only safetensors are read. kwargs go to from_pretrained; the dtype (of all but the 4-bit
    weights) is the checkpoint's own unless given. Raises ValueError, naming file or tensor, where the checkpoint is damaged, or
    not of a format that is read. Experts that the model has in one tensor, but for MXFP4's, and layers of 2 or 8 bits are
    dequantized; a warning says so.
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
    is_quantized = settings_of(Path(path), config) is not None
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
    """What the checkpoint says of its quantization, None where it is in full precision.

    It is in config.json, at its top or in its text model's part, or in a file beside it (SETTINGS_FILES); afterwards it is at
    `config.quantization_config`. ValueError where it is no object with names, or such a file cannot be read.
    """
    text = config.get_text_config(decoder=True)
    settings = getattr(config, "quantization_config", None)
    if settings is None and getattr(text, "quantization_config", None) is not None:
        settings = text.quantization_config
        del text.quantization_config
    for name, method in SETTINGS_FILES.items():
        if settings is None and (folder / name).is_file():
            settings = {"quant_method": method} | _object_in(folder / name)
    if settings is None:
        return None
    if isinstance(settings, QuantizationConfigMixin):
        settings = settings.to_dict()
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config is {settings!r}, but must be an object with names; {AGAIN}")
    config.quantization_config = settings = dict(settings)
    return settings


def _object_in(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r}, but must hold an object with names; {AGAIN}")
    return content


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
            raise ValueError(f"{name} has quantized tensors, but the checkpoint's config leaves it in full precision; {AGAIN}")
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
            dequantized.setdefault("transformers has them with others in one tensor, which is no linear layer", []).append(name)
        elif any(re.search(pattern, key) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()):
            ignored.append(name)
        else:
            raise ValueError(f"the checkpoint has 4-bit parts for {name}, where this model has no layer; is config.json its own?")
    for name in plain:
        value = files[name].get_tensor(name)
        key, merged = place(name)
        if key in expected and not merged and (value.shape != expected[key].shape or not value.is_floating_point()):
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, but this model has {list(expected[key].shape)} there")
        owner = name.removesuffix(".bias")
        if key in expected or owner == name or owner not in layers:
            tensors[name] = value
        elif owner not in ignored and value.any():  # AutoGPTQ wrote a bias of zeros for every layer
            raise ValueError(f"the checkpoint has a bias {name}, this model has none there; is config.json the checkpoint's?")
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
        raise ValueError(f"{name}_blocks is of experts {list(int4.shape)}, but this model has {list(there.mT.shape)} there")
    assert int4.codebook is not None
    return {name: int4.weight, f"{name}_scale": int4.scale, f"{name}_codebook": int4.codebook}
