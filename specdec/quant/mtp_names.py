"""Names of the MTP layers in a target's own checkpoint, in the layouts of the models that have some."""

from __future__ import annotations

import re
from collections.abc import Iterable

DECODER = "decoder."  # of a one-layer model in a draft head, see specdec/drafters/mtp.py
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
ENTRY = ("enorm.", "pre_fc_norm_embedding.", "token_layernorm.")  # a tensor that each MTP layer has
HIDDEN_FIRST = LAYOUTS[2]  # whose projection reads the state before the embedding


def mtp_names(names: Iterable[str], num_layers: int) -> tuple[dict[str, str | None], int, bool]:
    """The tensors of a checkpoint's first MTP layer: their names in an MtpHead, None for those that are the target's.

    num_layers: of the target. -> these, how many MTP layers there are, and whether the projection reads the state
    first; nothing and 0 where there are none.
    """
    for layout in LAYOUTS:
        _, parts = layout
        layers = _layers(names, num_layers, layout)
        if 0 not in layers:
            continue
        found: dict[str, str | None] = {}
        for name, rest in layers[0].items():
            part = next(part for part in parts if rest.startswith(part))
            found[name] = None if parts[part] is None else f"{parts[part]}{rest[len(part) :]}"
        return found, len(layers), layout is HIDDEN_FIRST
    return {}, 0, False


def all_mtp_names(names: Iterable[str], num_layers: int) -> set[str]:
    """The tensors of all MTP layers of a checkpoint, which transformers leaves out of the model."""
    return {name for layout in LAYOUTS for layer in _layers(names, num_layers, layout).values() for name in layer}


def _layers(
    names: Iterable[str], num_layers: int, layout: tuple[str, dict[str, str | None]]
) -> dict[int, dict[str, str]]:
    """The MTP layers of a layout by number: of each tensor the rest of its name."""
    pattern, _ = layout
    offset = num_layers if layout is LAYOUTS[0] else 0
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        match = re.match(pattern, name)
        if match is not None and (layer := int(match["layer"] or 0) - offset) >= 0:
            layers.setdefault(layer, {})[name] = name[match.end() :]
    return {number: layer for number, layer in layers.items() if any(rest.startswith(ENTRY) for rest in layer.values())}
