"""Loading of checkpoints: quantized ones of this and other libraries, and ones in full precision.

Other formats are described in specdec/quant/formats, specdec's own in quantizer.py. Codes, scales and zero points keep
their values, only their layout changes: in the dtype of the scales the weights equal those of the format's own library,
bit for bit.
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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.quant.config import METHOD, Int4Config
from specdec.quant.conversion import convert_checkpoint
from specdec.quant.formats import advice_on_fp8, scheme_of
from specdec.quant.formats.layer import DOWNLOAD_AGAIN, FLOAT_DTYPES
from specdec.quant.layers import abbreviate, linear_layers
from specdec.quant.mtp_names import all_mtp_names

# Files with the quantization config, of libraries that do not write it into config.json; and the method of each.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Mismatches are reported, not raised, so that check_complete can name them.
LOADING_OPTIONS = {"output_loading_info": True, "ignore_mismatched_sizes": True}
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
HUB_CONFIGS = ["config.json", "generation_config.json", *SETTINGS_FILES, "*.py"]
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
# Tensors that a model need not have: masks, positions and frequencies in old checkpoints, which today's code computes,
# and the other parts of a multimodal checkpoint whose text model is loaded.
IGNORED_TENSORS = re.compile(
    r"(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|causal_mask)|position_ids|embed_positions\.weights)$"
    r"|(^|\.)(vision|visual|audio|multi_modal)\w*\."
)


def load_quantized(path: str | Path, config: Int4Config | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a 4-bit model; a checkpoint in full precision is quantized while it loads.

    path: a local folder, or a hub id; of quantized checkpoints only safetensors files are read. config: how to
    quantize, for a checkpoint in full precision. kwargs: of from_pretrained, those of the hub and `subfolder` included;
    the dtype, of all but the 4-bit weights, is the checkpoint's own unless given. Raises ValueError, naming path and
    file or tensor, where the checkpoint is damaged, does not fit its config.json, or has a format that is not
    supported. Layers of 2 or 8 bits, and experts that the model has in one tensor (except MXFP4's), are dequantized,
    with a warning.
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
    """Load a model in the precision of its checkpoint; arguments and errors as for load_quantized().

    config: how to quantize a checkpoint in full precision; ValueError if it is quantized already. default: the same if
    config is None, but ignored for a quantized one. device: where to move the model.
    """
    for name in ("state_dict", "quantization_config", "output_loading_info", "ignore_mismatched_sizes"):
        if name in kwargs:
            is_config = name == "quantization_config"
            advice = "give an Int4Config as config=…" if is_config else "use from_pretrained for that"
            raise ValueError(f"load_quantized() takes no {name}; {advice}")
    hub = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, "subfolder") if name in kwargs}
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", None) or dtype or "auto"
    with named_errors(f"no model could be loaded from {str(path)!r}"):
        folder = config_folder(path, hub)
        model_config, settings, rest = read_config(folder, **kwargs)
        method = None if settings is None else settings.get("quant_method")
        if settings is not None and config is not None:
            advice = advice_on_fp8(method) or "leave config out, or load the original"
            raise ValueError(f"it is quantized already, by {method}; {advice}")
        if settings is not None and method != METHOD:
            trust_remote_code = kwargs.get("trust_remote_code")
            checkpoint = checkpoint_folder(path, hub, HUB_FILES)
            model, info = _load_format(checkpoint, model_config, settings, dtype, trust_remote_code, rest)
        else:
            is_local = Path(path).is_dir()
            if is_local and (settings is not None or any(folder.glob("*.safetensors*"))):
                tensor_files(folder)
            if settings is None and (config or default):
                kwargs["quantization_config"] = config or default
            source, location = (folder, {}) if is_local else (str(path), hub)
            arguments = LOADING_OPTIONS | {"dtype": dtype} | location | kwargs
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
            model, info = loaded
        check_complete(info, model_config.get_text_config(decoder=True).num_hidden_layers)
        return model if device is None else model.to(device)


def _load_format(
    folder: Path,
    config: Any,
    settings: dict[str, Any],
    dtype: Any,
    trust_remote_code: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    """-> the model of a checkpoint in another library's format, and transformers' loading info."""
    scheme = scheme_of(settings)
    files = tensor_files(folder)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    dtype = _dtype(dtype, config, files)
    tensors = convert_checkpoint(files, scheme, skeleton, dtype)
    unquantized = [name for name in linear_layers(skeleton) if f"{name}.weight_scale" not in tensors]
    int4_config = Int4Config(scheme.group_sizes[0], scheme.symmetric, unquantized, head=None)  # as it is in the file
    int4_config.tensors = {name: value.to("meta") for name, value in tensors.items()}
    config.quantization_config = int4_config
    arguments = LOADING_OPTIONS | {"dtype": dtype} | kwargs
    model, info = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, **arguments)
    model.name_or_path = model.config.name_or_path = str(folder)
    if "generation_config" not in kwargs and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turn any error inside into a ValueError of one line: `what` failed, and the reason."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        is_plain = isinstance(error, ValueError | OSError | ImportError) and reason
        error_type = "" if is_plain else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {error_type}{reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming the file, where it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object, but {str(content)[:40]!r}; {DOWNLOAD_AGAIN}")
    return content


def config_folder(path: str | Path, hub: Mapping[str, Any] | None = None) -> Path:
    """The folder with a checkpoint's config. hub: `subfolder`, and from_pretrained's arguments for a hub id."""
    return checkpoint_folder(path, hub or {}, HUB_CONFIGS)


def read_config(folder: Path, **kwargs: Any) -> tuple[Any, dict[str, Any] | None, dict[str, Any]]:
    """-> a checkpoint's config without its quantization config; the latter or None; kwargs that are no settings."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no config.json in {folder}; name a folder that save_pretrained wrote")
    content = read_json(file)
    sections = [content, *(value for value in content.values() if isinstance(value, dict))]  # text_config may have it
    for part in sections:
        if not isinstance(part.get("quantization_config"), dict | None):
            raise ValueError(f"the quantization_config in {file} is no JSON object; {DOWNLOAD_AGAIN}")
    if (generation := folder / "generation_config.json").is_file():
        read_json(generation)  # transformers ignores it where it is damaged
    with named_errors(f"{file} cannot be used"):
        config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    settings = take_settings(config)
    return config, settings if settings is not None else _settings_file(folder), rest


def take_settings(config: Any) -> dict[str, Any] | None:
    """Remove the quantization config from a model's config and return it as a dict; None where there is none.

    A multimodal model may have it in the config of its text model.
    """
    found = [part.__dict__.pop("quantization_config", None) for part in (config, config.get_text_config(decoder=True))]
    settings: Any = next((settings for settings in found if settings is not None), None)
    return settings.to_dict() if isinstance(settings, QuantizationConfigMixin) else settings


def _settings_file(folder: Path) -> dict[str, Any] | None:
    """The quantization config from a file of its own; None where there is none."""
    for name, method in SETTINGS_FILES.items():
        if (file := folder / name).is_file():
            return {"quant_method": method} | read_json(file)
    return None


def checkpoint_folder(path: str | Path, hub: Mapping[str, Any], files: list[str]) -> Path:
    """The folder with a checkpoint's files; those of a hub id are downloaded or in the cache."""
    subfolder = hub.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    arguments = {name: value for name, value in hub.items() if name != "subfolder"}
    arguments |= {
        "allow_patterns": [prefix + name for name in files],
        "ignore_patterns": [f"{prefix}*/*", f"{prefix}consolidated*"],
    }
    try:
        return Path(snapshot_download(str(path), **arguments), subfolder)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"it is no local folder and cannot be downloaded from the hub: {reason}") from error


def _dtype(dtype: Any, config: Any, files: Mapping[str, Any]) -> Any:
    """The dtype to load; for "auto" that of config.json, else that of an unquantized weight."""
    if dtype == "auto":
        dtypes = (file.get_tensor(name).dtype for name, file in files.items() if name.endswith(".weight"))
        dtype = config.dtype or next((found for found in dtypes if found in FLOAT_DTYPES), torch.bfloat16)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def check_complete(info: Mapping[str, Any], num_layers: int | None = None) -> None:
    """Raise ValueError where tensors and model did not fit; transformers fills what is missing with random numbers.

    num_layers: of a model whose checkpoint may also hold MTP layers, which are ignored; None: it may not.
    """
    missing = sorted(info["missing_keys"])
    further = set() if num_layers is None else all_mtp_names(info["unexpected_keys"], num_layers)
    unexpected = sorted(name for name in {*info["unexpected_keys"]} - further if not IGNORED_TENSORS.search(name))
    misshapen = [
        f"{name} {list(shape)} where the model has {list(expected)}"
        for name, shape, expected in sorted(info["mismatched_keys"])
    ]
    problems = [f"lacks {abbreviate(missing)}"] * bool(missing)
    problems += [f"has {abbreviate(unexpected)}, which the model has no place for"] * bool(unexpected)
    problems += [f"has {abbreviate(misshapen)} in another shape"] * bool(misshapen)
    if problems:
        is_damaged = len(problems) == 1 and missing
        advice = "is config.json its own, with the quantization_config that it may need?"
        raise ValueError(f"the checkpoint {'; it '.join(problems)}; {DOWNLOAD_AGAIN if is_damaged else advice}")


def tensor_files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor.

    Raises ValueError where there are none, one cannot be read, or one lacks tensors that the index lists.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    listed = {}
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(
                f"{index} is no index of safetensors files (no weight_map with a file for each tensor);"
                f" {DOWNLOAD_AGAIN}"
            )
        listed = {name: folder / Path(file).name for name, file in weight_map.items()}
        if missing := [file.name for file in sorted(set(listed.values())) if file not in files]:
            raise ValueError(f"{index.name} names {abbreviate(missing)}, which is not in {folder}; {DOWNLOAD_AGAIN}")
        files = sorted(set(listed.values()))
    elif folder / "model.safetensors" in files:
        files = [folder / "model.safetensors"]
    elif len(files) > 1:
        raise ValueError(f"{folder} has several safetensors files and no index; {DOWNLOAD_AGAIN}")
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")):
        raise ValueError(
            f"{folder} has only {abbreviate(pickles)}; a pickle can run code and is not read, so convert it to"
            " safetensors"
        )
    elif not files:
        raise ValueError(f"{folder} has no weights, no *.safetensors; {DOWNLOAD_AGAIN}")
    found: dict[str, Any] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); {DOWNLOAD_AGAIN}") from error
        found |= dict.fromkeys(opened.keys(), opened)
    if missing := sorted(listed.keys() - found.keys()):
        raise ValueError(
            f"{listed[missing[0]].name} has no {abbreviate(missing)}, where the index names it; {DOWNLOAD_AGAIN}"
        )
    return found
