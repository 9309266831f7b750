"""Write a GGUF model as a transformers model in bfloat16: from_gguf.py FILE FOLDER, in the peers' environment.

For models of llama's architecture with a byte-level BPE tokenizer that splits digits, as SmolLM2's: transformers reads
that tokenizer as one of SentencePiece's kind, which finds no token for a space.
"""

import sys
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

source, folder = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
model.save_pretrained(folder)

fields = GGUFReader(source).fields


def value(name):
    """Of a field of the tokenizer."""
    return fields[f"tokenizer.{name}"].contents()


kind, splitting = value("ggml.model"), value("ggml.pre")
if (kind, splitting) != ("gpt2", "smollm"):
    raise SystemExit(f"{source.name} has a tokenizer of kind {kind}, {splitting}; this script reads gpt2, smollm")
tokens = value("ggml.tokens")
merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()
special = [token for token, type in zip(tokens, value("ggml.token_type"), strict=True) if type == TokenType.CONTROL]
tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
names = {
    f"{name}_token": tokens[value(f"ggml.{field}_token_id")]
    for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    if f"tokenizer.ggml.{field}_token_id" in fields
}
chat_template = value("chat_template") if "tokenizer.chat_template" in fields else None
PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names).save_pretrained(folder)
