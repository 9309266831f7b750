"""Tiny quantized checkpoints, written element by element from the formats' descriptions, without code of the readers.

Codes, scales and zero points are random, so every nibble matters. `write` returns the weights that they represent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers.families import make_model

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "qwen3": TINY | {"head_dim": 16, "attention_bias": True},
    "mixtral": TINY | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": TINY,
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128},
    "gptj": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128, "rotary_dim": 4,
             "tie_word_embeddings": False},
    "gemma3": {
        "text_config": TINY | {
            "vocab_size": 101, "head_dim": 16, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
        "mm_tokens_per_image": 4, "image_token_index": 100, "boi_token_index": 98, "eoi_token_index": 99,
    },
    "gpt_oss": TINY | {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "attn": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


LAYERS = ("_proj", ".w1", ".w2", ".w3", ".c_attn", ".c_fc", ".c_proj", ".fc_in", ".fc_out")  # quantized ones
OUTPUTS = ("c_proj.weight", "fc_out.weight")  # of layers whose inputs are the outputs of an activation function
# packing_format by the layout of zero points
AUTO_ROUND = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round", "awq": "auto_round:auto_awq"}


@dataclass
class Case:
    """One checkpoint to write.

    group_size: -1 for a whole row. skip: ends of the names of linear layers that are not quantized. layers: fields that
    differ for layers, by the ends of their names. scaled: the end of the names of activation functions that get a
    scale. settings: more of the quantization_config. values: of the model's config.
    """

    method: str
    model_type: str = "llama"
    group_size: int = 32
    symmetric: bool = True
    version: str = "gptq"
    act_order: bool = False
    dtype: torch.dtype = torch.float16
    head: bool = False
    skip: tuple[str, ...] = ()
    bits: int = 4
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    scaled: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def for_layer(self, name: str) -> Case:
        """The case of one layer."""
        return replace(self, **next((changes for end, changes in self.layers.items() if name.endswith(end)), {}))


@dataclass
class Weight:
    """Weight [N, K]: codes [N, K] of some bits, scale and zero [N, groups], and the group of each column [K]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    bits: int = 4

    def dense(self) -> Tensor:
        """The weight in float32; in the scales' dtype it is rounded once more."""
        return (self.codes - self.zero[:, self.group]).float() * self.scale[:, self.group].float()


def random_weight(rows: int, columns: int, case: Case, generator: torch.Generator) -> Weight:
    bits = case.bits
    size = columns if case.group_size == -1 else case.group_size
    groups = columns // size
    group = torch.arange(columns) // size
    if case.act_order:
        group = group[torch.randperm(columns, generator=generator)]
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) * 0.04 + 0.01).mul(2.0 ** (4 - bits)).to(case.dtype)
    zero = torch.full((rows, groups), 2 ** (bits - 1))
    if not case.symmetric:
        zero = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    return Weight(codes, scale, zero, group, bits)


def word(codes: list[int], bits: int) -> int:
    """Codes that fill 32 bits, the lowest first, as an int32."""
    return signed(sum(code << bits * i for i, code in enumerate(codes)))


def signed(value: int) -> int:
    value %= 1 << 32
    return value - (1 << 32) if value >= 1 << 31 else value


def words(rows: list[list[int]], bits: int = 4) -> Tensor:
    """[R][C] codes -> int32 [R, ceil(C * bits / 32)], padded with zeros."""
    step = 32 // bits
    return torch.tensor(
        [[word(row[i : i + step], bits) for i in range(0, len(row), step)] for row in rows], dtype=torch.int32
    )


def gptq(weight: Weight, case: Case) -> dict[str, Tensor]:
    offset = 1 if case.version == "gptq" else 0  # v1 stores zero points less one
    zeros = [[(int(zero) - offset) % 2**weight.bits for zero in row] for row in weight.zero.T.tolist()]
    tensors = {
        "qweight": words(weight.codes.tolist(), weight.bits).T.contiguous(),
        "qzeros": words(zeros, weight.bits),
        "scales": weight.scale.T.contiguous(),
    }
    return tensors if case.method == "auto-round" else tensors | {"g_idx": weight.group.int()}


def awq(weight: Weight, case: Case) -> dict[str, Tensor]:
    def interleaved(rows: list[list[int]]) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the columns in the order of a word's nibbles, the lowest first
        return words([[row[start + i] for start in range(0, len(row), 8) for i in order] for row in rows])

    return {
        "qweight": interleaved(weight.codes.T.tolist()),
        "qzeros": interleaved(weight.zero.T.tolist()),
        "scales": weight.scale.T.contiguous(),
    }


def compressed(weight: Weight, case: Case) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(weight.codes.tolist()),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not case.symmetric:
        tensors["weight_zero_point"] = words(weight.zero.T.tolist()).T.contiguous()
    if case.act_order:
        tensors["weight_g_idx"] = weight.group.int()
    return tensors


def quantization_config(case: Case) -> dict[str, Any]:
    if case.method == "gptq":
        return {
            "quant_method": "gptq", "bits": 4, "group_size": case.group_size, "desc_act": case.act_order,
            "sym": case.symmetric, "checkpoint_format": case.version, "lm_head": case.head,
        }  # fmt: skip
    if case.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": case.group_size, "version": "gemm", "zero_point": True}
    if case.method == "auto-round":
        return {
            "quant_method": "auto-round", "bits": 4, "group_size": case.group_size, "sym": case.symmetric,
            "data_type": "int", "packing_format": AUTO_ROUND[case.version], "autoround_version": "0.9.0",
            "batch_size": 8, "iters": 200,
        }  # fmt: skip
    if case.method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    weights = {
        "num_bits": 4, "type": "int", "symmetric": case.symmetric,
        "strategy": "channel" if case.group_size == -1 else "group",
        "group_size": None if case.group_size == -1 else case.group_size, "dynamic": False,
        "actorder": "group" if case.act_order else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


def mxfp4(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Replace gpt_oss' experts [E, K, N] by blocks and scales: -> the weights [E, K, N] they represent, by name."""
    dense = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, rows, columns), generator=generator)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        blocks = [
            [
                [[row[at] | row[at + 1] << 4 for at in range(b, b + 32, 2)] for b in range(0, columns, 32)]
                for row in expert
            ]
            for expert in codes.tolist()
        ]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = torch.tensor(blocks, dtype=torch.uint8), scales
        values = torch.tensor([[[FP4[code] for code in row] for row in expert] for expert in codes.tolist()])
        power = torch.tensor(
            [[[2.0 ** (scale - 127) for scale in row] for row in expert] for expert in scales.tolist()]
        )
        dense[name] = (values * power.repeat_interleave(32, dim=-1)).mT.contiguous()
    return dense


def write(folder: Path, case: Case, seed: int = 0) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Write a checkpoint into `folder`: -> a float32 model with the same weights, and its dequantized weights."""
    model = make_model(case.model_type, seed, **FAMILIES[case.model_type] | case.values)
    generator = torch.Generator().manual_seed(seed)
    model.generation_config.max_length = 77
    dense_folder = folder.parent / f"{folder.name}-dense"
    for path in (folder, dense_folder):
        model.save_pretrained(path)
    plain = load_file(folder / "model.safetensors")
    tensors, dense, divided = dict(plain), {}, {}
    is_transposed = case.model_type == "gpt2"  # its layers store W [K, N]
    if case.method == "mxfp4":
        dense = mxfp4(tensors, generator)
    else:
        layout = {"auto-round": "awq" if case.version == "awq" else "gptq"}.get(case.method, case.method)
        layer_writer = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}[layout]
        ends = LAYERS + (("lm_head",) if case.head else ())
        for key in plain:
            name = key.removesuffix(".weight")
            if key.endswith(".weight") and name.endswith(ends) and not name.endswith(case.skip or "none"):
                layer_case = case.for_layer(name)
                shape = tensors.pop(key).shape
                weight = random_weight(*(shape[::-1] if is_transposed else shape), layer_case, generator)
                dense[key] = weight.dense()
                tensors |= {f"{name}.{part}": value for part, value in layer_writer(weight, layer_case).items()}
    for name in [name for name, _ in model.named_modules() if case.scaled and name.endswith(case.scaled)]:
        [next_layer] = [
            key for key in dense if key.startswith(name.removesuffix(case.scaled)) and key.endswith(OUTPUTS)
        ]
        scale = (torch.rand(dense[next_layer].shape[1], generator=generator) * 1.5 + 0.5).to(case.dtype)
        tensors[f"{name}.scales"], divided[next_layer] = scale, dense[next_layer] / scale.float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=quantization_config(case) | case.settings)
    weights = {key: value.T.contiguous() if is_transposed else value for key, value in (dense | divided).items()}
    save_file(plain | weights, dense_folder / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(
        dense_folder, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    ), dense


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors by name; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})
