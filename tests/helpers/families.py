"""Tiny random models of many families: what the lossless tests run over."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import specdec
from specdec.quant.int8 import Int8Linear
from specdec.quant.linear import Int4Linear

VOCAB_SIZE = 101
CONTEXT = 128

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_MULTI_HEAD = _LLAMA | {"num_key_value_heads": 4}
_ROTARY = {"rotary_dim": 4}

# model_type -> config values; "attn" picks the attention implementation where the default is not wanted
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 9},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8, "sliding_window": 9, "attn": "eager"},
    "gemma3_text": _LLAMA | {"head_dim": 8, "sliding_window": 9},
    "phi": _MULTI_HEAD,
    "phi3": _LLAMA | {"pad_token_id": 0},
    "stablelm": _LLAMA,
    "olmo2": _LLAMA,
    "cohere2": _LLAMA | {"sliding_window": 9},
    "granite": _LLAMA,
    "starcoder2": _LLAMA | {"sliding_window": 9},
    "persimmon": _MULTI_HEAD,
    "smollm3": _LLAMA | {"pad_token_id": 0},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT | _ROTARY,
    "codegen": _GPT | _ROTARY | {"n_ctx": CONTEXT},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 9, "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": _MULTI_HEAD,
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT, "use_cache": True},
    "xglm": {
        "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": CONTEXT,
    },
    "biogpt": _MULTI_HEAD | {"pad_token_id": 1},
    "gpt_oss": _LLAMA | {
        "head_dim": 8, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2, "attn": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": _LLAMA | {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 9,
        "pad_token_id": 0,
    },
    "deepseek_v3": _MULTI_HEAD | {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip

# One family of each kind of attention: rotary, learned positions, sliding, eager with two masks, no position_ids.
CACHE_FAMILIES = ["llama", "gpt2", "mistral", "gemma2", "mpt"]

# Families that cannot run on the ragged cache, with a model that is refused.
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": FAMILIES["falcon"] | {"alibi": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "qwen3_next": _LLAMA | {
        "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def make_model(model_type: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A random model in float32, in eval mode, with weights so large that its greedy text is not constant."""
    values = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None} | values
    attn = values.pop("attn", None)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# The target's linear layers: in float32; in 4 bits with float32 arithmetic; in 4 bits by the device's kernel.
WEIGHTS = ("float32", "int4", "int4_kernel")


@cache
def family(model_type: str, weights: str = "float32") -> PreTrainedModel:
    """The family's test model. It is shared: do not change it."""
    model = make_model(model_type, **FAMILIES[model_type])
    if weights != "float32":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about layers whose width no group divides
            specdec.quantize(model, specdec.Int4Config(group_size=32))
        for module in model.modules():
            if isinstance(module, Int4Linear | Int8Linear):
                module.use_kernel = weights == "int4_kernel"
    return model


def prompts(batch_size: int, vocab_size: int = VOCAB_SIZE, seed: int = 1) -> dict[str, torch.Tensor]:
    """Unevenly left-padded prompts, one of a single token where batch_size > 1; ids 3 and up."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (batch_size, 11), generator=generator)
    padding = torch.tensor([0, 10, 4, 7, 2, 9, 1, 5])[:batch_size, None]
    mask = (torch.arange(11) >= padding).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
