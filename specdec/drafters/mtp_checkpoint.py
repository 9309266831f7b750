"""Reading of the MTP layers in a target's own checkpoint, in the layouts of the models that have some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from specdec.quant.checkpoints import tensor_files
from specdec.quant.formats.layer import FLOAT_DTYPES
from specdec.quant.layers import abbreviate
from specdec.quant.mtp_names import mtp_names
from specdec.utils.warn import warn

NO_LAYERS = "it has no MTP layers; where it was made from a checkpoint that has some, name that one"
MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")  # of a target's config.json


def has_mtp(folder: Path, content: Mapping[str, Any], text: PreTrainedConfig) -> bool:
    """Whether a checkpoint, of which the folder may hold the configs alone, is one of the target and has MTP layers."""
    section = content.get("text_config")
    own = section if isinstance(section, Mapping) else content
    if any(own.get(name) != getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")):
        return False
    if any(folder.glob("*.safetensors")):
        return bool(mtp_names(tensor_files(folder), text.num_hidden_layers)[0])
    return any(own.get(name) for name in MTP_COUNTS)


def read_mtp_tensors(folder: Path, num_layers: int) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint's first MTP layer under the names of MtpHead, and the order of its projection.

    num_layers: of the target. Raises ValueError where there is none, or it is in 8 bits.
    """
    files = tensor_files(folder)
    names, num_mtp_layers, hidden_first = mtp_names(files, num_layers)
    if not names:
        raise ValueError(NO_LAYERS)
    if num_mtp_layers > 1:
        warn(f"{folder} has {num_mtp_layers} MTP layers; all ids of a draft are drafted by the first")
    tensors = {own: files[name].get_tensor(name) for name, own in names.items() if own is not None}
    if scaled := [name for name, tensor in tensors.items() if tensor.dtype not in FLOAT_DTYPES]:
        raise ValueError(
            f"its MTP layer is quantized ({abbreviate(scaled)}); name a checkpoint that has it in 16 or 32 bits"
        )
    return tensors, hidden_first
