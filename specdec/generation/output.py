"""What a call returns: streamed ids, padded text, scores, logits and the KV cache, as plain decoding returns them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.core.lockstep import Lockstep
from specdec.core.sequences import Sequences
from specdec.core.stats import Stats
from specdec.core.steps import StepResult
from specdec.runtime.model_forward import cache_argument
from specdec.runtime.runner import ModelRunner

CACHE_FIELD = cache_argument(GenerateDecoderOnlyOutput.__dataclass_fields__)  # the field with the KV cache


class ScoreCollector:
    """Collects the scores and logits of a call, where it requests them.

    scores, logits: for each generated position [B, V]; None where they are not requested. In lockstep they are plain
    decoding's. Otherwise they are 0 after a row's stop, where plain decoding has those of its padding.
    """

    def __init__(self, lockstep: Lockstep | None, config: GenerationConfig, batch_size: int) -> None:
        self.lockstep = lockstep
        collects = bool(config.return_dict_in_generate) and lockstep is None
        self._scores = _PerPosition(batch_size) if collects and config.output_scores else None
        self._logits = _PerPosition(batch_size) if collects and config.output_logits else None

    def add(self, result: StepResult) -> None:
        if self._scores is not None:
            self._scores.add(result, result.scores)
        if self._logits is not None:
            self._logits.add(result, result.logits)

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        if self.lockstep is not None:
            return self.lockstep.scores
        return None if self._scores is None else self._scores.columns()

    @property
    def logits(self) -> tuple[Tensor, ...] | None:
        if self.lockstep is not None:
            return self.lockstep.logits
        return None if self._logits is None else self._logits.columns()


class _PerPosition:
    """Collects a tensor [V] for each committed id."""

    def __init__(self, batch_size: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(batch_size)]

    def add(self, result: StepResult, values: Tensor) -> None:
        for row, count in enumerate(result.emitted.tolist()):
            self.rows[row].append(values[row, :count].clone())

    def columns(self) -> tuple[Tensor, ...]:
        """One tensor [B, V] for each generated position, 0 after a row's stop."""
        rows = [torch.cat(row) for row in self.rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(1)


def stream(streamer: Any, sequences: Sequences, result: StepResult) -> None:
    """Pass the ids that a step committed to a streamer one at a time, as the stock loop does; batch size 1."""
    count, stop = int(result.emitted), int(sequences.lengths)
    for token in sequences.ids[0, stop - count : stop, None].cpu():
        streamer.put(token)


def padded_text(sequences: Sequences, pad_token_id: int) -> Tensor:
    """[B, P + longest continuation] int64: the prompts as passed, the new ids, padding after each row's stop."""
    lengths = sequences.padded_lengths
    text = sequences.padded(int(lengths.max()))
    if len(text) == 1:
        return text
    is_padding = torch.arange(text.shape[1], device=text.device) >= lengths[:, None]
    return text.masked_fill(is_padding, pad_token_id)


def dict_output(
    target: ModelRunner, sequences: Sequences, text: Tensor, scores: ScoreCollector, stats: Stats
) -> GenerateDecoderOnlyOutput:
    """What generate() returns with return_dict_in_generate=True; `speculation` holds the call's Stats."""
    fields: dict[str, Any] = {"sequences": text, "scores": scores.scores, "logits": scores.logits}
    fields[CACHE_FIELD] = plain_cache(target, sequences, text)
    output = GenerateDecoderOnlyOutput(**fields)
    output.speculation = stats
    return output


@torch.no_grad()
def plain_cache(target: ModelRunner, sequences: Sequences, text: Tensor) -> DynamicCache:
    """The KV cache that plain decoding returns with this text [B, L]: entries of all columns but the last, left-padded.

    Plain decoding feeds the padding after a row's stop too. The target has not read it yet, and does so here.
    """
    text = text.to(sequences.device)
    padding, width = sequences.padding, text.shape[1] - 1
    last = width - 1 - padding  # position of the last entry that plain decoding has
    last_written = sequences.lengths - 2
    if (num_missing := int((last - last_written).max())) > 0:
        columns = torch.arange(text.shape[1], device=text.device) + padding[:, None]
        target.reserve(int(last.max()) + 1)
        target.feed(text.gather(1, columns.clamp(max=width)), last, num_missing)
    cache = DynamicCache(config=target.config)
    columns = (torch.arange(width, device=text.device) - padding[:, None]).clamp(min=0)
    buffers = target.cache.buffers()
    for index, (keys, values) in enumerate(zip(buffers[0::2], buffers[1::2], strict=False)):  # without features
        cache.update(_gather_slots(keys, columns), _gather_slots(values, columns), index)
        layer: Any = cache.layers[index]
        if layer.is_sliding:  # it holds a view of its last columns, which keeps all columns in memory
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


def _gather_slots(states: Tensor, slots: Tensor) -> Tensor:
    """A copy of slots [B, L] of each row's states [B, H, S, D]: -> [B, H, L, D]."""
    index = slots[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index.to(states.device))
