"""MTP layers: the numbers of transformers' own module, what they draft, which checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters.head_checkpoint import load_head, make_head
from specdec.drafters.mtp import MtpHead
from specdec.generation.enable import decoding_of
from specdec.planning.footprint import measure_draft_footprint
from specdec.runtime.loading import load
from specdec.runtime.runner import ModelRunner
from specdec.utils.numerics import relative_error
from tests.helpers.families import FAMILIES, REFUSED, make_model, prompts
from tests.helpers.heads import chain_draft, drafts_of_greedy_call
from tests.helpers.mtp import random_mtp, write_mtp
from tests.helpers.recording import recorded

_SMALL = FAMILIES["llama"] | {"head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
# A model of each kind whose checkpoints have an MTP layer: model_type, config, layout.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "DeepSeek-V3": ("deepseek_v3", FAMILIES["deepseek_v3"], "deepseek"),
    "GLM-4-MoE": (
        "glm4_moe",
        _SMALL | _EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "deepseek",
    ),
    "Qwen3-Next": ("qwen3_next", REFUSED["qwen3_next"], "qwen"),
    "Qwen3.5": (
        "qwen3_5_text",
        {name: value for name, value in REFUSED["qwen3_next"].items() if "expert" not in name},
        "qwen",
    ),
    "MiMo": ("qwen2", FAMILIES["qwen2"], "mimo"),
}
RUNNING = ["DeepSeek-V3", "GLM-4-MoE", "MiMo"]  # the others have recurrent layers


def make_target(name: str) -> PreTrainedModel:
    model_type, values, _ = MODELS[name]
    return make_model(model_type, seed=3, **values)


@torch.no_grad()
def oracle_logits(target: PreTrainedModel, tensors: dict[str, Tensor], ids: Tensor, states: Tensor, layout: str) -> Any:
    """Logits [1, L, V] of transformers' module for ids [1, L] and the states of the positions before, [1, L, H]."""
    modeling_layers: Any = pytest.importorskip("transformers.modeling_layers")
    config: Any = target.config
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    config.mtp_hidden_states_first = layout == "mimo"
    module = modeling_layers.MtpModel(target, 1).eval()
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("layers.")]
    positions = 1 + torch.arange(ids.shape[1])[None]
    output = module.forward_layer(0, states, positions, None, input_ids=ids)
    return module._project_to_logits(output)


@pytest.mark.parametrize("name", MODELS)
def test_its_logits_are_those_of_transformers_module(name: str, tmp_path: Path) -> None:
    target, layout = make_target(name), MODELS[name][2]
    tensors = write_mtp(tmp_path, target, layout)
    head = load_head(str(tmp_path), target)
    assert isinstance(head, MtpHead)
    assert head.settings.feature_layers == (target.config.num_hidden_layers,)
    text = torch.randint(101, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = target(input_ids=text, output_hidden_states=True, use_cache=False)
    states = output.hidden_states[head.settings.feature_layers[0]][:, :-1]
    assert relative_error(target.get_output_embeddings()(states), output.logits[:, :-1]) < 1e-5  # behind the last norm
    expected = oracle_logits(target, tensors, text[:, 1:], states, layout)
    runner, positions = ModelRunner(head), torch.arange(11)[None]
    runner.begin(1)
    runner.cache.window.reserve(11)
    with torch.inference_mode():
        runner.cache.features.write(positions, states[:, :, None])
    assert relative_error(runner.forward(text[:, 1:], positions).logits, expected) < 1e-5


@pytest.mark.parametrize(("name", "compile"), [*((name, False) for name in RUNNING), ("MiMo", True)])
def test_it_drafts_what_a_forward_over_the_whole_text_gives(name: str, compile: bool, tmp_path: Path) -> None:
    target = make_target(name)
    drafter = random_mtp(target, tmp_path, MODELS[name][2])
    specdec.enable(target, drafter, num_draft_tokens=3, compile=compile)
    assert decoding_of(target) == ("compiled" if compile else "eager")
    for text, draft in drafts_of_greedy_call(target):
        assert draft == chain_draft(drafter.head, target, text, len(draft)), f"behind {len(text)} ids"


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
def test_texts_are_the_plain_ones(name: str, is_recorded: bool) -> None:
    target = make_target(name)
    call: dict[str, Any] = prompts(4) | {"max_new_tokens": 17, "do_sample": False, "eos_token_id": None}
    expected = target.generate(**call).tolist()
    drafter = random_mtp(target, layout=MODELS[name][2])
    if is_recorded:
        with recorded():
            specdec.enable(target, drafter, num_draft_tokens=3)
            assert target.generate(**call).tolist() == expected
    else:
        specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
        assert target.generate(**call).tolist() == expected
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0


@pytest.mark.parametrize("drafter", ["mtp", "suffix+mtp", "the folder"])
def test_the_checkpoint_of_a_target_that_has_mtp_layers_is_its_drafter(tmp_path: Path, drafter: str) -> None:
    """The checkpoint has the target's tensors too, and the target is loaded from it, by specdec's own loader."""
    made = make_target("DeepSeek-V3")
    made.save_pretrained(tmp_path)
    target_tensors = load_file(tmp_path / "model.safetensors")
    write_mtp(tmp_path, made, "deepseek")
    save_file(target_tensors | load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    made.config.save_pretrained(tmp_path)
    target = load(str(tmp_path), "float32", "cpu")
    specdec.enable(target, tmp_path if drafter == "the folder" else drafter, num_draft_tokens=3, compile=False)
    call: dict[str, Any] = prompts(2) | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert target.generate(**call).tolist() == made.generate(**call).tolist()
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0


def test_a_layer_of_the_meta_device_has_the_shapes_of_the_one_that_is_read(tmp_path: Path) -> None:
    target = make_target("GLM-4-MoE")
    read = random_mtp(target, tmp_path, "deepseek").head
    target.config._name_or_path = str(tmp_path)
    for path in (str(tmp_path), "mtp"):
        made = make_head(path, target.config)
        shapes = {name: value.shape for name, value in made.named_parameters()}
        shared = ("embed_tokens.", "lm_head.")
        expected = {name: value.shape for name, value in read.named_parameters() if not name.startswith(shared)}
        assert shapes == expected


def test_a_plan_of_a_target_without_mtp_layers_is_refused(tmp_path: Path) -> None:
    for model_type, message in (("llama", "it has no MTP layers"), ("phi", "PhiModel has no norm behind its layers")):
        make_model(model_type, **FAMILIES[model_type]).save_pretrained(tmp_path / model_type)
        if model_type == "phi":  # whose layers cannot be MTP layers, whatever the config says
            file = tmp_path / model_type / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
            (tmp_path / model_type / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=f"no memory can be planned for mtp: {message}"):
            measure_draft_footprint("mtp", str(tmp_path / model_type))


def _edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.mtp_layers.0.input_proj.weight"), "it lacks fc.weight"),
        (lambda tensors: tensors.pop("model.mtp_layers.0.mlp.up_proj.weight"), "lacks layers.0.mlp.up_proj.weight"),
        (
            lambda tensors: tensors.update({"model.mtp_layers.0.mlp.more.weight": torch.zeros(2)}),
            "has layers.0.mlp.more.weight, which the model has no place for",
        ),
        (
            lambda tensors: tensors.update({"model.mtp_layers.0.hidden_layernorm.weight": torch.zeros(31)}),
            r"hnorm.weight \[31\], not \[32\]",
        ),
        (
            lambda tensors: tensors.update(
                {"model.mtp_layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.float8_e4m3fn)}
            ),
            "its MTP layer is quantized",
        ),
    ],
    ids=["no projection", "no weight", "one too many", "a wrong shape", "eight bits"],
)
def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    target = make_target("MiMo")
    write_mtp(tmp_path, target, "mimo")
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        specdec.enable(target, tmp_path)


def test_a_target_without_mtp_layers_is_refused_by_name(tmp_path: Path) -> None:
    target = make_target("MiMo")
    with pytest.raises(ValueError, match="not loaded from a checkpoint that may have MTP layers"):
        specdec.enable(target, "mtp")
    target.save_pretrained(tmp_path)
    loaded = type(target).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no MTP layers; where it was made from a checkpoint that has some"):
        specdec.enable(loaded, "mtp")


@pytest.mark.parametrize("name", ["GLM-4-MoE", "MiMo"])
def test_a_checkpoint_with_mtp_layers_is_loaded_in_four_bits(name: str, tmp_path: Path) -> None:
    made, layout = make_target(name), MODELS[name][2]
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    write_mtp(tmp_path, made, layout)
    save_file(tensors | load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    made.config.save_pretrained(tmp_path)
    target = specdec.load_quantized(tmp_path, specdec.Int4Config(16, head=None))
    specdec.enable(target, "mtp", num_draft_tokens=2, compile=False)
    call: dict[str, Any] = prompts(2) | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = target.generate(**call).tolist()
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.num_draft_tokens > 0
    specdec.disable(target)
    assert target.generate(**call).tolist() == found


def test_a_layer_too_many_without_an_mtp_layers_tensors_is_refused(tmp_path: Path) -> None:
    make_model("llama", **FAMILIES["llama"] | {"num_hidden_layers": 3}).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"has model.layers.2.\S+, .*which the model has no place for"):
        specdec.load_quantized(tmp_path, specdec.Int4Config(16))


def test_a_checkpoint_of_the_targets_size_without_mtp_tensors_is_a_draft_model(tmp_path: Path) -> None:
    """transformers writes the number of MTP layers into the config of a model that it saved without them."""
    target = make_target("GLM-4-MoE")
    target.config.num_nextn_predict_layers = 1
    target.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    specdec.enable(target, tmp_path, num_draft_tokens=2, compile=False)
    target.generate(**prompts(2), max_new_tokens=8, do_sample=False, eos_token_id=None)
    stats = specdec.last_stats(target)
    assert stats is not None
    assert stats.draft_acceptance_rate == 1.0


def test_further_layers_are_named_in_a_warning(tmp_path: Path) -> None:
    target = make_target("MiMo")
    write_mtp(tmp_path, target, "mimo")
    _edit(
        tmp_path,
        lambda tensors: tensors.update(
            {name.replace("layers.0.", "layers.1."): value.clone() for name, value in tensors.items()}
        ),
    )
    with pytest.warns(UserWarning, match="has 2 MTP layers; all ids of a draft are drafted by the first"):
        specdec.enable(target, tmp_path)


def test_a_checkpoint_of_another_size_is_no_mtp_layer_of_the_target(tmp_path: Path) -> None:
    target = make_target("MiMo")
    write_mtp(tmp_path, target, "mimo")
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="no model could be loaded from"):
        specdec.enable(target, tmp_path)
