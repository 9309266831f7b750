"""Writes tests/data/dflash/: random DFlash and DSpark heads, and the logits of the speculators library's modules.

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
RANK = 6  # of the Markov heads
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "reduced": {},
    "from_anchor": {"sample_from_anchor": True},
}
DSPARK_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dspark": {"markov_head_type": "vanilla"},
    "dspark_gated": {"markov_head_type": "gated", "sample_from_anchor": False},
    "dspark_rnn": {"markov_head_type": "rnn", "confidence_head_with_markov": False},
    "dspark_rnn_behind": {"markov_head_type": "rnn", "sample_from_anchor": False},
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


def further_tensors(
    config: dict[str, Any], num_ids: int, markov_head_type: str, confidence_head_with_markov: bool = True, **_: Any
) -> dict[str, Tensor]:
    """The tensors that a DSpark head has in addition to a DFlash head's."""
    width, generator = config["hidden_size"], torch.Generator().manual_seed(9)

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(rows, generator=generator)}

    tensors = {
        "markov_head.markov_w1.weight": torch.randn(config["vocab_size"], RANK, generator=generator),
        "markov_head.markov_w2.weight": torch.randn(num_ids, RANK, generator=generator),
    }
    if markov_head_type == "gated":
        tensors |= linear("markov_head.gate_proj", RANK, width + RANK)
    elif markov_head_type == "rnn":
        tensors |= linear("markov_head.joint_proj", 3 * RANK, 2 * RANK + width)
    return tensors | linear("confidence_head.proj", 1, width + RANK * confidence_head_with_markov)


def config_of(config: dict[str, Any], num_ids: int, taps: list[int], **settings: Any) -> dict[str, Any]:
    """A config.json as the speculators library writes it."""
    return {
        "speculators_model_type": "dflash", "draft_vocab_size": num_ids, "block_size": BLOCK_SIZE,
        "mask_token_id": MASK_ID, "aux_hidden_state_layer_ids": taps, "transformer_layer_config": config,
    } | settings  # fmt: skip


def main() -> None:
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from transformers import AutoConfig

    for name, settings in (CONFIGURATIONS | DSPARK_CONFIGURATIONS).items():
        is_dspark = name in DSPARK_CONFIGURATIONS
        config = layers("qwen3", 2)
        tensors = random_tensors(config, DRAFT_IDS, NUM_TAPS)
        if is_dspark:
            settings = settings | {"markov_rank": RANK}
            tensors |= further_tensors(config, len(DRAFT_IDS), **settings)
        generator = torch.Generator().manual_seed(2)
        embedding = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
        layer_config = AutoConfig.for_model(**config)
        layer_config._attn_implementation = "eager"
        model_class, config_class = (
            (DSparkDraftModel, DSparkSpeculatorConfig) if is_dspark else (DFlashDraftModel, DFlashSpeculatorConfig)
        )
        model = model_class(
            config_class(
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
            hidden, logits, _, _, indices = model._backbone_forward(
                states.flatten(2), ids, torch.ones_like(ids), torch.zeros(1, length, WIDTH), torch.zeros_like(ids),
                max_anchors=LENGTH,
            )  # fmt: skip
            results = {"ids": ids, "states": states, "embedding": embedding}
            logits = logits.reshape(LENGTH, BLOCK_SIZE, -1)
            if is_dspark:  # what its forward computes for the loss
                blocks, hidden = ids[0, indices].view(LENGTH, BLOCK_SIZE), hidden.view(LENGTH, BLOCK_SIZE, -1)
                before = blocks
                if not model.config.sample_from_anchor:
                    before = torch.cat([blocks[:, :1], blocks[:, :-1]], dim=1)
                embeds = model.markov_head.prev_embeddings(before)
                logits = logits + model.markov_head.block_bias(
                    prev_token_ids=before, hidden_states=hidden, prev_emb=embeds
                )
                inputs = torch.cat([hidden, embeds], dim=-1) if model.config.confidence_head_with_markov else hidden
                results["chances"] = model.confidence_head(inputs).sigmoid().contiguous()
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        content = config_of(config, len(DRAFT_IDS), list(range(NUM_TAPS)), **settings)
        content |= {"speculators_model_type": "dspark"} if is_dspark else {}
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")
        save_file(tensors, folder / "model.safetensors")
        save_file(results | {"logits": logits.contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    main()
