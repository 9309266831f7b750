"""Checkpoints damaged at random: each loads, or raises an error of the documented types."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.quant.checkpoints import load_quantized
from tests.helpers.checkpoint_writers import Case, edit_config, write

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}
CASES = {
    "gptq": Case(
        "gptq", act_order=True, layers={"down_proj": {"bits": 8}}, settings={"dynamic": {"+:.*down_proj": {"bits": 8}}},
        values=ONE_LAYER,
    ),
    "gptq-experts": Case("gptq", "mixtral", symmetric=False, values=ONE_LAYER | {"num_local_experts": 2}),
    "awq": Case("awq", "starcoder2", symmetric=False, scaled="mlp.act", values=ONE_LAYER),
    "auto-round": Case(
        "auto-round", version="gptq_v2", symmetric=False, skip=("k_proj",),
        settings={"extra_config": {".*k_proj": {"bits": 16}}},
        values=ONE_LAYER,
    ),
    "compressed-tensors": Case("compressed-tensors", symmetric=False, act_order=True, values=ONE_LAYER),
    "mxfp4": Case("mxfp4", "gpt_oss", values=ONE_LAYER),
}  # fmt: skip
ROUNDS = 24
VALUES = [None, True, False, -1, 0, 3, 4, 4.0, 1e30, "4", "", "*", [], [4], {}, {"a": [1]}, {"a": {"bits": 4}}]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float64,
]


def damage_settings(settings: dict[str, Any], rng: random.Random) -> None:
    """Remove or replace a setting, at any depth."""
    paths = [(settings, key) for key in settings]
    for table, key in paths:
        if isinstance(table[key], dict):
            paths += [(table[key], inner) for inner in table[key]]
    table, key = rng.choice(paths)
    if rng.random() < 0.2:
        del table[key]
    else:
        table[key] = rng.choice(VALUES)


def damage_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Remove a tensor, or give it another name, shape, dtype or content."""
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    damage = rng.choice(["missing", "renamed", "flat", "deeper", "shorter", "empty", "scalar", "dtype", "bits"])
    if damage == "renamed":
        name = rng.choice(
            [name.replace("model.", "", 1), name.rpartition(".")[0] + ".scales", "x" + name, name.rpartition(".")[2]]
        )
    elif damage == "flat":
        value = value.flatten()
    elif damage == "deeper":
        value = value[None]
    elif damage == "shorter":
        value = value[: len(value) // 2]
    elif damage == "empty":
        value = value[:0]
    elif damage == "scalar":
        value = value.flatten()[0]
    elif damage == "dtype":
        value = value.float().to(rng.choice(DTYPES))
    elif damage == "bits":
        generator = torch.Generator().manual_seed(rng.randrange(1000))
        value = (
            torch.randint(256, (value.nbytes,), dtype=torch.uint8, generator=generator)
            .view(value.dtype)
            .view(value.shape)
        )
    if damage != "missing":
        tensors[name] = value.contiguous()


@pytest.mark.parametrize("name", CASES)
def test_damaged_checkpoints_load_or_raise_an_error_of_the_documented_types(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    folder = tmp_path / "checkpoint"
    write(folder, CASES[name])
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    refused = []
    for _ in range(ROUNDS):
        damaged_settings, damaged_tensors = copy.deepcopy(settings), dict(tensors)
        if rng.random() < 0.5:
            damage_settings(damaged_settings, rng)
        else:
            damage_tensors(damaged_tensors, rng)
        edit_config(folder, quantization_config=damaged_settings)
        save_file(damaged_tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_quantized(folder)
            except (ValueError, TypeError, OSError, ImportError) as error:
                refused.append(str(error))
    assert len(refused) > ROUNDS // 3
