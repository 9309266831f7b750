"""Models for the commands, as their checkpoints are: in full precision, or in the 4 bits that they come in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.quant.checkpoints import load_as_it_is


def load(name: str, dtype: str, device: str) -> PreTrainedModel:
    """A model from a folder or hub id. dtype: "auto" (the checkpoint's own) or a torch dtype's name."""
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model: Any = load_as_it_is(name, dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model could be loaded from {name!r}: {str(error).partition(chr(10))[0]}") from error
    return model.to(device).eval()  # type: ignore[no-any-return]
