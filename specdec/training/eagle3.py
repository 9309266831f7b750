"""Training-time test of an EAGLE-3 head: it is trained on what it will read, its own output included.

Li and others, EAGLE-3 (2025, arXiv 2503.01840). Step 1 reads the target's hidden states at every position of a text;
step t + 1 reads, at the same positions, the output of step t and the id behind. A position attends to the states of
step 1 up to itself and to its own of the steps between, which is what drafting from there would leave in the KV cache.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.drafters.eagle3 import Eagle3Head, Eagle3Settings
from specdec.drafters.head_checkpoint import EAGLE3
from specdec.quant.checkpoints import named_errors
from specdec.runtime.runner import context_of
from specdec.training.batch import Batch, add_counts
from specdec.training.config import TrainConfig, check_fraction, check_learning_rate
from specdec.training.texts import Text

MAX_DRAFT_IDS = 32_000
UNLIMITED = 1 << 20  # positions of a head whose target names no limit
SHARED = ("embed_tokens.", "embedding_rows.")  # tensors of a head that are its target's
SPECULATORS_VERSION = "0.9.0"  # whose layout a head is saved in


@dataclass
class Eagle3Training:
    """A head to be trained.

    feature_layers: hidden states of the target that it reads; None: an early, a middle and a late one.
    draft_vocab_size: ids that it can draft, the most frequent ones of the texts; None: all, at most 32,000.
    intermediate_size: of its MLP; None: the target's. norm_output, fc_norm: see `Eagle3Settings`.
    step_decay: weight of each further step's loss. learning_rate: the largest.
    """

    feature_layers: list[int] | None
    draft_vocab_size: int | None
    intermediate_size: int | None
    norm_output: bool
    fc_norm: bool
    step_decay: float
    learning_rate: float

    def __post_init__(self) -> None:
        check_fraction("train.step_decay", self.step_decay)
        check_learning_rate(self.learning_rate)
        for name in ("draft_vocab_size", "intermediate_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be 1 or more, or null")
        if self.feature_layers is not None and not self.feature_layers:
            raise ValueError(
                "train.feature_layers=[] names no hidden state; leave it out for an early, a middle and a late one"
            )

    def check_target(self, config: TrainConfig, target: PreTrainedModel) -> None:
        """Raise ValueError where no head can be made for the target."""
        num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if any(not 0 <= layer < num_layers for layer in self.feature_layers or ()):
            raise ValueError(
                f"train.feature_layers={list(self.feature_layers or ())}: the hidden states of this target are 0 …"
                f" {num_layers - 1}"
            )
        with named_errors(f"no head can be made for {type(target).__name__}"):
            new_head(self, target, [])

    def start(self, config: TrainConfig, target: PreTrainedModel, texts: Sequence[Text]) -> TrainedHead:
        """A new head for a target."""
        return TrainedHead(new_head(self, target, texts), target, config)


class TrainedHead:
    """A head in training, see `Trainee`."""

    def __init__(self, head: Eagle3Head, target: PreTrainedModel, config: TrainConfig) -> None:
        self.head, self.target, self.config = head, target, config
        self.feature_layers = head.settings.feature_layers
        self.module = TrainingTimeTest(head, config.num_draft_tokens, config.train.step_decay)

    def save(self, folder: Path) -> None:
        save_head(self.head, self.target, self.config, folder)


class TrainingTimeTest(nn.Module):
    """The losses of a head over a batch, as a module, so that accelerate can wrap it."""

    def __init__(self, head: Eagle3Head, num_steps: int, step_decay: float) -> None:
        super().__init__()
        self.head, self.num_steps, self.step_decay = head, num_steps, step_decay

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> the loss and the counts, see `Trainee`.

        The loss is the cross entropy with the target's distribution over the ids that the head can draft, where its
        likeliest id is one of them.
        """
        head, num_positions = self.head, batch.ids.shape[1] - 1
        drafted_ids = torch.arange(len(head.d2t), device=batch.ids.device) + head.d2t
        is_draftable = torch.zeros(batch.logits.shape[-1], dtype=torch.bool, device=batch.ids.device)
        is_draftable[drafted_ids] = True
        choices, probs = batch.logits.argmax(-1), batch.logits[..., drafted_ids].softmax(-1)
        losses: list[Tensor] = []
        counts: list[Tensor] = []
        is_right = torch.ones_like(batch.is_answer[:, 1:])
        for step, states in enumerate(self.states(batch.ids, batch.features)):
            count = max(num_positions - 1 - step, 0)  # position p drafts the id at p + 2 + step
            at = batch.is_answer[:, 2 + step :]
            logits = head.lm_head(states[:, :count][at]).float()  # [N, Vd]
            wanted, choice = (of[:, 1 + step :][:, :count][at] for of in (probs, choices))
            is_trained = is_draftable[choice]
            entropy = -(wanted * logits.log_softmax(-1)).sum(-1)
            losses.append(self.step_decay**step * (entropy * is_trained).sum() / is_trained.sum().clamp(min=1))
            is_tried = is_right[:, :count] & at
            agrees = torch.zeros_like(is_tried)
            agrees[at] = drafted_ids[logits.argmax(-1)] == choice
            is_right = is_tried & agrees
            add_counts(counts, is_tried, is_right)
        return torch.stack(losses).sum(), torch.stack(counts).detach()

    def states(self, ids: Tensor, features: Tensor) -> list[Tensor]:
        """Of each step the head's states [B, L - 1, H] behind its last norm, which its output layer reads."""
        head = self.head
        layer: Any = head.layers[0]
        attention, config = layer.self_attn, head.config
        num_positions = ids.shape[1] - 1
        positions = torch.arange(num_positions, device=ids.device)[None]
        states, padded = head.reduce(features[:, :-1]), F.pad(ids, (0, self.num_steps))
        later = torch.ones(num_positions, num_positions, dtype=torch.bool, device=ids.device).triu(1)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        found = []
        for step in range(self.num_steps):
            read = padded[:, 1 + step :][:, :num_positions]
            normed = layer.hidden_norm(states)
            residual = normed if layer.norm_before_residual else states
            x = torch.cat([layer.input_layernorm(head.embed_tokens(read)), normed], dim=-1)
            query, key, value = (
                projection(x).unflatten(-1, (-1, config.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            cos, sin = head.rotary_emb(states, positions + step)
            query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
            groups = query.shape[1] // key.shape[1]
            keys.append(key.repeat_interleave(groups, dim=1))
            values.append(value.transpose(1, 2).repeat_interleave(groups, dim=1))
            scores = (query @ keys[0].transpose(2, 3)).masked_fill(later, -torch.inf)
            own = [(query * one).sum(-1, keepdim=True) for one in keys[1:]]
            weights = (torch.cat([scores, *own], dim=-1) * attention.scaling).float().softmax(-1).to(query.dtype)
            mixed = weights[..., :num_positions] @ values[0]
            for index, one in enumerate(values[1:]):
                mixed = mixed + weights[..., num_positions + index, None] * one
            states = residual + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            normed = head.norm(states)
            found.append(normed)
            states = normed if head.settings.norm_output else states
        return found


def new_head(training: Eagle3Training, target: PreTrainedModel, texts: Sequence[Text]) -> Eagle3Head:
    """A head in float32 that reads the target's embedding and drafts the most frequent ids of the texts.

    Its output layer begins as the target's, for these ids; as the target's embedding where that is in 8 or 4 bits. The
    rest is random.
    """
    text = target.config.get_text_config(decoder=True)
    vocab_size = int(text.vocab_size)
    heads = int(text.num_attention_heads)
    layer = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=training.intermediate_size
        or getattr(text, "intermediate_size", None)
        or 4 * text.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_position_embeddings=context_of(target) or UNLIMITED,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        tie_word_embeddings=False,
        rope_parameters=_rope_parameters(text),
    )
    feature_layers = training.feature_layers or _default_layers(target)
    num_ids = min(training.draft_vocab_size or MAX_DRAFT_IDS, vocab_size)
    settings = Eagle3Settings(
        tuple(feature_layers), num_ids, text.hidden_size, norm_output=training.norm_output, fc_norm=training.fc_norm
    )
    head = Eagle3Head(layer, settings, owns_embedding=False)
    counts = Counter(token for one in texts for token in one.ids)
    frequent = sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:num_ids]
    ids = torch.tensor(sorted(frequent))
    head.d2t = ids - torch.arange(num_ids)
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    embed = target.get_input_embeddings()
    output: Any = getattr(getattr(target, "lm_head", None), "weight", None)
    shape = vocab_size, text.hidden_size
    is_dense = isinstance(output, Tensor) and output.is_floating_point() and tuple(output.shape) == shape
    with torch.no_grad():
        rows = output[ids.to(target.device)] if is_dense else embed(ids.to(target.device))
        head.lm_head.weight.copy_(rows.float())
    module: nn.Module = head
    module.to(target.device)
    head.share(target)
    embed.requires_grad_(False)
    return head


def save_head(head: Eagle3Head, target: PreTrainedModel, config: TrainConfig, folder: Path) -> None:
    """Write the head in the layout of the speculators library, in bfloat16 and without the target's embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(head.settings)
    layers = {name: value for name, value in head.config.to_diff_dict().items() if name != "transformers_version"}
    content = {
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": settings.pop("draft_vocab_size"),
        "eagle_aux_hidden_state_layer_ids": list(settings.pop("feature_layers")),
        **settings,
        "speculators_config": {
            "algorithm": EAGLE3,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.num_draft_tokens}],
            "verifier": {
                "architectures": list(target.config.architectures or ()),
                "name_or_path": config.target.path,
            },
        },
        "speculators_model_type": EAGLE3,
        "speculators_version": SPECULATORS_VERSION,
        "tie_word_embeddings": False,
        "transformer_layer_config": layers,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in head.state_dict().items()
        if not name.startswith(SHARED)
    }
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    tensors["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool)
    tensors["t2d"][ids] = True
    save_file(tensors, folder / "model.safetensors")


def _rope_parameters(text: PreTrainedConfig) -> dict[str, Any] | None:
    """The target's rotary embedding, where it has one for all layers."""
    parameters = getattr(text, "rope_parameters", None)
    return parameters if parameters and "rope_type" in parameters else None


def _default_layers(target: PreTrainedModel) -> list[int]:
    """An early, a middle and a late hidden state of the target."""
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return sorted({min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)})
