"""Models that read images too: specdec serves calls with text alone; calls with an image go to the stock loop."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import specdec
from tests.generation.test_routing import assert_served, count_trials, served
from tests.helpers.families import CONTEXT, VOCAB_SIZE, prompts

IMAGE = 100  # the id that stands for a part of an image
BEGIN, END, VIDEO = 97, 98, 99
TEXT_IDS = 97  # ids below are text

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_TEXT = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END,
}  # fmt: skip
WIDER = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 9},
        "vision_config": CLIP | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END,
    },
    "qwen2_vl": QWEN_IDS | {
        "text_config": QWEN_TEXT | {"model_type": "qwen2_vl_text"},
        "vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": QWEN_IDS | {
        "text_config": QWEN_TEXT | {"model_type": "qwen2_5_vl_text"},
        "vision_config": QWEN_VISION | WIDER | {"window_size": 16, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": QWEN_IDS | {
        "text_config": QWEN_TEXT | {"model_type": "qwen3_vl_text"},
        "vision_config": QWEN_VISION | WIDER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -1,
    },
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP | {"model_type": "idefics3_vision"},
        "image_token_id": IMAGE, "scale_factor": 2,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
        "vision_config": CLIP | {"model_type": "pixtral", "head_dim": 8, "image_size": 16},
        "image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1,
    },
}  # fmt: skip
# What their processors add to a text without an image: zeros.
TOKEN_TYPES = {"gemma3": "token_type_ids", **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")}


@cache
def pair(model_type: str) -> tuple[Any, Any]:
    """A random target, and a copy with noise on its weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model, draft


def text(batch_size: int, **call: Any) -> dict[str, Any]:
    return prompts(batch_size, vocab_size=TEXT_IDS) | {"max_new_tokens": 12} | call


def with_image(model_type: str) -> dict[str, Any]:
    """The smallest image, of four ids (idefics3: one)."""
    num_ids = 1 if model_type == "idefics3" else 4
    ids = torch.tensor([[5, BEGIN, *[IMAGE] * num_ids, END, 33, 12]])
    generator = torch.Generator().manual_seed(2)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    extra: dict[str, Tensor] = {"pixel_values": pixels(1, 3, 8, 8)}
    if model_type == "idefics3":
        extra = {"pixel_values": pixels(1, 1, 3, 8, 8)}
    elif model_type == "mistral3":
        extra = {"pixel_values": pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    elif model_type.startswith("qwen"):
        extra = {"pixel_values": pixels(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if model_type in TOKEN_TYPES:
        extra[TOKEN_TYPES[model_type]] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **extra}


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_text_alone_is_served_and_an_image_goes_to_the_stock_loop(model_type: str, kind: str) -> None:
    model, draft = pair(model_type)
    specdec.enable(model, draft if kind == "model" else kind, num_draft_tokens=3)
    inputs_with_image = with_image(model_type)
    for _ in range(2):  # a call does not affect the next one
        for batch_size in (1, 4):
            assert served(model, text(batch_size)) is None
            if name := TOKEN_TYPES.get(model_type):
                zeros = torch.zeros(batch_size, 11, dtype=torch.int64)
                assert served(model, text(batch_size, **{name: zeros})) is None
        if kind == "model":
            assert specdec.last_stats(model).num_accepted_draft_tokens > 0
        assert_served(
            served(model, inputs_with_image),
            "^(images, video or audio were|pixel_values was|(mm_)?token_type_ids was) passed$",
        )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_image_makes_a_difference(model_type: str) -> None:
    """Else the test above would show nothing."""
    model, inputs = pair(model_type)[0], with_image(model_type)
    specdec.disable(model)
    del inputs["max_new_tokens"]
    logits = [model(**inputs | {"pixel_values": sign * inputs["pixel_values"]}).logits for sign in (1, -1)]
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_several_continuations_of_text(model_type: str) -> None:
    model = specdec.enable(pair(model_type)[0], "prompt_lookup", num_draft_tokens=3)
    assert served(model, text(4, do_sample=True, top_k=1, num_return_sequences=2)) is None


def test_positions_that_a_call_stores_on_the_model_cause_no_new_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = specdec.enable(pair("qwen2_5_vl")[0], "prompt_lookup", num_draft_tokens=3)
    assert served(model, text(1)) is None
    tried = count_trials(monkeypatch)
    assert served(model, text(1)) is None
    assert tried == []
