"""Random EAGLE-3 heads for a target, and their folders in the layouts of the libraries that train them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.core.steps import StepResult
from specdec.drafters.dflash import DFlashDrafter, DFlashHead
from specdec.drafters.dspark import DSparkDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.heads import DraftHead
from specdec.drafters.peagle import PEagleDrafter
from specdec.drafters.resolve import resolve_drafter
from specdec.generation.enable import state_of
from specdec.runtime.runner import ModelRunner, widths
from tests.helpers import dflash_oracle
from tests.helpers.families import prompts


def layer_config(target: PreTrainedModel, model_type: str = "llama", num_layers: int = 1) -> dict[str, Any]:
    """The config of the head's layers: half as many heads as width 32 gives by 8."""
    return {
        "model_type": model_type,
        "vocab_size": widths(target)[0],
        "hidden_size": target.config.get_text_config(decoder=True).hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
    }


def drafts_of_greedy_call(target: PreTrainedModel) -> list[tuple[list[int], list[int]]]:
    """Generate for a batch of uneven rows: -> of each draft of a row, the row's text and the ids drafted behind it."""
    drafts: list[tuple[list[int], list[int]]] = []
    batch = prompts(4)
    texts = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]

    def observe(result: StepResult) -> None:
        for row, step in enumerate(result.steps):
            if step is None:
                continue
            if step.drafted:
                drafts.append((texts[row][:], result.draft.ids[row, : step.drafted].tolist()))
            texts[row] += [*result.draft.ids[row, : step.accepted].tolist(), int(result.verdict.next_ids[row])]

    state_of(target).observer = observe
    target.generate(**batch, max_new_tokens=13, do_sample=False, eos_token_id=None)
    assert len(drafts) > 12
    return drafts


@torch.no_grad()
def states_of(head: DraftHead, target: PreTrainedModel, text: list[int]) -> Tensor:
    """The states [1, L, H] that a head reads of what its target makes of a text of L ids."""
    hidden = target(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
    return head.reduce(torch.stack([hidden[layer] for layer in head.settings.feature_layers], dim=2))


@torch.no_grad()
def chain_draft(head: DraftHead, target: PreTrainedModel, text: list[int], num_ids: int) -> list[int]:
    """What a head that goes on with its own output drafts greedily, by forwards over the whole text, nothing kept."""
    ids, states = torch.tensor([text]), states_of(head, target, text)[:, :-1]
    drafted: list[int] = []
    for _ in range(num_ids):
        read = torch.cat([ids[:, 1:], torch.tensor([drafted], dtype=torch.int64)], dim=1)
        positions = torch.arange(read.shape[1])[None]
        runner = ModelRunner(head)
        runner.begin(1)
        runner.cache.window.reserve(read.shape[1])
        runner.cache.features.write(positions, states[:, :, None])
        drafted.append(int(runner.forward(read, positions, last_only=True).logits.argmax()))
        states = torch.cat([states, runner.read_features(positions[:, -1:] + 1)[:, :, 0].clone()], dim=1)
    return drafted


def run_block(head: DFlashHead, ids: Tensor, states: Tensor, anchor: int) -> tuple[ModelRunner, Tensor, Tensor]:
    """Run the block that begins at the id of index `anchor` of ids [1, L]: -> its runner, positions [1, block], logits.

    states: [1, L, H], the target's, reduced; logits [block, V].
    """
    runner, size = ModelRunner(head), head.settings.block_size
    runner.begin(1)
    if anchor:
        context = torch.arange(anchor)[None]
        with torch.inference_mode():
            head.write_context(states[:, :anchor], context, runner.cache_at(context))
    block = torch.full((1, size), head.settings.mask_token_id)
    block[0, 0] = ids[0, anchor]
    positions = anchor + torch.arange(size)[None]
    return runner, positions, runner.forward(block, positions).logits[0]


def random_tensors(config: dict[str, Any], draft_ids: list[int], num_taps: int, **settings: bool) -> dict[str, Tensor]:
    """A head's tensors under the names of the speculators library; draft_ids: the target's ids that it drafts."""
    width, inner, vocab_size = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    generator = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    tensors = {
        "embed_tokens.weight": weight(vocab_size, width),
        "fc.weight": weight(width, num_taps * width),
        "norm.weight": norm(width),
        "lm_head.weight": 3 * weight(len(draft_ids), width),
    }
    for index in range(config["num_hidden_layers"]):
        layer, read = f"layers.{index}.", 2 * width if index == 0 else width
        tensors |= {layer + f"{name}.weight": norm(width) for name in ("input_layernorm", "post_attention_layernorm")}
        if index == 0:
            tensors[layer + "hidden_norm.weight"] = norm(width)
        sizes = {
            "q_proj": (heads, read),
            "k_proj": (kv_heads, read),
            "v_proj": (kv_heads, read),
            "o_proj": (width, heads),
        }
        tensors |= {f"{layer}self_attn.{name}.weight": weight(*shape) for name, shape in sizes.items()}
        if config["model_type"] == "qwen3":
            tensors |= {f"{layer}self_attn.{name}.weight": norm(config["head_dim"]) for name in ("q_norm", "k_norm")}
        sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        tensors |= {f"{layer}mlp.{name}.weight": weight(*shape) for name, shape in sizes.items()}
    if settings.get("norm_before_fc"):
        tensors["input_norm.weight"] = norm(num_taps * width)
    if settings.get("fc_norm"):
        tensors |= {f"fc_norm.{index}.weight": norm(width) for index in range(num_taps)}
    if len(draft_ids) < vocab_size:
        tensors["d2t"] = torch.tensor(draft_ids) - torch.arange(len(draft_ids))
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        tensors["t2d"][draft_ids] = True
    return tensors


def write_speculators(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], feature_layers: list[int], **settings: bool
) -> Path:
    """A folder as the speculators library saves a head."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": len(tensors["lm_head.weight"]),
        "eagle_aux_hidden_state_layer_ids": feature_layers,
        "norm_before_residual": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "tie_word_embeddings": False,
        "transformer_layer_config": config,
    }
    (folder / "config.json").write_text(json.dumps(content | settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_safeailab(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], feature_layers: list[int] | None
) -> Path:
    """A folder as SafeAILab's EAGLE saves a head: a pickle, and the target's embedding is not in it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = config | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(tensors["lm_head.weight"]),
        "tie_word_embeddings": False,
    }
    if feature_layers is not None:
        content["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": feature_layers, "use_aux_hidden_state": True}
    (folder / "config.json").write_text(json.dumps(content))
    names = {name: name.replace("layers.0.", "midlayer.") for name in tensors if name != "embed_tokens.weight"}
    torch.save({name: tensors[old] for old, name in names.items()}, folder / "pytorch_model.bin")
    return folder


def random_head(
    target: PreTrainedModel,
    folder: Path | None = None,
    draft_ids: list[int] | None = None,
    model_type: str = "llama",
    num_layers: int = 1,
    **settings: bool,
) -> Eagle3Drafter:
    """The drafter of a random head that is read from a folder; it reads two of the hidden states."""
    if folder is None:
        with TemporaryDirectory() as name:
            return random_head(target, Path(name), draft_ids, model_type, num_layers, **settings)
    config = layer_config(target, model_type, num_layers)
    ids = list(range(config["vocab_size"])) if draft_ids is None else draft_ids
    layers = [0, target.config.get_text_config(decoder=True).num_hidden_layers - 1]
    tensors = random_tensors(config, ids, len(layers), **settings)
    drafter = resolve_drafter(write_speculators(folder, config, tensors, layers, **settings), target)
    assert isinstance(drafter, Eagle3Drafter)
    return drafter


def random_peagle(
    target: PreTrainedModel, folder: Path | None = None, draft_ids: list[int] | None = None
) -> PEagleDrafter:
    """The drafter of a random P-EAGLE head that is read from a folder."""
    if folder is None:
        with TemporaryDirectory() as name:
            return random_peagle(target, Path(name), draft_ids)
    config = layer_config(target)
    ids = list(range(config["vocab_size"])) if draft_ids is None else draft_ids
    last = target.config.get_text_config(decoder=True).num_hidden_layers - 1
    tensors = random_tensors(config, ids, 2)
    mask = {"mask_hidden": torch.randn(1, 1, 2 * config["hidden_size"], generator=torch.Generator().manual_seed(8))}
    write_speculators(folder, config, tensors | mask, [0, last])
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"speculators_model_type": "peagle", "mask_token_id": 3}))
    drafter = resolve_drafter(folder, target)
    assert isinstance(drafter, PEagleDrafter)
    return drafter


def random_dflash(
    target: PreTrainedModel,
    folder: Path | None = None,
    draft_ids: list[int] | None = None,
    block_size: int = 6,
    **settings: bool,
) -> DFlashDrafter:
    """The drafter of a random DFlash head with two layers that is read from a folder; with all ids it is z-lab's."""
    if folder is None:
        with TemporaryDirectory() as name:
            return random_dflash(target, Path(name), draft_ids, block_size, **settings)
    config = layer_config(target, "qwen3", num_layers=2)
    last = target.config.get_text_config(decoder=True).num_hidden_layers - 1
    ids = list(range(config["vocab_size"])) if draft_ids is None else draft_ids
    content = dflash_oracle.config_of(config, len(ids), [last, last], **settings) | {"block_size": block_size}
    if draft_ids is None:
        content = config | {
            "architectures": ["DFlashDraftModel"],
            "block_size": block_size,
            "dflash_config": {"mask_token_id": 3, "target_layer_ids": [last - 1, last - 1]},
            "num_target_layers": last + 1,
        }
    (folder / "config.json").write_text(json.dumps(content))
    save_file(dflash_oracle.random_tensors(config, ids, 2), folder / "model.safetensors")
    drafter = resolve_drafter(folder, target)
    assert isinstance(drafter, DFlashDrafter)
    return drafter


def random_dspark(
    target: PreTrainedModel,
    folder: Path | None = None,
    draft_ids: list[int] | None = None,
    block_size: int = 6,
    markov_head_type: str = "rnn",
    **settings: bool,
) -> DSparkDrafter:
    """The drafter of a random DSpark head that is read from a folder; with all ids it is DeepSpec's."""
    if folder is None:
        with TemporaryDirectory() as name:
            return random_dspark(target, Path(name), draft_ids, block_size, markov_head_type, **settings)
    config = layer_config(target, "qwen3", num_layers=2)
    last = target.config.get_text_config(decoder=True).num_hidden_layers - 1
    ids = list(range(config["vocab_size"])) if draft_ids is None else draft_ids
    tensors = dflash_oracle.random_tensors(config, ids, 2)
    tensors |= dflash_oracle.further_tensors(config, len(ids), markov_head_type, **settings)
    tensors["confidence_head.proj.bias"] += 2  # so that drafts are long enough
    own = {"markov_rank": dflash_oracle.RANK, "markov_head_type": markov_head_type, "block_size": block_size}
    content = dflash_oracle.config_of(config, len(ids), [last, last], **own, **settings)
    content |= {"speculators_model_type": "dspark"}
    if draft_ids is None:
        tensors |= {name: random_tensors(config, ids, 2)[name] for name in ("embed_tokens.weight", "lm_head.weight")}
        content = config | own | settings | {
            "architectures": ["Qwen3DSparkModel"], "mask_token_id": 3, "target_layer_ids": [last - 1, last - 1],
            "num_target_layers": last + 1, "enable_confidence_head": True,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    drafter = resolve_drafter(folder, target)
    assert isinstance(drafter, DSparkDrafter)
    return drafter
