"""Quantized checkpoints of other libraries: the same weights bit for bit, the same logits, and errors."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import specdec
from specdec.planning.footprint import measure_footprint
from specdec.quant.checkpoints import load_checkpoint, load_quantized
from specdec.quant.config import Int4Config
from specdec.quant.experts import Int4Experts
from specdec.quant.int4 import Int4Tensor
from specdec.quant.layers import is_4bit
from specdec.quant.linear import Int4Linear
from tests.helpers.checkpoint_writers import Case, edit_config, edit_tensors, quantization_config, random_weight, write
from tests.helpers.checkpoint_writers import compressed as write_compressed
from tests.helpers.families import make_model, prompts

DYNAMIC = {
    "layers.1.mlp.down_proj": {"bits": 8, "group_size": 16},
    "k_proj": {"bits": 2, "symmetric": False},
    "v_proj": {"group_size": 16, "symmetric": False, "act_order": True},
}
OF_256 = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
CASES = {
    "gptq": Case("gptq"),
    "gptq-asym": Case("gptq", symmetric=False),
    "gptq-act-order": Case("gptq", "qwen3", act_order=True, dtype=torch.bfloat16),
    "gptq-v2-asym-act-order": Case("gptq", "qwen3", version="gptq_v2", symmetric=False, act_order=True),
    "gptq-row": Case("gptq", group_size=-1),
    "gptq-16-act-order": Case("gptq", group_size=16, act_order=True),
    "gptq-odd-rows": Case("gptq", symmetric=False, values={"intermediate_size": 100}, skip=("down_proj",)),
    "gptq-tied": Case("gptq", values={"tie_word_embeddings": True}),
    "gptq-head": Case("gptq", head=True, symmetric=False, values={"vocab_size": 104}),
    "gptq-experts": Case("gptq", "mixtral", symmetric=False),
    "awq": Case("awq", symmetric=False),
    "awq-qwen3": Case("awq", "qwen3", symmetric=False, dtype=torch.bfloat16),
    "awq-row": Case("awq", symmetric=False, group_size=-1),
    "awq-256": Case("awq", symmetric=False, group_size=256, values=OF_256),
    "awq-activation-scales": Case("awq", "starcoder2", symmetric=False, scaled="mlp.act"),
    "awq-activation-scales-gptj": Case("awq", "gptj", symmetric=False, scaled="mlp.act", dtype=torch.bfloat16),
    "gptq-dynamic": Case(
        "gptq",
        layers=DYNAMIC,
        skip=("layers.1.mlp.up_proj",),
        values={"intermediate_size": 128},
        settings={
            "dynamic": {
                r"-:model\.layers\.1\.mlp\.up_proj": {},
                r"+:.*\.layers\.1\.mlp\.(up|down)_proj": {"bits": 8, "group_size": 16},
                ".*k_proj": {"bits": 2, "sym": False},
                ".*v_proj": {"group_size": 16, "sym": False, "desc_act": True},
                ".*k_proj|up_proj": {"bits": 8},
            }
        },
    ),
    "gptq-v2-dynamic": Case(
        "gptq",
        "qwen3",
        version="gptq_v2",
        symmetric=False,
        act_order=True,
        dtype=torch.bfloat16,
        layers={"down_proj": {"bits": 8}, "o_proj": {"bits": 2}},
        settings={"dynamic": {".*down_proj": {"bits": 8}, ".*o_proj": {"bits": 2}}},
    ),
    "gptq-gpt2": Case(
        "gptq",
        "gpt2",
        symmetric=False,
        layers={"mlp.c_proj": {"bits": 8}},
        settings={"dynamic": {".*mlp.c_proj": {"bits": 8}}},
    ),
    "auto-round": Case(
        "auto-round",
        version="gptq",
        symmetric=False,
        skip=("k_proj",),
        settings={
            "extra_config": {
                "model.layers.0.self_attn.k_proj": {"bits": 16, "data_type": "float"},
                ".*layers\\.1.*k_proj": {"bits": 16},
            }
        },
    ),
    "auto-round-unshifted": Case(
        "auto-round",
        version="gptq_v2",
        symmetric=False,
        layers={"down_proj": {"bits": 8}, "q_proj": {"group_size": 16}},
        settings={"extra_config": {".*down_proj": {"bits": 8}, ".*q_proj": {"group_size": 16}}},
    ),
    "auto-round-awq": Case("auto-round", "qwen3", version="awq", symmetric=False),
    "compressed": Case("compressed-tensors", dtype=torch.bfloat16),
    "compressed-asym": Case("compressed-tensors", "qwen3", symmetric=False),
    "compressed-act-order": Case("compressed-tensors", act_order=True, dtype=torch.float32),
    "compressed-row": Case("compressed-tensors", group_size=-1),
    "compressed-odd-rows": Case(
        "compressed-tensors",
        group_size=-1,
        symmetric=False,
        values={"intermediate_size": 100, "tie_word_embeddings": True},
    ),
    "mxfp4": Case("mxfp4", "gpt_oss"),
}


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case, its folder, the full-precision model with the same weights and these weights; not to be changed."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return CASES[request.param], folder, *write(folder, CASES[request.param])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPTQ checkpoint to damage."""
    return copy_of(Case("gptq"), tmp_path)


def copy_of(case: Case, tmp_path: Path) -> Path:
    write(tmp_path / "checkpoint", case)
    return tmp_path / "checkpoint"


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "specdec keeps in full precision")
        return load_quantized(folder, **kwargs)


def in_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.use_kernel = False
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of all positions but padding of three prompts of different lengths."""
    batch = prompts(3)
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()].float()


def is_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit, dtypes included."""

    def bits(value: Tensor) -> tuple[Any, ...]:
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()

    return state.keys() == other.keys() and all(bits(value) == bits(other[name]) for name, value in state.items())


def test_weights_are_those_of_the_format_bit_for_bit(written: Any) -> None:
    case, folder, _, dense = written
    model = load(folder)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            layer_case = case.for_layer(name)
            assert layer_case.bits == 4
            assert module.weight_scale.dtype == case.dtype
            assert (module.weight_zero is None) == layer_case.symmetric
            assert (module.weight_perm is not None) == layer_case.act_order
            found[f"{name}.weight"] = module.dequantize()
        elif case.for_layer(name).bits != 4 and f"{name}.weight" in dense:
            found[f"{name}.weight"] = module.weight.T if isinstance(module, Conv1D) else module.weight
        if isinstance(module, Int4Experts):
            found |= {f"{name}.{part}": module.int4(part).dequantize().mT for part in ("gate_up_proj", "down_proj")}
    expected = {name: value for name, value in dense.items() if "block_sparse_moe" not in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value.to(found[name].dtype)), name


def test_logits_are_those_of_the_plain_model(written: Any) -> None:
    _, folder, plain, _ = written
    model = in_full_precision(load(folder, dtype=torch.float32, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=0)


def test_logits_with_the_kernel_are_close(written: Any) -> None:
    _, folder, plain, _ = written
    expected = logits(plain)
    error = (logits(load(folder, dtype=torch.float32)) - expected).abs()
    assert error.mean() < 0.04 * expected.abs().mean()


def test_saved_and_loaded_again_it_is_the_same(written: Any, tmp_path: Path) -> None:
    _, folder, _, _ = written
    model = load(folder)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "specdec_int4"
    assert is_same(model.state_dict(), again.state_dict())
    assert again.dtype == model.dtype


def test_the_model_has_the_name_and_generation_config_of_its_checkpoint(written: Any) -> None:
    _, folder, _, _ = written
    model = load(folder)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert model.generation_config.max_length == 77
    assert model.dtype == torch.float32
    assert not model.training
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_generates_what_plain_decoding_does(tmp_path: Path) -> None:
    model = load(copy_of(CASES["gptq-act-order"], tmp_path))
    batch = prompts(3)
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    assert model.generate(**batch, max_new_tokens=12, do_sample=False).equal(expected)


def test_shards_and_a_quantization_config_in_its_own_file(folder: Path) -> None:
    whole = load(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    # The parts of a layer are in different files
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    del settings["quant_method"], settings["checkpoint_format"]
    edit_config(folder, quantization_config=None)
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert is_same(load(folder).state_dict(), whole)


def test_the_checkpoints_dtype_where_the_config_names_none(folder: Path) -> None:
    edit_config(folder, dtype=None)
    edit_tensors(
        folder,
        **{n: v.bfloat16() for n, v in load_file(folder / "model.safetensors").items() if v.dtype == torch.float32},
    )
    assert load(folder).dtype == torch.bfloat16


def test_symmetric_zero_points_of_the_other_version(folder: Path) -> None:
    """Some checkpoints say gptq and have gptq_v2's zero points."""
    expected = load(folder).state_dict()
    edit_config(folder, quantization_config=quantization_config(Case("gptq", version="gptq_v2")))
    assert is_same(load(folder).state_dict(), expected)


@pytest.mark.parametrize("in_own_file", [False, True])
def test_settings_of_awq_under_their_old_names(in_own_file: bool, tmp_path: Path) -> None:
    folder = copy_of(CASES["awq"], tmp_path)
    expected = load(folder).state_dict()
    settings = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    edit_config(folder, quantization_config=None if in_own_file else {"quant_method": "awq"} | settings)
    if in_own_file:
        (folder / "quant_config.json").write_text(json.dumps(settings))
    assert is_same(load(folder).state_dict(), expected)


def test_settings_in_the_text_models_part(tmp_path: Path) -> None:
    """Of a multimodal model, whose other parts are not quantized."""
    dense, _ = write(tmp_path / "checkpoint", Case("gptq", "gemma3", skip=("out_proj", "q_proj", "k_proj", "v_proj")))
    folder = tmp_path / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    for read in (load, load_checkpoint):
        model = in_full_precision(read(folder, attn_implementation="eager"))
        assert isinstance(model.model.language_model.layers[1].mlp.up_proj, Int4Linear)
        torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())["text_config"]
    assert is_same(load(tmp_path / "saved").state_dict(), model.state_dict())


def test_settings_that_are_no_object(folder: Path) -> None:
    edit_config(folder, quantization_config=None, text_config={"quantization_config": [4]})
    with pytest.raises(ValueError, match=r"the quantization_config in .*config.json is no JSON object"):
        load(folder)
    edit_config(folder, text_config=None)
    file = folder / "hf_quant_config.json"
    for content, match in (
        ("{", "hf_quant_config.json is no JSON"),
        ("[4]", r"hf_quant_config.json holds no JSON object, but '\[4\]'"),
        ('{"quantization": {"quant_algo": "NVFP4"}}', r"'modelopt' \(\{'quant_algo': 'NVFP4'\}\) cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=match):
            load(folder)


def test_layers_of_other_bits_are_dequantized_and_named(tmp_path: Path) -> None:
    folder = copy_of(CASES["gptq-v2-dynamic"], tmp_path)
    with pytest.warns(UserWarning, match="specdec keeps in full precision") as caught:
        load_quantized(folder)
    [message] = [str(warning.message) for warning in caught if "specdec" in str(warning.message)]
    assert (
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj (of 8 bits in the checkpoint; 4-bit layers hold 4)"
        in message
    )
    assert "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj (of 2 bits" in message


def test_a_quantized_layer_that_the_settings_leave_out_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config=GPTQ | {"dynamic": {"-:.*down_proj": {}}})
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj has quantized tensors, but the checkpoint's config leaves it in"
    ):
        load(folder)


ACT = "model.layers.0.mlp.act.scales"


@pytest.mark.parametrize(
    ("name", "scale", "match"),
    [
        (ACT, torch.ones(95), rf"{ACT} is torch.float32 \[95\], but must be floating \[K\], with K of \[64, 96\]"),
        (ACT, torch.ones(1, 96), rf"{ACT} is torch.float32 \[1, 96\]"),
        (ACT, torch.ones(96, dtype=torch.int32), rf"{ACT} is torch.int32 \[96\]"),
        (ACT, torch.arange(96).half(), rf"{ACT} has NaN, infinite or zero values"),
        (ACT, torch.full((96,), torch.nan), rf"{ACT} has NaN, infinite or zero values"),
        ("model.norm.scales", torch.ones(64), "has model.norm.scales, where this model has no activation function"),
        (
            "model.no.layer.scales",
            torch.ones(64),
            "has model.no.layer.scales, where this model has no activation function",
        ),
    ],
)
def test_activation_scales_that_do_not_fit_are_refused(
    name: str, scale: Tensor, match: str, scaled_folder: Path
) -> None:
    tensors = load_file(scaled_folder / "model.safetensors")
    damaged(match, scaled_folder, **{name: scale})
    save_file(tensors, scaled_folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def scaled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(CASES["awq-activation-scales"], tmp_path_factory.mktemp("scaled"))


def test_a_saved_activation_scale_that_is_missing_or_wrong(scaled_folder: Path, tmp_path: Path) -> None:
    load(scaled_folder).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.act.activation_scale"
    damaged(rf"{name} is torch.float16 \[95\]", tmp_path, **{name: torch.ones(95).half()})
    damaged("lacks 4-bit tensors, or has too many: .*'activation_scale': 2", tmp_path, **{name: None})


def test_compressed_tensors_of_early_versions(tmp_path: Path) -> None:
    """Zero points not packed, an order that was never set, and layers of two group sizes."""
    folder = copy_of(CASES["compressed-asym"], tmp_path)
    model = load(folder)
    expected = model.state_dict()
    name = "model.layers.0.mlp.up_proj"
    zero = (model.get_submodule(name).weight_zero.int() - 8).to(torch.int8)
    unset = {f"{name}.weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    edit_tensors(folder, **{f"{name}.weight_zero_point": zero}, **unset)
    settings = quantization_config(CASES["compressed-asym"])
    group = settings["config_groups"]["group_0"]
    other = group | {"weights": group["weights"] | {"group_size": 64}}
    edit_config(folder, quantization_config=settings | {"config_groups": {"group_0": group, "group_1": other}})
    assert is_same(load(folder).state_dict(), expected)


def test_groups_of_layers_that_differ_in_symmetry_are_refused(tmp_path: Path) -> None:
    """With both in one checkpoint a missing zero point would look like a symmetric layer."""
    folder = copy_of(CASES["compressed"], tmp_path)
    settings = quantization_config(CASES["compressed"])
    group = settings["config_groups"]["group_0"]
    other = group | {"weights": group["weights"] | {"symmetric": False}}
    edit_config(folder, quantization_config=settings | {"config_groups": {"group_0": group, "group_1": other}})
    with pytest.raises(ValueError, match="config_groups that differ in symmetric or actorder"):
        load(folder)


def test_scales_that_are_not_finite_are_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    scales = load_file(folder / "model.safetensors")[f"{name}.scales"]
    scales[0, 0] = torch.nan
    edit_tensors(folder, **{f"{name}.scales": scales})
    with pytest.raises(ValueError, match=f"the scales of {name} have NaN or infinite values"):
        load(folder)


def test_biases_of_zeros_for_layers_without_one(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, **{name: torch.zeros(64)})
    assert name not in load(folder).state_dict()
    edit_tensors(folder, **{name: torch.ones(64)})
    with pytest.raises(ValueError, match=f"{name}, this model has none"):
        load(folder)


def test_experts_in_full_precision_give_one_warning(tmp_path: Path) -> None:
    folder = copy_of(CASES["gptq-experts"], tmp_path)
    with pytest.warns(
        UserWarning, match=r"full precision: model.layers.0.block_sparse_moe.experts.0.w1, .* 21 more"
    ) as caught:
        load_quantized(folder)
    assert len([warning for warning in caught if "specdec" in str(warning.message)]) == 1


def test_a_draft_model_may_be_a_quantized_checkpoint(folder: Path) -> None:
    target = load_quantized(folder)
    specdec.enable(target, folder, num_draft_tokens=3)
    target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)
    assert specdec.last_stats(target).draft_acceptance_rate == 1.0


def test_layers_without_a_place_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"has 4-bit parts for model.layers.1.mlp.down_proj, where this model has no layer"
    ):
        load_quantized(folder)
    ignored = [r"model\.layers\.1\."]  # a family's own list of layers that only training needs
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", ignored)
    assert len(load_quantized(folder).model.layers) == 1


def test_a_plain_checkpoint_is_quantized(tmp_path: Path) -> None:
    make_model(
        "llama", **CASES["gptq"].values, hidden_size=64, intermediate_size=128, num_hidden_layers=1
    ).save_pretrained(tmp_path)
    model = load(tmp_path, config=Int4Config(group_size=64, symmetric=False))
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int4Linear)
    assert (layer.group_size, layer.weight_zero is None) == (64, False)
    model.save_pretrained(tmp_path / "saved")
    assert is_same(load(tmp_path / "saved").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="quantized already, by specdec_int4; leave config out"):
        load(tmp_path / "saved", config=Int4Config())


# Results of the formats' own libraries.


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_compressed_tensors_own_library(symmetric: bool, group_size: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    case = Case("compressed-tensors", symmetric=symmetric, group_size=group_size, values={"num_hidden_layers": 1})
    settings = quantization_config(case)["config_groups"]["group_0"]
    scheme = QuantizationScheme(**settings)
    folder = copy_of(case, tmp_path)
    name = "model.layers.0.mlp.gate_proj"
    weight = random_weight(96, 64, case, torch.Generator().manual_seed(3))
    theirs = PackedQuantizationCompressor.compress(
        {
            "weight": weight.dense().to(case.dtype),
            "weight_scale": weight.scale,
            "weight_zero_point": (weight.zero - 8).to(torch.int8),
        },
        scheme,
    )
    written = write_compressed(weight, case)
    assert all(theirs[part].equal(written[part]) for part in written)
    edit_tensors(folder, **{f"{name}.{part}": theirs[part] for part in written})
    dense = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert load(folder).get_submodule(name).dequantize().equal(dense)


def test_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = copy_of(CASES["mxfp4"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts"
    experts = load(folder).get_submodule(name)
    for part in ("gate_up_proj", "down_proj"):
        theirs = convert_moe_packed_tensors(tensors[f"{name}.{part}_blocks"], tensors[f"{name}.{part}_scales"])
        assert experts.int4(part).dequantize(torch.bfloat16).mT.equal(theirs)


def test_mxfp4_stays_in_four_bits(tmp_path: Path) -> None:
    experts = load(copy_of(CASES["mxfp4"], tmp_path)).model.layers[0].mlp.experts
    assert isinstance(experts, Int4Experts)
    assert isinstance(experts.int4("down_proj"), Int4Tensor)
    num_bytes = sum(
        value.nbytes for name, value in experts.named_parameters() if name in ("down_proj", "down_proj_scale")
    )
    assert num_bytes < 0.6 * experts.num_experts * 64 * 96


# Checkpoints that cannot be read.

Q_PROJ = "model.layers.1.self_attn.q_proj"


def damaged(match: str, folder: Path, **changes: Tensor | None) -> None:
    edit_tensors(folder, **changes)
    with pytest.raises(ValueError, match=match):
        load(folder)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_companion(part: str, folder: Path) -> None:
    damaged(rf"has {Q_PROJ}\.\w+ but no {Q_PROJ}\.{part}; .*download it again", folder, **{f"{Q_PROJ}.{part}": None})


def test_a_missing_order(tmp_path: Path) -> None:
    folder = copy_of(CASES["gptq-act-order"], tmp_path)
    damaged(rf"but no {Q_PROJ}\.g_idx;", folder, **{f"{Q_PROJ}.g_idx": None})


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_companion_in_compressed_tensors(part: str, tmp_path: Path) -> None:
    folder = copy_of(CASES["compressed-asym"], tmp_path)
    damaged(rf"but no {Q_PROJ}\.{part};", folder, **{f"{Q_PROJ}.{part}": None})


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_a_missing_companion_in_mxfp4(part: str, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    damaged(rf"but no {name}_{part};", copy_of(CASES["mxfp4"], tmp_path), **{f"{name}_{part}": None})


@pytest.mark.parametrize("name", [f"{Q_PROJ}.qweight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    gone = {other: None for other in tensors if other.startswith(name.removesuffix("qweight"))}
    damaged(f"lacks {name.replace('qweight', 'weight')}|lacks the 4-bit parts of {Q_PROJ}", folder, **gone)


def test_a_wrong_shape(folder: Path) -> None:
    damaged(
        rf"{Q_PROJ}\.scales is torch.float16 \[2, 60\], but must be .* \[2, 64\]",
        folder,
        **{f"{Q_PROJ}.scales": torch.ones(2, 60).half()},
    )


def test_an_empty_tensor(folder: Path) -> None:
    empty = {f"{Q_PROJ}.qweight": torch.zeros(0, 64, dtype=torch.int32), f"{Q_PROJ}.scales": torch.ones(0, 64).half()}
    damaged(rf"{Q_PROJ}\.qweight is torch.int32 \[0, 64\], but must be torch.int32 \[any, any\]", folder, **empty)


def test_zero_points_beyond_four_bits(tmp_path: Path) -> None:
    zero = torch.full((64, 2), 8, dtype=torch.int8)
    name = f"{Q_PROJ}.weight_zero_point"
    damaged(rf"{name} has numbers outside of four bits", copy_of(CASES["compressed-asym"], tmp_path), **{name: zero})


def test_a_weight_of_another_model(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)
    damaged(r"mlp\.down_proj\.qweight is of a weight \[64, 96\], but this model has \[64, 128\]", folder)


def test_a_wrong_dtype(folder: Path) -> None:
    damaged(
        rf"{Q_PROJ}\.qweight is torch.int64 .* must be torch.int32",
        folder,
        **{f"{Q_PROJ}.qweight": torch.ones(8, 64).long()},
    )


@pytest.mark.parametrize("value", [torch.ones(60), torch.ones(64, dtype=torch.int32)])
def test_a_plain_tensor_of_wrong_shape_or_dtype(value: Tensor, folder: Path) -> None:
    damaged(
        r"model.norm.weight is torch\.\w+ \[6\d\], but this model has \[64\]", folder, **{"model.norm.weight": value}
    )


def test_uneven_groups(folder: Path) -> None:
    order = torch.zeros(64, dtype=torch.int32)
    damaged(rf"{Q_PROJ}\.g_idx must put 32 input columns into each of 2 groups", folder, **{f"{Q_PROJ}.g_idx": order})
    damaged(rf"{Q_PROJ}\.g_idx must put 32 input columns", folder, **{f"{Q_PROJ}.g_idx": order - 1})


def test_a_last_group_of_another_size(folder: Path) -> None:
    edit_config(folder, quantization_config=quantization_config(Case("gptq", group_size=64)))
    damaged(r"model.layers.0.mlp.down_proj has 96 input columns, which group_size=64 does not divide", folder)


def test_a_group_size_that_does_not_fit_the_tensors(folder: Path) -> None:
    edit_config(folder, quantization_config=quantization_config(Case("gptq", group_size=-1)))
    damaged(r"\.scales has 3 groups, but 96 input columns in groups of -1 make 1", folder)


def test_mxfp4_of_another_model(tmp_path: Path) -> None:
    folder = copy_of(CASES["mxfp4"], tmp_path)
    edit_config(folder, intermediate_size=128)
    damaged(r"experts.down_proj_blocks is of experts \[4, 64, 96\], but this model has \[4, 64, 128\]", folder)
    edit_config(folder, intermediate_size=96)
    zeros = torch.zeros(4, 64, 3, 16, dtype=torch.uint8)
    blocks = {"model.norm_blocks": zeros, "model.norm_scales": zeros[..., 0].contiguous()}
    damaged("model.norm_blocks has no place in this model; MXFP4 is read for gpt_oss", folder, **blocks)


def test_a_quantized_head_that_is_tied(tmp_path: Path) -> None:
    folder = copy_of(replace(CASES["gptq-head"], values={"vocab_size": 104}), tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    damaged("lm_head is quantized, but config.json ties it", folder)


def test_files_that_cannot_be_read(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    damaged_file(r"model.safetensors cannot be read \(.*\); .*download it again", folder)
    file.write_bytes(b"")
    damaged_file("model.safetensors cannot be read", folder)
    file.unlink()
    damaged_file("has no weights, no", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    damaged_file(r"only pytorch_model.bin; a pickle can run code and is not read, so convert it to safetensors", folder)


def test_an_index_that_does_not_fit(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names | {"lm_head.weight": "model-2.safetensors"}}))
    damaged_file("model.safetensors.index.json names model-2.safetensors, which is not in", folder)
    index.write_text(json.dumps({"weight_map": names | {"model.more": "model.safetensors"}}))
    damaged_file("model.safetensors has no model.more, where the index names it", folder)
    index.write_text("{}")
    damaged_file("is no index of safetensors files .*weight_map", folder)
    index.unlink()
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    damaged_file("has several safetensors files and no index", folder)


def damaged_file(match: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load(folder)


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(
    weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **values: Any
) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | (weights or {})} | (group or {})}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | values


GPTQ = quantization_config(Case("gptq"))
AWQ = quantization_config(Case("awq"))
AUTO_ROUND = quantization_config(Case("auto-round"))
UNREAD = [
    (GPTQ | {"bits": 8}, r"gptq checkpoint has bits=8; only 4"),
    ({"quant_method": "gptq"}, r"gptq checkpoint has bits=None; only 4"),
    (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format='marlin'; only 'gptq' or 'gptq_v2'"),
    (GPTQ | {"group_size": 24}, r"gptq checkpoint has group_size=24; only 16 or 32 or 64 or 128 or 256 or -1"),
    (AWQ | {"bits": 3}, r"awq checkpoint has bits=3"),
    (AWQ | {"version": "GEMV"}, r"awq checkpoint has version='gemv'; only 'gemm'"),
    (AWQ | {"backend": "llm-awq"}, r"backend='llm-awq'"),
    (compressed(format="marlin-24"), r"compressed-tensors checkpoint has format='marlin-24'; only 'pack-quantized'"),
    (compressed(group={"format": "int-quantized"}), r"format='int-quantized'"),
    (compressed({"num_bits": 8}), r"num_bits=8"),
    (compressed({"type": "float"}), r"type='float'; only 'int'"),
    (compressed({"strategy": "tensor"}), r"strategy='tensor'; only 'group' or 'channel'"),
    (compressed(group={"input_activations": {"num_bits": 8}}), r"input_activations="),
    (compressed(group={"output_activations": {"num_bits": 8}}), r"output_activations="),
    (compressed(group={"weights": None}), r"num_bits=None"),
    (compressed(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme="),
    (compressed(transform_config={"config_groups": {"u": {}}}), r"config_groups="),
    (compressed(sparsity_config={"format": "sparse-bitmask"}), r"format='sparse-bitmask'"),
    (compressed(config_groups={}), r"no config_groups"),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"quant_method='bitsandbytes' cannot be read, only 'gptq'.*full precision",
    ),
    (
        {"quant_method": "fp8"},
        r"quant_method='fp8' cannot be read.*transformers or vLLM reads it, or write its bfloat16",
    ),
    ({"quant_method": "hqq"}, r"quant_method='hqq' cannot be read"),
    ({"bits": 4}, r"quant_method=None cannot be read"),
    ({"quant_method": ["gptq"]}, r"quant_method=\['gptq'\] cannot be read"),
    (
        {"quant_method": "fbgemm_fp8"},
        r"fbgemm_fp8.*; transformers with the fbgemm-gpu package reads it, or load the original",
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        r"'modelopt' \(NVFP4\) cannot be read.*vLLM or TensorRT-LLM reads it, or load",
    ),
    ({"quant_method": "torchao", "quant_type": {}}, r"'torchao' cannot be read.*transformers with the torchao package"),
    ({"quant_method": "exl3", "bits": 4.0}, r"'exl3' cannot be read.*ExLlamaV3 reads it"),
    (
        compressed(format="nvfp4-pack-quantized"),
        r"format='nvfp4-pack-quantized'; only 'pack-quantized' can be read; transformers with the",
    ),
    (
        compressed(format="float-quantized"),
        r"format='float-quantized'; .* reads others, or load the original in full precision",
    ),
    (compressed(format="int-quantized"), r"format='int-quantized'"),
    (GPTQ | {"is_marlin_format": True}, r"is_marlin_format=True; only False can be read"),
    (GPTQ | {"pack_dtype": "int8"}, r"pack_dtype='int8'"),
    (
        GPTQ | {"dynamic": {"+:.*k_proj": {"bits": 3}}},
        r": \+:\.\*k_proj of dynamic of this gptq checkpoint has bits=3; only 4 or 2 or 8",
    ),
    (
        GPTQ | {"dynamic": {"*k_proj": {}}},
        r"dynamic of this gptq checkpoint has '\*k_proj', which is no regular expression",
    ),
    (GPTQ | {"dynamic": {"k{9999999999999}": {}}}, r"has 'k\{9+\}', which is no regular expression \(the repetition"),
    (GPTQ | {"dynamic": {"k_proj": 8}}, r"k_proj=8, but it must be an object with names"),
    (GPTQ | {"dynamic": ["k_proj"]}, r"dynamic=\['k_proj'\], but it must be an object with names"),
    (
        AUTO_ROUND | {"packing_format": "auto_round:fp8"},
        r"packing_format='auto_round:fp8'; only 'auto_round:auto_gptq' or",
    ),
    (AUTO_ROUND | {"data_type": "mx_fp"}, r"data_type='mx_fp'"),
    (AUTO_ROUND | {"act_bits": 8}, r"act_bits=8; only 16 or 32"),
    (
        AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 3}}},
        r"lm_head of extra_config of this auto-round checkpoint has bits=3",
    ),
    (AUTO_ROUND | {"extra_config": {"(": {}}}, r"'\(', which is no regular expression"),
    # settings of wrong types
    (GPTQ | {"bits": [4]}, r"bits=\[4\]; only 4"),
    (GPTQ | {"group_size": "32"}, r"group_size='32'; only 16 or"),
    (GPTQ | {"group_size": 32.0}, r"group_size=32\.0"),
    (GPTQ | {"sym": "no"}, r"sym='no'; only False or True"),
    (AWQ | {"version": 4}, r"version=4"),
    (AWQ | {"zero_point": "yes"}, r"zero_point='yes'; only True or False"),
    (
        compressed(config_groups=[WEIGHTS]),
        r"config_groups=\[.*\], but it must be an object with names; is config.json damaged",
    ),
    (compressed(config_groups={"group_0": 4}), r"group_0=4, but it must be an object"),
    (compressed(group={"weights": "int4"}), r"weights='int4', but it must be an object"),
    (compressed(sparsity_config=[]), r"sparsity_config=\[\], but it must be an object"),
    (compressed({"group_size": 12}), r"group_size=12"),
    (compressed({"group_size": None}), r"group_size=None"),
]


@pytest.fixture(scope="module")
def any_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(Case("gptq", values={"num_hidden_layers": 1}), tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize(("settings", "match"), UNREAD, ids=[match for _, match in UNREAD])
def test_formats_that_are_not_read(settings: dict[str, Any], match: str, any_folder: Path) -> None:
    edit_config(any_folder, quantization_config=settings)
    with pytest.raises(ValueError, match=match):
        load(any_folder)


def test_an_fp8_checkpoint_loads_as_the_error_says(tmp_path: Path) -> None:
    """The statement in the message, run as it is, writes the folder that is then quantized while it loads."""
    source, copied = tmp_path / "fp8", tmp_path / "bfloat16"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = make_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model.to(torch.bfloat16).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().view(-1, min(rows, 128), columns // 128, 128)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        expected[name] = (codes.float() * scale).view(rows, columns).to(torch.bfloat16)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.view(rows, columns), scale.view(-1, columns // 128)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    statements = set()
    for arguments in ({}, {"config": Int4Config()}):
        with pytest.raises(ValueError, match="fp8") as error:
            load(source, **arguments)
        statements.add(str(error.value)[str(error.value).index("AutoModelForCausalLM") :])
    (statement,) = statements
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "FineGrainedFP8Config": FineGrainedFP8Config}
    eval(statement, names | {"PATH": source, "FOLDER": copied})
    written = load_file(copied / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())
    assert is_4bit(load(copied))
    planned, of_copy = (measure_footprint(folder, device="cpu") for folder in (source, copied))
    assert (planned.checkpoint_method, of_copy.checkpoint_method) == ("fp8", None)
    assert (planned.plain_bytes, planned.int4_bytes) == (of_copy.plain_bytes, of_copy.int4_bytes)


def test_invalid_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantized already, by gptq; leave config out"):
        load(folder, config=Int4Config())
    with pytest.raises(ValueError, match="takes no quantization_config; give an Int4Config as config="):
        load(folder, quantization_config=Int4Config())
    with pytest.raises(ValueError, match="takes no state_dict"):
        load(folder, state_dict={})
    with pytest.raises(
        ValueError, match="from 'no-such/model': it is no local folder and cannot be downloaded from the hub"
    ):
        load("no-such/model")
    with pytest.raises(ValueError, match=r"'\./no/such/folder': it is no local folder"):
        load("./no/such/folder")
