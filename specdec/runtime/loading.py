"""Models and tokenizers for commands and experiments: in full precision, or in the 4 bits that they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from specdec.quant.checkpoints import load_checkpoint, named_errors, read_json
from specdec.quant.config import Int4Config

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
)  # fmt: skip


def load(name: str, dtype: str, device: str, int4: Int4Config | None = None) -> PreTrainedModel:
    """A model from a folder or hub id. dtype: "auto" (the checkpoint's own) or one of DTYPES. int4: quantize it while loading.

    Raises ValueError, naming the model and what is wrong with it or with the device, where it cannot be loaded.
    """
    return load_checkpoint(name, int4, device=device, dtype=dtype)


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, padding on the left, with its end as the padding where it has none."""
    tokenizer = read_tokenizer(name, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(name: str, **kwargs: Any) -> Any:
    """The tokenizer of a folder or hub id as it is. kwargs: from_pretrained's. Raises ValueError, naming a damaged file."""
    with named_errors(f"no tokenizer could be loaded from {name!r}"):
        check_tokenizer_files(name)
        return AutoTokenizer.from_pretrained(name, **kwargs)


def check_tokenizer_files(name: str) -> None:
    """Raise ValueError where a tokenizer's file in a local folder is no JSON; transformers would go on without some of them."""
    for file in (Path(name, file) for file in TOKENIZER_FILES):
        if file.is_file():
            read_json(file)
