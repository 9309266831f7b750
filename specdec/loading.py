"""Models and tokenizers for commands and experiments: in full precision, or in the 4 bits that they come in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from specdec.quant.checkpoints import load_as_it_is, load_quantized
from specdec.quant.quantizer import Int4Config

DTYPES = ("float32", "bfloat16", "float16")


def load(name: str, dtype: str, device: str, int4: Int4Config | None = None) -> PreTrainedModel:
    """A model from a folder or hub id. dtype: "auto" (the checkpoint's own) or one of DTYPES. int4: quantize it while loading."""
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    try:
        model: Any = load_as_it_is(name, **kwargs) if int4 is None else load_quantized(name, int4, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be loaded from {name!r}: {str(error).partition(chr(10))[0]}") from error
    return model.to(device).eval()  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, padding on the left, with its end as the padding where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {str(error).partition(chr(10))[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
