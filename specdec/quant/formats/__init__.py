"""Quantized checkpoints as others write them -> the canonical 4-bit form; one file a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.quant.formats import awq, compressed_tensors, gptq, mxfp4
from specdec.quant.formats.layer import Scheme, require
from specdec.quant.int4 import GROUP_SIZES
from specdec.quant.quantizer import METHOD

SCHEMES = {"gptq": gptq.scheme, "awq": awq.scheme, "compressed-tensors": compressed_tensors.scheme, "mxfp4": mxfp4.scheme}


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """The format that a quantization_config tells of; ValueError where it is not read."""
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in SCHEMES:
        raise ValueError(
            f"a checkpoint with quant_method={method!r} cannot be read, only {', '.join(map(repr, SCHEMES))}, {METHOD!r} and full"
            " precision can; load the original, which is quantized on the way"
        )
    scheme = SCHEMES[method](settings)
    for size in scheme.group_sizes:
        require(method, {"group_size": size}, group_size=GROUP_SIZES)
    return scheme
