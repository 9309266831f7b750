"""Writes tests/data/eagle3/: random EAGLE-3 heads, and the logits that the speculators library's module gives.

    python -m tests.helpers.eagle3_oracle

It needs speculators 0.9.0, which nothing else here does. Of each head two steps over one text: the target's states,
then the head's own.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "data" / "eagle3"
VOCAB_SIZE, WIDTH, NUM_TAPS, LENGTH = 40, 16, 3, 7
DRAFT_IDS = list(range(1, VOCAB_SIZE, 3))
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True, "fc_norm": True},
    "all_ids": {"draft_ids": list(range(VOCAB_SIZE))},
    "qwen3": {"model_type": "qwen3"},
    "two_layers": {"num_layers": 2, "norm_output": True},
}


def layers(model_type: str, num_layers: int) -> dict[str, Any]:
    """The config of the head's layers."""
    return {
        "model_type": model_type, "vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "intermediate_size": 24,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
    }  # fmt: skip


def keep(logits: list[torch.Tensor], module: Any, args: Any, output: torch.Tensor) -> None:
    logits.append(output.detach())


def main() -> None:
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from transformers import AutoConfig

    from tests.helpers.heads import random_tensors

    for name, given in CONFIGURATIONS.items():
        settings = dict(given)
        draft_ids = settings.pop("draft_ids", DRAFT_IDS)
        config = layers(settings.pop("model_type", "llama"), settings.pop("num_layers", 1))
        tensors = random_tensors(config, draft_ids, NUM_TAPS, **settings)
        layer_config = AutoConfig.for_model(**config)
        layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(
                transformer_layer_config=layer_config,
                draft_vocab_size=len(draft_ids),
                eagle_aux_hidden_state_layer_ids=[0, 1, 2],
                **settings,
            )
        ).eval()
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert all(one.startswith("verifier") for one in missing), missing
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(VOCAB_SIZE, (1, LENGTH), generator=generator)
        states = torch.randn(1, LENGTH, NUM_TAPS, WIDTH, generator=generator)
        logits: list[torch.Tensor] = []
        model.lm_head.register_forward_hook(partial(keep, logits))
        with torch.no_grad():
            model(states.flatten(2), ids, torch.zeros_like(ids), ttt_steps=2)
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({
            "speculators_model_type": "eagle3", "draft_vocab_size": len(draft_ids), "norm_before_residual": False,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2], "transformer_layer_config": config,
        } | settings, indent=1) + "\n")  # fmt: skip
        save_file(tensors, folder / "model.safetensors")
        save_file(
            {"ids": ids, "states": states, "first": logits[0], "second": logits[1]}, folder / "logits.safetensors"
        )


def main_peagle() -> None:
    """The same of a P-EAGLE head: of each anchor the logits at depths 0, 1 and 2."""
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig, core
    from transformers import AutoConfig

    from tests.helpers.heads import random_tensors

    config = layers("llama", 1)
    tensors = random_tensors(config, DRAFT_IDS, NUM_TAPS, fc_norm=True)
    generator = torch.Generator().manual_seed(4)
    tensors["mask_hidden"] = torch.randn(1, 1, NUM_TAPS * WIDTH, generator=generator)
    layer_config = AutoConfig.for_model(**config)
    layer_config._attn_implementation = "eager"
    settings = {"mask_token_id": 2, "fc_norm": True}
    model = PEagleDraftModel(
        PEagleSpeculatorConfig(
            transformer_layer_config=layer_config,
            draft_vocab_size=len(DRAFT_IDS),
            eagle_aux_hidden_state_layer_ids=[0, 1, 2],
            **settings,
        )
    ).eval()
    _, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    ids = torch.randint(VOCAB_SIZE, (1, LENGTH), generator=generator)
    states = torch.randn(1, LENGTH, NUM_TAPS, WIDTH, generator=generator)
    pairs = [(anchor, depth) for depth in range(3) for anchor in range(LENGTH - depth)]
    anchors, depths = (torch.tensor(values) for values in zip(*pairs, strict=True))
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(partial(keep, logits))
    core.generate_cod_sample_indices = lambda **_: (anchors, depths)
    core.compute_metrics = lambda **_: (None, None)
    with torch.no_grad():
        model(states.flatten(2), ids, torch.zeros_like(ids), verifier_last_hidden_states=torch.zeros(1, LENGTH, WIDTH))
    folder = FOLDER.parent / "peagle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "speculators_model_type": "peagle", "draft_vocab_size": len(DRAFT_IDS), "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2], "transformer_layer_config": config,
    } | settings, indent=1) + "\n")  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    results = {"ids": ids, "states": states, "logits": logits[0], "anchors": anchors, "depths": depths}
    save_file(results, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
    main_peagle()
