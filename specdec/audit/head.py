"""Whether a draft head is run as it was trained: other settings are tried on texts that its target wrote.

A head that reads a hidden state of the wrong layer, or has a norm in the wrong place, fits its tensors and drafts, only
worse. So each setting on which readers of checkpoints differ is changed in turn, and the head predicts the same
positions again. Its expected acceptance at a position, the sum over ids of min(p, q), is compared pair by pair: where a
change raises it by more than chance explains, the setting is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.dflash import DFlashHead
from specdec.drafters.dspark import DSparkHead
from specdec.drafters.eagle3 import Eagle3Head
from specdec.drafters.heads import DraftHead
from specdec.drafters.mtp import MtpHead
from specdec.drafters.peagle import PEagleHead
from specdec.runtime.runner import ModelRunner

STRIDE = 4  # positions from one second step, or block, of a head to the next; each takes a forward
MIN_POSITIONS = 300  # below which nothing is said
MIN_Z = 5.0  # standard errors that a change must bring; positions of a text are not independent


@dataclass(frozen=True)
class Variant:
    """what: a change of the settings, for a person. layers: the target's hidden states that the head reads.

    changed: within, the head has the change.
    """

    what: str
    layers: tuple[int, ...]
    changed: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Reading:
    """Expected acceptance with a change; the mean difference to the head as it is, and that in standard errors."""

    what: str
    acceptance: float
    difference: float = 0.0
    z: float = 0.0

    @property
    def is_better(self) -> bool:
        return self.z > MIN_Z


@dataclass(frozen=True)
class HeadAudit:
    """As it is, without the target's hidden states, and with each change."""

    num_positions: int
    as_it_is: Reading
    without_states: Reading
    changes: list[Reading]

    @property
    def better(self) -> list[Reading]:
        """The changes that raise acceptance, the best first."""
        return sorted((one for one in self.changes if one.is_better), key=lambda one: -one.difference)

    @property
    def reads_states(self) -> bool:
        """Whether the target's hidden states help it."""
        return self.without_states.z < -MIN_Z

    @property
    def passed(self) -> bool | None:
        """Whether no change is better and the target's hidden states help; None where there are too few positions."""
        if self.num_positions < MIN_POSITIONS:
            return None
        return not self.better and self.reads_states

    @property
    def verdict(self) -> str:
        """One sentence for a person."""
        if self.passed is None:
            return f"{self.num_positions} positions are too few to tell; give more prompts or longer texts"
        if self.better:
            best = self.better[0]
            return (
                f"it is not run as it was trained: with {best.what} it would accept {best.acceptance:.1%} in place of"
                f" {self.as_it_is.acceptance:.1%}"
            )
        if not self.reads_states:
            return "the target's hidden states do not help it: it was trained for another target, or is damaged"
        return f"no other setting is better; it accepts {self.as_it_is.acceptance:.1%} in its first steps"


@torch.no_grad()
def audit_head(
    target: PreTrainedModel,
    head: DraftHead,
    texts: Sequence[Sequence[int]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadAudit:
    """Let a head predict texts, as lists of ids, that the target has written, with each of its settings.

    on_progress: called with the readings that are done and their number. Raises ValueError where no text has four ids.
    """
    read = [torch.tensor([list(text)], device=target.device) for text in texts if len(text) >= 4]
    if not read:
        raise ValueError("no text has four ids or more, so there is nothing to predict")
    variants = [*_variants(head, target.config.get_text_config(decoder=True).num_hidden_layers)]
    total = (len(variants) + 2) * len(read)
    found: dict[str, list[Tensor]] = {}
    done = 0
    for ids in read:
        output = target(input_ids=ids, output_hidden_states=True, use_cache=False)
        probs, hidden = output.logits[0].float().softmax(-1), output.hidden_states
        for variant in (Variant("", head.settings.feature_layers), Variant("none", ()), *variants):
            layers = variant.layers or head.settings.feature_layers
            states = torch.stack([hidden[layer] for layer in layers], dim=2)
            with variant.changed():
                reduced = head.reduce(states if variant.layers else torch.zeros_like(states))
                found.setdefault(variant.what, []).append(_acceptances(head, ids, reduced, probs))
            done += 1
            on_progress(done, total)
    values = {what: torch.cat(parts).double() for what, parts in found.items()}
    own = values.pop("")
    as_it_is = Reading("as it is", float(own.mean()))
    readings = [_compared(what, value, own) for what, value in values.items()]
    return HeadAudit(len(own), as_it_is, readings[0], readings[1:])


def _compared(what: str, values: Tensor, own: Tensor) -> Reading:
    difference = values - own
    error = float(difference.std()) / math.sqrt(len(difference))
    mean = float(difference.mean())
    return Reading(what, float(values.mean()), mean, mean / error if error > 0 else 0.0)


def _variants(head: DraftHead, num_layers: int) -> Iterator[Variant]:
    """The changes that are tried: another hidden state, another order of them, and settings of the head's kind."""
    own = head.settings.feature_layers
    top = num_layers if isinstance(head, MtpHead) else num_layers - 1
    moved = [{index} for index in range(len(own))] + [{*range(len(own))}] * (len(own) > 1)
    shifts = [tuple(layer + by * (at in which) for at, layer in enumerate(own)) for which in moved for by in (-1, 1)]
    for layers in [*shifts, own[::-1]]:
        if layers != own and all(0 <= layer <= top for layer in layers):
            yield Variant(f"hidden states {', '.join(map(str, layers))}", layers)
    settings: Any = head.settings
    if isinstance(head, Eagle3Head):
        first: Any = head.layers[0]
        before = not first.norm_before_residual
        yield Variant(
            f"norm_before_residual={before}".lower(), own, lambda: _changed(first, "norm_before_residual", before)
        )
        if not isinstance(head, PEagleHead):
            other = replace(settings, norm_output=not settings.norm_output)
            yield Variant(f"norm_output={other.norm_output}".lower(), own, lambda: _changed(head, "settings", other))
    elif isinstance(head, MtpHead):
        other = replace(settings, hidden_first=not settings.hidden_first)
        yield Variant("the projection's inputs in the other order", own, lambda: _changed(head, "settings", other))
    elif isinstance(head, DFlashHead):
        other = replace(settings, sample_from_anchor=not settings.sample_from_anchor)
        yield Variant(
            f"sample_from_anchor={other.sample_from_anchor}".lower(), own, lambda: _changed(head, "settings", other)
        )
    weight = head.fc.weight
    if not weight.shape[1] % weight.shape[0]:
        blocks = torch.cat([block.T for block in weight.split(weight.shape[0], dim=1)], dim=1)
        yield Variant("fc.weight transposed", own, lambda: _changed(weight, "data", blocks))


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _acceptances(head: DraftHead, ids: Tensor, states: Tensor, probs: Tensor) -> Tensor:
    """The chance of acceptance of each id that is predicted, along a text, [N].

    ids: [1, L]. states: [1, L, H], the target's, reduced. probs: [L, V], of the target, of the id behind each position.
    """
    found = _logits(head, ids, states)
    return torch.cat([torch.minimum(logits.softmax(-1), probs[behind]).sum(-1) for logits, behind in found])


def _logits(head: DraftHead, ids: Tensor, states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each step of a head along a text: its logits [N, V], and the last position [N] that is known before each."""
    return _block_logits(head, ids, states) if isinstance(head, DFlashHead) else _chain_logits(head, ids, states)


def _chain_logits(head: DraftHead, ids: Tensor, states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The first and the second step of a head that goes on with its own output, as P-EAGLE's does not."""
    length, device = ids.shape[1], ids.device
    runner, positions = ModelRunner(head), torch.arange(length - 2, device=device)
    runner.begin(1)
    runner.cache.window.reserve(length)
    with torch.inference_mode():
        runner.cache.features.write(positions[None], states[:, : length - 2, None])
    first = runner.forward(ids[:, 1:-1], positions[None]).logits[0]
    found = [(first, positions + 1)]
    # Backwards, since a second step's own entries in the cache are then seen by no other one.
    at = range(length - 3, 0, -STRIDE)
    if at and not isinstance(head, PEagleHead):
        second = [runner.forward(ids[:, p + 1 : p + 2], torch.tensor([[p]], device=device)).logits[0] for p in at]
        found.append((torch.cat(second), torch.tensor([*at], device=device) + 1))
    return found


def _block_logits(head: DFlashHead, ids: Tensor, states: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of a head that drafts blocks, the first id of each."""
    length, size, device = ids.shape[1], head.settings.block_size, ids.device
    runner, context = ModelRunner(head), torch.arange(length - 1, device=device)[None]
    runner.begin(1)
    runner.cache.window.reserve(length + size)
    with torch.inference_mode():
        head.write_context(states[:, :-1], context, runner.cache_at(context))
    first = head.settings.first_drafting
    found = []
    at = range(length - 2, -1, -STRIDE)  # backwards: a block overwrites entries behind it, which no earlier one sees
    for anchor in at:
        block = torch.full((1, size), head.settings.mask_token_id, device=device)
        block[0, 0] = ids[0, anchor]
        positions = anchor + torch.arange(size, device=device)[None]
        logits = runner.forward(block, positions).logits[0]
        if isinstance(head, DSparkHead):
            with torch.inference_mode():
                logits = _with_bias(head, block[0, :1], runner.read_features(positions)[0, :, 0], logits)
        found.append(logits[first])
    return [(torch.stack(found), torch.tensor([*at], device=device))]


def _with_bias(head: DSparkHead, anchor: Tensor, states: Tensor, logits: Tensor) -> Tensor:
    """Logits [block, V] with what the id before a block says about those up to its first draft."""
    memory = states.new_zeros(1, head.settings.markov_rank)
    rows = []
    for column in range(head.settings.first_drafting + 1):
        bias, _, memory = head.read_before(anchor, states[column : column + 1], memory)
        rows.append(logits[column] if bias is None else logits[column] + bias[0, 0])
    return torch.stack(rows)
