"""Other libraries' checkpoint formats -> the canonical 4-bit form; one file a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.quant.config import METHOD
from specdec.quant.formats import auto_round, awq, compressed_tensors, gptq, mxfp4
from specdec.quant.formats.layer import Scheme

SCHEMES = {
    "gptq": gptq.scheme,
    "awq": awq.scheme,
    "auto-round": auto_round.scheme,
    "intel/auto-round": auto_round.scheme,  # of its first versions
    "compressed-tensors": compressed_tensors.scheme,
    "mxfp4": mxfp4.scheme,
}
OTHER_READERS = {
    "aqlm": "transformers with the aqlm package",
    "bitnet": "transformers",
    "bitsandbytes": "transformers with the bitsandbytes package",
    "eetq": "transformers with the eetq package",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "transformers with the fbgemm-gpu package",
    "fp8": "transformers or vLLM",
    "higgs": "transformers with the flute-kernel package",
    "hqq": "transformers with the hqq package",
    "marlin": "vLLM",
    "modelopt": "vLLM or TensorRT-LLM",
    "quanto": "transformers with the optimum-quanto package",
    "quark": "transformers with the amd-quark package",
    "torchao": "transformers with the torchao package",
    "vptq": "transformers with the vptq package",
}

FP8 = "fp8"  # some models were published in it alone


def advice_on_fp8(method: Any) -> str | None:
    """What to do with an fp8 checkpoint, for an error message; None for other methods."""
    if method != FP8:
        return None
    return (
        "write its bfloat16 copy, which is twice as large, with transformers and name that folder: AutoModelForCausalLM"
        ".from_pretrained(PATH, dtype='bfloat16', quantization_config=FineGrainedFP8Config(dequantize=True))"
        ".save_pretrained(FOLDER)"
    )


def scheme_of(settings: Mapping[str, Any]) -> Scheme:
    """The format that a quantization_config describes; raises ValueError where it or a setting is not supported."""
    method, algorithm = settings.get("quant_method"), settings.get("quant_algo") or settings.get("quantization")
    if isinstance(method, str) and method in SCHEMES:
        return SCHEMES[method](settings)
    reader = OTHER_READERS.get(method) if isinstance(method, str) else None
    advice = advice_on_fp8(method) or "load the original, which is quantized while it loads"
    raise ValueError(
        f"a checkpoint with quant_method={method!r}{f' ({algorithm})' if algorithm else ''} cannot be read, only"
        f" {', '.join(map(repr, SCHEMES))}, {METHOD!r} and full precision can;"
        f" {f'{reader} reads it, or ' if reader else ''}{advice}"
    )
