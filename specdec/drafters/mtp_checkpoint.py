"""Reading of the MTP layers in a target's own checkpoint, in the layouts of the models that have some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from specdec.drafters.mtp import DECODER
from specdec.quant.checkpoints import tensor_files
from specdec.quant.formats.layer import FLOAT_DTYPES
from specdec.quant.layers import abbreviate
from specdec.utils.warn import warn

MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")  # of a target's config.json
LAYER = f"{DECODER}layers.0."
# Of each layout: a pattern of the names in a checkpoint, the number of the MTP layer as its group; and a head's names
# by those behind it, of which the first that fits is taken. None: a tensor that is the target's.
LAYOUTS: tuple[tuple[str, dict[str, str | None]], ...] = (
    (  # DeepSeek-V3, GLM-4-MoE: layers behind the target's
        r"model\.(?:language_model\.)?layers\.(?P<layer>\d+)\.",
        {
            "enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "fc.", "shared_head.norm.": f"{DECODER}norm.",
            "shared_head.head.": None, "embed_tokens.": None, "": LAYER,
        },
    ),
    (  # Qwen3-Next, Qwen3.5
        r"mtp\.(?:layers\.(?P<layer>\d+)\.)?",
        {"pre_fc_norm_embedding.": "enorm.", "pre_fc_norm_hidden.": "hnorm.", "fc.": "fc.", "norm.": f"{DECODER}norm.",
         "": LAYER},
    ),
    (  # MiMo
        r"model\.mtp_layers\.(?P<layer>\d+)\.",
        {"token_layernorm.": "enorm.", "hidden_layernorm.": "hnorm.", "input_proj.": "fc.",
         "final_layernorm.": f"{DECODER}norm.", "": LAYER},
    ),
)  # fmt: skip
HIDDEN_FIRST = LAYOUTS[2]  # whose projection reads the state before the embedding


def has_mtp(folder: Path, content: Mapping[str, Any], text: PreTrainedConfig) -> bool:
    """Whether a checkpoint, of which the folder may hold the configs alone, is one of the target and has MTP layers."""
    section = content.get("text_config")
    own = section if isinstance(section, Mapping) else content
    if any(own.get(name) != getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")):
        return False
    if any(own.get(name) for name in MTP_COUNTS):
        return True
    return any(folder.glob("*.safetensors")) and bool(mtp_names(tensor_files(folder), text.num_hidden_layers)[0])


def read_mtp_tensors(folder: Path, num_layers: int) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint's first MTP layer under the names of MtpHead, and the order of its projection.

    num_layers: of the target. Raises ValueError where there is none, or it is in 8 bits.
    """
    files = tensor_files(folder)
    names, num_mtp_layers, hidden_first = mtp_names(files, num_layers)
    if not names:
        raise ValueError("it has no MTP layers; where it was made from a checkpoint that has some, name that one")
    if num_mtp_layers > 1:
        warn(f"{folder} has {num_mtp_layers} MTP layers; all ids of a draft are drafted by the first")
    tensors = {own: files[name].get_tensor(name) for name, own in names.items() if own is not None}
    if scaled := [name for name, tensor in tensors.items() if tensor.dtype not in FLOAT_DTYPES]:
        raise ValueError(
            f"its MTP layer is quantized ({abbreviate(scaled)}); name a checkpoint that has it in 16 or 32 bits"
        )
    return tensors, hidden_first


def mtp_names(names: Iterable[str], num_layers: int) -> tuple[dict[str, str | None], int, bool]:
    """The tensors of a checkpoint's first MTP layer: their names in an MtpHead, None for those that are the target's.

    num_layers: of the target. -> these, how many MTP layers there are, and whether the projection reads the state
    first; nothing and 0 where there are none.
    """
    for layout in LAYOUTS:
        pattern, parts = layout
        offset = num_layers if layout is LAYOUTS[0] else 0
        found: dict[str, str | None] = {}
        layers = set()
        for name in names:
            match = re.match(pattern, name)
            if match is None or (layer := int(match["layer"] or 0) - offset) < 0:
                continue
            layers.add(layer)
            rest = name[match.end() :]
            part = next(part for part in parts if rest.startswith(part))
            if layer == 0:
                found[name] = None if parts[part] is None else f"{parts[part]}{rest[len(part) :]}"
        if found:
            return found, len(layers), layout is HIDDEN_FIRST
    return {}, 0, False
