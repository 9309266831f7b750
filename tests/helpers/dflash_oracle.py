"""Writes tests/data/dflash/: random DFlash heads, and the logits that the speculators library's module gives.

    python -m tests.helpers.dflash_oracle

It needs speculators 0.9.0, which nothing else here does. Of each head the blocks that begin at each id of a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.eagle3_oracle import DRAFT_IDS, LENGTH, NUM_TAPS, VOCAB_SIZE, WIDTH, layers

FOLDER = Path(__file__).parents[1] / "data" / "dflash"
BLOCK_SIZE, MASK_ID = 4, 3
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "reduced": {},
    "from_anchor": {"sample_from_anchor": True},
}


def random_tensors(config: dict[str, Any], draft_ids: list[int], num_taps: int) -> dict[str, Tensor]:
    """A head's tensors under the names of the speculators library, without those that it takes from the target."""
    width, inner, vocab_size = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    generator = torch.Generator().manual_seed(6)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    tensors = {
        "fc.weight": weight(width, num_taps * width),
        "hidden_norm.weight": norm(width),
        "norm.weight": norm(width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"layers.{index}."
        tensors |= {f"{layer}{name}.weight": norm(width) for name in ("input_layernorm", "post_attention_layernorm")}
        sizes = {"q_proj": (heads, width), "k_proj": (kv_heads, width), "v_proj": (kv_heads, width)}
        sizes["o_proj"] = (width, heads)
        tensors |= {f"{layer}self_attn.{name}.weight": weight(*shape) for name, shape in sizes.items()}
        tensors |= {f"{layer}self_attn.{name}.weight": norm(config["head_dim"]) for name in ("q_norm", "k_norm")}
        sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        tensors |= {f"{layer}mlp.{name}.weight": weight(*shape) for name, shape in sizes.items()}
    if len(draft_ids) < vocab_size:
        tensors["lm_head.weight"] = 3 * weight(len(draft_ids), width)
        tensors["d2t"] = torch.tensor(draft_ids) - torch.arange(len(draft_ids))
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][draft_ids] = True
    return tensors


def config_of(config: dict[str, Any], num_ids: int, taps: list[int], **settings: Any) -> dict[str, Any]:
    """A config.json as the speculators library writes it."""
    return {
        "speculators_model_type": "dflash", "draft_vocab_size": num_ids, "block_size": BLOCK_SIZE,
        "mask_token_id": MASK_ID, "aux_hidden_state_layer_ids": taps, "transformer_layer_config": config,
    } | settings  # fmt: skip


def main() -> None:
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from transformers import AutoConfig

    for name, settings in CONFIGURATIONS.items():
        config = layers("qwen3", 2)
        tensors = random_tensors(config, DRAFT_IDS, NUM_TAPS)
        generator = torch.Generator().manual_seed(2)
        embedding = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
        layer_config = AutoConfig.for_model(**config)
        layer_config._attn_implementation = "eager"
        model = DFlashDraftModel(
            DFlashSpeculatorConfig(
                transformer_layer_config=layer_config, draft_vocab_size=len(DRAFT_IDS), block_size=BLOCK_SIZE,
                mask_token_id=MASK_ID, aux_hidden_state_layer_ids=list(range(NUM_TAPS)), **settings,
            )
        ).eval()  # fmt: skip
        missing, unexpected = model.load_state_dict(tensors | {"embed_tokens.weight": embedding}, strict=False)
        assert not unexpected
        assert all(one.startswith("verifier") for one in missing), missing
        length = LENGTH + BLOCK_SIZE
        ids = torch.randint(VOCAB_SIZE, (1, length), generator=generator)
        states = torch.randn(1, length, NUM_TAPS, WIDTH, generator=generator)
        with torch.no_grad():
            _, logits, *_ = model._backbone_forward(
                states.flatten(2), ids, torch.ones_like(ids), torch.zeros(1, length, WIDTH), torch.zeros_like(ids),
                max_anchors=LENGTH,
            )  # fmt: skip
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        content = config_of(config, len(DRAFT_IDS), list(range(NUM_TAPS)), **settings)
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
        save_file(tensors, folder / "model.safetensors")
        results = {"ids": ids, "states": states, "embedding": embedding}
        results["logits"] = logits.reshape(LENGTH, BLOCK_SIZE, -1).contiguous()
        save_file(results, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
