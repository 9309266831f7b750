"""Random MTP layers for a target, in folders as the models that have some are saved."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.mtp import MtpHead, mtp_config
from specdec.drafters.resolve import resolve_drafter

# Of the families of tests.helpers.families, those whose layers can be MTP layers: one norm, without bias, behind them.
MTP_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere2", "granite", "smollm3",
    "deepseek_v3",
)  # fmt: skip
# Of each layout, for a target of L layers: the names of the projection's norms (embedding, state) and of itself, the
# last norm, the decoder layer's prefix, the count in config.json, and the tensors that repeat the target's.
LAYOUTS: dict[str, tuple[list[str], str, str, list[str]]] = {
    "deepseek": (
        ["model.layers.{L}.enorm", "model.layers.{L}.hnorm", "model.layers.{L}.eh_proj",
         "model.layers.{L}.shared_head.norm"],
        "model.layers.{L}.", "num_nextn_predict_layers",
        ["model.layers.{L}.embed_tokens", "model.layers.{L}.shared_head.head"],
    ),
    "qwen": (
        ["mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm"],
        "mtp.layers.0.", "mtp_num_hidden_layers", [],
    ),
    "mimo": (
        ["model.mtp_layers.0.token_layernorm", "model.mtp_layers.0.hidden_layernorm", "model.mtp_layers.0.input_proj",
         "model.mtp_layers.0.final_layernorm"],
        "model.mtp_layers.0.", "num_nextn_predict_layers", [],
    ),
}  # fmt: skip


def write_mtp(folder: Path, target: PreTrainedModel, layout: str) -> dict[str, Tensor]:
    """Write a random MTP layer as a target's checkpoint holds it, without the rest of the checkpoint.

    -> its tensors under the names of transformers' MtpModel. Experts are written one by one, as they are published.
    """
    model: Any = target
    text = target.config.get_text_config(decoder=True)
    torch.manual_seed(11)
    decoder: Any = type(model.get_decoder())(mtp_config(text))
    width = int(text.hidden_size)
    block = {name: torch.randn(value.shape) * 0.2 for name, value in decoder.layers[0].state_dict().items()}
    block |= {name: 1 + value for name, value in block.items() if value.ndim == 1}
    norms = {name: 1 + 0.2 * torch.randn(width) for name in ("enorm", "hnorm", "post_norm")}
    own = norms | {"eh_proj": torch.randn(width, 2 * width) * (2 * width) ** -0.5}
    names, prefix, count, repeated = LAYOUTS[layout]
    written = {
        f"{name}.weight": own[part]
        for name, part in zip(names, ("enorm", "hnorm", "eh_proj", "post_norm"), strict=True)
    }
    written |= {prefix + name: value for name, value in _single_experts(block).items()}
    written |= {f"{name}.weight": torch.zeros(text.vocab_size, width) for name in repeated}
    folder.mkdir(parents=True, exist_ok=True)
    layer = str(text.num_hidden_layers)
    save_file(
        {name.replace("{L}", layer): value.clone() for name, value in written.items()}, folder / "model.safetensors"
    )
    content = {name: value for name, value in text.to_dict().items() if name != "quantization_config"} | {count: 1}
    (folder / "config.json").write_text(json.dumps(content, default=str))
    return {f"layers.0.{name}.weight": value for name, value in own.items()} | {
        f"layers.0.mtp_block.{name}": value for name, value in block.items()
    }


def _single_experts(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in one tensor [E, 2 I, H] of gates and values, and [E, H, I], as one tensor each; others as they are."""
    tensors: dict[str, Tensor] = {}
    for name, value in block.items():
        path, _, last = name.rpartition(".")
        if not path.endswith("experts") or value.ndim != 3 or "mlp." not in name or value.shape[1] == value.shape[2]:
            tensors[name] = value
            continue
        for index, expert in enumerate(value):
            parts = {"down_proj": expert}
            if last == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            tensors |= {f"{path}.{index}.{part}.weight": tensor for part, tensor in parts.items()}
    return tensors


def random_mtp(target: PreTrainedModel, folder: Path | None = None, layout: str = "mimo") -> Eagle3Drafter:
    """The drafter of a random MTP layer that is read from a folder."""
    if folder is None:
        with TemporaryDirectory() as name:
            return random_mtp(target, Path(name), layout)
    write_mtp(folder, target, layout)
    drafter = resolve_drafter(folder, target)
    assert isinstance(drafter, Eagle3Drafter)
    assert isinstance(drafter.head, MtpHead)
    return drafter
