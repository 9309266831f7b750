"""P-EAGLE: an EAGLE-3 head that drafts all ids behind the first in one forward.

P-EAGLE: Parallel-Drafting EAGLE with Scalable Training, https://github.com/vllm-project/speculators. Behind the last
committed id the head reads, at each further position, a mask id and a learned state in place of its own output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specdec.core.sequences import Sequences
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3Head, Eagle3Settings


@dataclass(frozen=True, kw_only=True)
class PEagleSettings(Eagle3Settings):
    """Those of an EAGLE-3 head, and the id that it reads at the positions that it drafts."""

    mask_token_id: int


class PEagleHead(Eagle3Head):  # type: ignore[no-untyped-call]
    """The head. mask_hidden: [n * H'], in place of the target's hidden states."""

    kind = "a P-EAGLE head"
    settings: PEagleSettings

    def __init__(
        self, config: PreTrainedConfig, settings: PEagleSettings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config, settings, owns_embedding, owns_output)
        self.mask_hidden = nn.Parameter(torch.empty(len(settings.feature_layers) * settings.target_hidden_size))

    def mask_state(self) -> Tensor:
        """What `reduce` makes of mask_hidden: [1, 1, H]."""
        return self.reduce(self.mask_hidden.view(1, 1, len(self.settings.feature_layers), -1))


class PEagleDrafter(Eagle3Drafter):
    """Drafts the first id as it reads committed ones, and all others in one forward.

    In sampled calls they are drawn independently of each other.
    """

    def _draft(
        self, sequences: Sequences, width: int, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        head = self.head
        assert isinstance(head, PEagleHead)
        text, last, limit = self._read_text(sequences, width, limit)
        output = self.runner.feed(self._within_vocabulary(text), last, width)
        assert output is not None  # width is at least 1
        logits = output.logits
        if num_ids > 1:
            # a row that drafts fewer ids repeats its last one: the same entry in the same slot
            steps = torch.arange(1, num_ids, device=last.device)
            is_drafted = steps < limit[:, None]
            positions = last[:, None] + steps * is_drafted
            features = self.runner.cache.features
            features.window.reserve(sequences.longest)
            with torch.inference_mode():
                own = features.read(last[:, None])[:, :, 0]
                self._write_states(torch.where(is_drafted[..., None], head.mask_state(), own), positions)
            last_ids = self._within_vocabulary(text.gather(1, last[:, None]))
            masks = torch.where(is_drafted, head.settings.mask_token_id, last_ids)
            logits = torch.cat([logits, self.runner.forward(masks, positions).logits], dim=1)
        return self._choose_each(logits, sequences, limit)
