"""MTP: the layer for multi-token prediction that a model's own checkpoint holds, as a draft head.

DeepSeek-V3 Technical Report (2024, arXiv 2412.19437), section 2.2. As an EAGLE-3 head it reads, at position i, the id
at i + 1 and the target's state at i, here the one behind the last norm, and predicts the id at i + 2; behind the last
committed id it goes on with its own output. Its decoder layer is of the target's kind, so it is run as a model of the
target's class that has one layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from specdec.drafters.heads import DraftHead, HeadSettings
from specdec.quant.checkpoints import LOADING_OPTIONS, check_complete, take_settings
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import cache_argument


@dataclass(frozen=True, kw_only=True)
class MtpSettings(HeadSettings):
    """decoder_class: the target's class without an output layer. hidden_first: the order of the projection's inputs."""

    decoder_class: type[PreTrainedModel]
    hidden_first: bool = False


class MtpHead(DraftHead):  # type: ignore[no-untyped-call]
    """The head; as with an EAGLE-3 head, the state that it reads at a position is in its cache's features."""

    kind = "an MTP head"
    keeps_states = True
    settings: MtpSettings

    def __init__(
        self, config: PreTrainedConfig, settings: MtpSettings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config, settings, owns_embedding, owns_output)
        decoder: Any = settings.decoder_class(config)
        if not isinstance(getattr(decoder, "norm", None), nn.Module):
            raise ValueError(f"{settings.decoder_class.__name__} has no norm behind its layers, as MTP layers need")
        decoder.set_input_embeddings(nn.Module())
        self.decoder = decoder
        self.enorm, self.hnorm = copy.deepcopy(decoder.norm), copy.deepcopy(decoder.norm)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.cache_name = cache_argument(inspect.signature(decoder.forward).parameters)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """True: its config, which names one where the target has experts, is that of its decoder."""
        return True

    def load_decoder(self, tensors: Mapping[str, Tensor], target: PreTrainedModel) -> None:
        """Load the one-layer model from tensors under the names of the target's class, as that loads its own.

        Raises ValueError where tensors are missing, not used or of another shape.
        """
        arguments: dict[str, Any] = {"dtype": target.dtype, **LOADING_OPTIONS}
        embedding = torch.zeros((), dtype=target.dtype).expand(self.config.vocab_size, self.config.hidden_size)
        loaded: Any = self.settings.decoder_class.from_pretrained(
            None, config=self.config, state_dict={**tensors, "embed_tokens.weight": embedding}, **arguments
        )
        decoder, info = loaded
        check_complete(info)
        decoder.set_input_embeddings(nn.Module())
        self.decoder, self.config = decoder.to(target.device), decoder.config

    def reset_rotary(self) -> None:
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is not None:
            self.decoder.rotary_emb = type(rotary)(config=self.config).to(self.fc.weight.device)

    def reduce(self, states: Tensor) -> Tensor:
        return states[:, :, 0]

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
        cache = past_key_values
        embeds = self.embed_tokens(input_ids)
        cache.features.allocate(embeds[:, :, None])
        parts = [self.enorm(embeds), self.hnorm(cache.features.read(position_ids)[:, :, 0])]
        inputs = self.fc(torch.cat(parts[::-1] if self.settings.hidden_first else parts, dim=-1))
        call = {"inputs_embeds": inputs, "attention_mask": attention_mask, "position_ids": position_ids}
        states = self.decoder(**call, **{self.cache_name: cache}, use_cache=True, return_dict=True).last_hidden_state
        cache.features.write(position_ids + 1, states[:, :, None])
        return CausalLMOutput(logits=self.logits_of(states, logits_to_keep))


def mtp_config(text: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a target's MTP layer as a model: one layer of full attention, with experts where it has some."""
    config: Any = copy.deepcopy(text)
    take_settings(config)
    values = {
        "num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_layer_types": ["sparse"],
        "first_k_dense_replace": 0, "mlp_only_layers": [],
    }  # fmt: skip
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    checked: PreTrainedConfig = config
    return checked
