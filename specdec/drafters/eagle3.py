"""EAGLE-3: a draft head of one decoder layer that reads hidden states of the target.

Li and others, EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test (2025,
arXiv 2503.01840). The head reads, at position i, the id at i + 1 and the target's hidden states at i, and predicts the
id at i + 2. Behind the last committed id it goes on with its own output in place of the target's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from specdec.core.sequences import Sequences
from specdec.drafters.heads import DraftHead, HeadDrafter, HeadSettings
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import cache_argument

LAYERS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "qwen3": (Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding),
}  # decoder layer, norm and rotary embedding by the model_type of the layers' config


@dataclass(frozen=True)
class Eagle3Settings(HeadSettings):
    """What an EAGLE-3 checkpoint says about its head; names as in the speculators library's config.

    norm_before_residual: whether the residual of the first layer is the state behind hidden_norm. norm_before_fc,
    fc_norm: one norm of the concatenated states, or one of each, before they are reduced. norm_output: whether the
    head's own states go on behind its last norm.
    """

    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


class FirstLayer(nn.Module):
    """A decoder layer whose attention reads the embedding of an id and a hidden state, both behind a norm."""

    def __init__(self, config: PreTrainedConfig, norm_before_residual: bool) -> None:
        super().__init__()
        decoder_layer, norm, _ = LAYERS[config.model_type]
        layer, width = decoder_layer(config, 0), config.hidden_size
        self.norm_before_residual = norm_before_residual
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.hidden_norm = norm(width, eps=config.rms_norm_eps)
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(self.self_attn, name)
            wider = nn.Linear(2 * width, linear.out_features, bias=linear.bias is not None)
            setattr(self.self_attn, name, wider)

    def forward(self, embeds: Tensor, states: Tensor, **attention: Any) -> Tensor:
        normed = self.hidden_norm(states)
        residual = normed if self.norm_before_residual else states
        mixed, _ = self.self_attn(hidden_states=torch.cat([self.input_layernorm(embeds), normed], dim=-1), **attention)
        states = residual + mixed
        output: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


class Eagle3Head(DraftHead):  # type: ignore[no-untyped-call]
    """The head; the state that it reads at a position is in its cache's features, its own output goes behind."""

    kind = "an EAGLE-3 head"
    keeps_states = True
    settings: Eagle3Settings

    def __init__(
        self, config: PreTrainedConfig, settings: Eagle3Settings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config, settings, owns_embedding, owns_output)
        decoder_layer, norm, rotary_embedding = LAYERS[config.model_type]
        width, eps, num_taps = config.hidden_size, config.rms_norm_eps, len(settings.feature_layers)
        self.fc = nn.Linear(num_taps * settings.target_hidden_size, width, bias=False)
        self.input_norm = norm(num_taps * settings.target_hidden_size, eps=eps) if settings.norm_before_fc else None
        norms = [norm(settings.target_hidden_size, eps=eps) for _ in range(num_taps)] if settings.fc_norm else None
        self.fc_norm = None if norms is None else nn.ModuleList(norms)
        further = [decoder_layer(config, index) for index in range(1, config.num_hidden_layers)]
        first = FirstLayer(config, settings.norm_before_residual)
        self.layers = nn.ModuleList([first, *further])
        self.norm = norm(width, eps=eps)
        self.rotary_emb = rotary_embedding(config)
        self.cache_name = cache_argument(inspect.signature(first.self_attn.forward).parameters)

    def reduce(self, states: Tensor) -> Tensor:
        if self.fc_norm is not None:
            states = torch.stack([norm(states[:, :, index]) for index, norm in enumerate(self.fc_norm)], dim=2)
        states = states.flatten(2)
        reduced: Tensor = self.fc(states if self.input_norm is None else self.input_norm(states))
        return reduced

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        past_key_values: RaggedCache,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutput:
        cache, config = past_key_values, self.config
        embeds = self.embed_tokens(input_ids)
        cache.features.allocate(embeds[:, :, None])
        states = cache.features.read(position_ids)[:, :, 0]
        attention = {"position_embeddings": self.rotary_emb(states, position_ids), self.cache_name: cache}
        for index, layer in enumerate(self.layers):
            mask = attention_mask[config.layer_types[index]] if isinstance(attention_mask, dict) else attention_mask
            inputs = (embeds, states) if index == 0 else (states,)
            states = layer(*inputs, attention_mask=mask, position_ids=position_ids, **attention)
        normed = self.norm(states)
        cache.features.write(position_ids + 1, (normed if self.settings.norm_output else states)[:, :, None])
        return CausalLMOutput(logits=self.logits_of(normed, logits_to_keep))


class Eagle3Drafter(HeadDrafter):
    """Drafts with an EAGLE-3 head, whose position i stands for the id at i + 1 of the text."""

    def _read_text(self, sequences: Sequences, width: int, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.runner.cache.window.reserve(sequences.longest)
        self._feed_states(sequences, width)
        last = sequences.lengths - 2  # a text of one id has no state before it, and nothing is drafted
        return sequences.ids[:, 1:], last.clamp(min=0), limit.where(last >= 0, 0)

    def _write_states(self, states: Tensor, positions: Tensor) -> None:
        self.runner.cache.features.write(positions, states[:, :, None])
