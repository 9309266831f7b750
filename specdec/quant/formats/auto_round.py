"""AutoRound's own export: the tensors of GPTQ or AWQ with AutoRound's settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from specdec.quant.formats import awq, gptq
from specdec.quant.formats.layer import Override, Scheme, Settings

# Zero points are stored as in GPTQ v1 (less one), or unchanged as in v2.
PACKINGS = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_gptq": "gptq", "auto": "gptq",
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq", "auto_round:awq": "awq", "auto_awq": "awq",
}  # fmt: skip


def scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config of method auto-round."""
    settings = Settings(
        "this auto-round checkpoint", {"sym": True, **values}, "transformers with the auto-round package"
    )
    packing = PACKINGS[settings.one_of("packing_format", *PACKINGS)]
    extra = settings.table("extra_config").values
    overrides = [_override(settings, name, packing) for name in sorted(extra, key=_is_pattern)]
    base = _fields(settings, packing, 4)
    if packing == "awq":
        return Scheme(awq.SUFFIXES, awq.read, overrides=overrides, **base)
    return Scheme(gptq.SUFFIXES, gptq.read, version=packing, overrides=overrides, **base)


def _fields(settings: Settings, packing: str, *bits: int) -> dict[str, Any]:
    settings.one_of("data_type", "int")
    settings.one_of("act_bits", 16, 32)
    if packing == "awq":  # zero points are stored even if the codes are symmetric
        return awq.fields(settings) | {"symmetric": settings.flag("sym", True)}
    return gptq.fields(settings, *bits)


def _override(settings: Settings, name: str, packing: str) -> Override:
    """One entry of `extra_config`: a layer's name, or a regular expression found in names; 16 bits: not quantized."""
    extra = settings.table("extra_config")
    changed = settings.changed_by(extra.table(name))
    matches = extra.pattern(name).search if _is_pattern(name) else name.__eq__
    is_quantized = changed.values.get("bits") not in (16, 32)
    return Override(matches, _fields(changed, packing, *gptq.BITS) if is_quantized else None)


def _is_pattern(name: str) -> bool:
    return re.fullmatch(r"[\w.]+", name) is None
