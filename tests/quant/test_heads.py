"""Output heads in 8 and 4 bits, and the embeddings that share their codes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import specdec
from specdec.quant.config import Int4Config
from specdec.quant.heads import TiedEmbedding
from specdec.quant.int8 import Int8Linear, round_rows
from specdec.quant.linear import Int4Linear
from tests.helpers.families import FAMILIES, make_model

IDS = torch.arange(3, 40)[None] % 97
HEADS = {"int8": Int8Linear, "int4": Int4Linear}


def small(*, tied: bool = False, head: str | None = "int8", **values: object) -> PreTrainedModel:
    model = make_model("llama", **FAMILIES["llama"] | {"tie_word_embeddings": tied} | values)
    return specdec.quantize(model, Int4Config(32, head=head))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_rows_are_rounded_to_nearest_with_the_largest_at_127() -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    codes, scales = round_rows(weight)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.bfloat16
    assert codes.abs().amax(1).sub(127).abs().le(1)[torch.arange(70) != 3].all()  # the scale is rounded too
    error = (codes * scales.float()[:, None] - weight).abs()
    assert (error <= 0.5 * scales.float()[:, None] + weight.abs() / 127).all()
    assert not codes[3].any()
    assert scales[3] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [96, 40])  # of 40 columns, no kernel
@pytest.mark.usefixtures("cpu_kernels")
def test_an_8_bit_layer_is_the_product_with_its_weight_at_any_number_of_rows(
    columns: int, with_bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(70, generator=generator).to(dtype) if with_bias else None
    layer = Int8Linear(*round_rows(torch.randn(70, columns, generator=generator)), bias).eval()
    x = torch.randn(2, 9, columns, generator=generator).to(dtype)
    with torch.no_grad():
        y = layer(x)
        expected = x.float() @ layer.dequantize(torch.float32).T + (0 if bias is None else bias.float())
        assert y.dtype == dtype
        assert (y.float() - expected).norm() / expected.norm() < 0.02
        assert torch.stack([layer(row[None, None])[0, 0] for row in x.flatten(0, 1)]).equal(y.flatten(0, 1))
        layer.use_kernel = False
        assert (layer(x).float() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_quantized_and_a_tied_embedding_reads_its_codes(tied: bool, head: str) -> None:
    model = small(tied=tied, head=head)
    assert not any(module.training for module in model.modules())
    assert type(model.lm_head) is HEADS[head]
    assert isinstance(model.get_input_embeddings(), TiedEmbedding if tied else nn.Embedding)
    if tied:
        rows = model.get_input_embeddings()(IDS)
        assert rows.equal(model.lm_head.dequantize(torch.float32)[IDS])
        names = {name for name, _ in model.named_parameters() if "embed" in name or "head" in name}
        assert names == {"model.embed_tokens.like", "lm_head.weight", "lm_head.weight_scale"}
        assert model.dtype == torch.float32  # not that of a scale


@pytest.mark.parametrize("head", ["int8", "int4", None])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_loaded_with_the_same_head(tmp_path: Path, tied: bool, head: str | None) -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path / "plain")
    config = Int4Config(32, head=head)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto", quantization_config=config)
    expected = logits(quantized)
    assert logits(specdec.quantize(model, config)).equal(expected)
    quantized.save_pretrained(tmp_path / "int4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int4", dtype="auto")
    loaded.tie_weights()  # transformers ties again what its class names
    for same in (
        loaded,
        specdec.load_quantized(tmp_path / "int4"),
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(loaded)),
    ):
        assert type(same.lm_head) is type(quantized.lm_head)
        assert logits(same).equal(expected)


def test_a_checkpoint_from_before_8_bit_heads_keeps_its_head(tmp_path: Path) -> None:
    model = small(head=None)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["head"], config["quantization_config"]["activations"]
    config["quantization_config"]["quantize_head"] = False
    file.write_text(json.dumps(config))
    loaded = specdec.load_quantized(tmp_path)
    assert loaded.lm_head.weight.is_floating_point()
    assert logits(loaded).equal(logits(model))


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_a_checkpoint_that_lacks_a_part_of_the_head_is_refused(tmp_path: Path, part: str) -> None:
    small(tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"lm_head.{part}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head|lacks 4-bit tensors"):
        specdec.load_quantized(tmp_path)


def test_activations_of_16_bits_are_a_setting_that_is_saved(tmp_path: Path) -> None:
    model = make_model("llama", **FAMILIES["llama"])
    quantized = specdec.quantize(model, Int4Config(32, activations=None))
    quantized.save_pretrained(tmp_path)
    for same in (quantized, specdec.load_quantized(tmp_path)):
        assert not any(m.int8_inputs for m in same.modules() if isinstance(m, Int4Linear | Int8Linear))
    assert all(m.int8_inputs for m in small().modules() if isinstance(m, Int4Linear | Int8Linear))


@pytest.mark.parametrize("setting", ["head", "activations"])
def test_unknown_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}='int3' must be 'int8'"):
        Int4Config(**{setting: "int3"})


def test_heads_that_stay_are_named() -> None:
    with pytest.warns(UserWarning, match=r"lm_head \(named in skip_modules\)"):
        specdec.quantize(make_model("llama", **FAMILIES["llama"]), Int4Config(32, skip_modules=["lm_head"]))
    with pytest.warns(UserWarning, match=r"lm_head \(the output head shares its weights with a Gemma"):
        specdec.quantize(make_model("gemma3_text", **FAMILIES["gemma3_text"]), Int4Config(32))


def test_a_head_that_is_not_finite_is_refused_and_nothing_is_changed() -> None:
    model = make_model("llama", **FAMILIES["llama"])
    model.lm_head.weight.data[5, 5] = torch.nan
    with pytest.raises(ValueError, match="the weight of lm_head has NaN"):
        specdec.quantize(model, Int4Config(32))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
