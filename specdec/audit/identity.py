"""Greedy texts: are they those of plain decoding, and where one is not, did rounding decide?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.audit.widths import stock_logits, window_logits
from specdec.generation.inspection import spare_runner, stock_loop

CHECKED_WIDTHS = (1, 2, 3, 4, 8)  # of the forwards in which the logits of a divergence are measured again
CHECKED_BATCHES = (1, 4)


@dataclass
class Divergence:
    """The first position at which a speculative text differs from the plain one.

    prompt: its index. position: of the new text, from 0. plain_id, speculative_id: the ids there. logits: of the two
    ids under plain decoding, a position at a time. margin: the first less the second. margins: the same difference in
    windows of other widths and batches. spread: how far those lie from `margin` at most.
    """

    prompt: int
    position: int
    plain_id: int
    speculative_id: int
    logits: tuple[float, float]
    margin: float
    margins: list[float]
    spread: float

    @property
    def is_rounding(self) -> bool:
        """Whether the margin lies within the measured spread; otherwise it is a fault."""
        return abs(self.margin) <= self.spread


def plain_texts(model: Any, inputs: dict[str, Tensor], **call: Any) -> Tensor:
    """Greedy texts [B, L] of transformers' own loop."""
    with stock_loop(model):
        text: Tensor = model.generate(**inputs, do_sample=False, **call)
    return text


def speculative_texts(model: Any, inputs: dict[str, Tensor], **call: Any) -> Tensor:
    """Greedy texts [B, L] of an enabled model. Raises ValueError where the stock loop served the call."""
    text: Tensor = model.generate(**inputs, do_sample=False, **call)
    if specdec.last_stats(model) is None:
        raise ValueError("transformers' own loop served the call, so there is nothing to audit")
    return text


def first_difference(plain: list[int], speculative: list[int]) -> int | None:
    """The first position at which two texts differ, None where they are equal; the shorter one's end counts."""
    pairs = zip(plain, speculative, strict=False)
    found = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(speculative)))
    return None if found == len(plain) == len(speculative) else found


def explain(
    model: PreTrainedModel, prompt: int, ids: Tensor, plain: list[int], speculative: list[int], position: int
) -> Divergence:
    """Measure the logits at a divergence. ids: [P] int64 of the prompt; plain, speculative: ids behind it."""
    prefix = torch.cat([ids, torch.tensor(plain[:position], dtype=torch.int64, device=ids.device)])
    chosen = [text[position] if position < len(text) else text[-1] for text in (plain, speculative)]
    first = max(len(ids) - 1, len(prefix) - 8, 1)
    logits = stock_logits(model, prefix, first)[-1][chosen].tolist()
    generator = torch.Generator().manual_seed(0)
    runner = spare_runner(model)
    margins = []
    with torch.inference_mode():
        for batch in CHECKED_BATCHES:
            for width in CHECKED_WIDTHS:
                a, b = window_logits(runner, prefix, first, width, batch, generator)[-1][chosen].tolist()
                margins.append(a - b)
    margin = logits[0] - logits[1]
    return Divergence(
        prompt, position, chosen[0], chosen[1], (logits[0], logits[1]), margin, margins,
        spread=max(abs(other - margin) for other in margins),
    )  # fmt: skip
