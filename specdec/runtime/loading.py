"""Loading models and tokenizers for commands and experiments, in full precision or in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from specdec.quant.checkpoints import load_checkpoint, named_errors, read_json
from specdec.quant.config import Int4Config

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json",
)  # fmt: skip


def load(name: str, dtype: str, device: str, int4: Int4Config | None = None) -> PreTrainedModel:
    """Load a model from a folder or hub id.

    dtype: "auto" (the checkpoint's own) or one of DTYPES. int4: quantize the model while it is loaded.
    Raises ValueError, naming the model and the reason, where it cannot be loaded.
    """
    return load_checkpoint(name, int4, device=device, dtype=dtype)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, with left padding; one without a padding token pads with its EOS token."""
    tokenizer = read_tokenizer(name, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(name: str, padding_side: str | None = None) -> Any:
    """Load the tokenizer of a folder or hub id as it is. Raises ValueError, naming a damaged file.

    padding_side: "left" or "right"; None: the tokenizer's own.
    """
    arguments = {} if padding_side is None else {"padding_side": padding_side}
    with named_errors(f"no tokenizer could be loaded from {name!r}"):
        check_tokenizer_files(name)
        return AutoTokenizer.from_pretrained(name, **arguments)


def check_tokenizer_files(name: str) -> None:
    """Raise ValueError where a tokenizer file in a local folder is not valid JSON; transformers skips some of those."""
    for file in (Path(name, file_name) for file_name in TOKENIZER_FILES):
        if file.is_file():
            read_json(file)
