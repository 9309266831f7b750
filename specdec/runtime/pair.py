"""The models that one call runs: the target and, with a draft model, the draft."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.runtime.runner import ModelRunner


@dataclass(frozen=True)
class PairMember:
    """One model of a pair.

    name: "target" or "draft", for messages.
    exact: whether the logits decide the text, as the target's do. Those of a draft model may be rounded differently.
    """

    name: str
    runner: ModelRunner
    exact: bool
