"""Plain decoding as the reference: the law that transformers' own loop draws each id of a given text from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _TextEnded(Exception):
    """Plain decoding goes on where the given text ends."""


class ForcedDraws(TorchFunctionMode):
    """Within, torch.multinomial returns ids [B, L] column by column, and `observe` gets the law of each column.

    observe: called with (column, probs [B, V]): the weights that the loop passes to torch.multinomial, after all
    processors of its call. Every other function runs as ever; other threads are not affected.
    """

    def __init__(self, ids: Tensor, observe: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.ids, self.observe, self.num_drawn = ids, observe, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        probs = args[0]
        if self.num_drawn == self.ids.shape[1]:
            raise _TextEnded
        self.observe(self.num_drawn, probs)
        self.num_drawn += 1
        return self.ids[:, self.num_drawn - 1, None].to(probs.device)


def replay(
    model: Any, inputs: dict[str, Tensor], text: Tensor, observe: Callable[[int, Tensor], None], **call: Any
) -> Tensor | None:
    """Run transformers' own sampling loop along a text instead of drawing: -> what that generate() call returns.

    model: not enabled. inputs: input_ids [B, P] and attention_mask. text: [B, P + L], as another loop returned it for
    the same call. The returned text is `text` again where the call's criteria end each row at the same position; None:
    plain decoding goes on where `text` ends.
    """
    ids = text[:, inputs["input_ids"].shape[1] :]
    try:
        with ForcedDraws(ids, observe):
            output: Tensor = model.generate(**inputs, **call | {"do_sample": True})
    except _TextEnded:
        return None
    return output
