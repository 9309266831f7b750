"""Sampled calls: are ids drawn from the law of plain decoding? Speculative texts, replayed by transformers' own loop.

Each drawn id has a law p under plain decoding, given all ids before it. Bettors stake on features of the id whose
expectation under p is known (see statistics.py), apart for groups of positions that are known before the id is drawn:
so the joint law of consecutive ids is tested through its conditional laws.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec.audit.findings import histogram
from specdec.audit.reference import replay
from specdec.audit.statistics import Bet, Bettors, Kind, RepeatedPrefixes
from specdec.core.steps import StepResult
from specdec.generation.inspection import observed_steps, stock_loop

NEW_TOKENS = 12  # ids of a text: a few steps, with rejections and bonus ids
RARE = 1e-4  # an id of a smaller probability is rare

GROUPS = {
    "all": "all ids",
    "draft": "draft positions",
    "last": "the last draft position",
    "bonus": "bonus ids",
    "rejection": "first ids after a rejection",
    "stop": "stop ids",
}
# Features of each group. likelihood: the share of p's mass below p(x), randomized among ties. rare, impossible:
# p(x) < RARE, p(x) = 0. repeated: ids that were drawn after this prefix more often than p says. draft: q(x) > p(x).
FEATURES = {
    "all": ("likelihood", "rare", "impossible", "repeated"),
    "draft": ("likelihood", "draft"),
    "last": ("likelihood", "draft"),
    "bonus": ("likelihood",),
    "rejection": ("likelihood", "draft"),
    "stop": ("stop",),
}
BETTORS = Bettors(FEATURES)


class EvenAndOddInTurn(LogitsProcessor):
    """A processor with a state, as a grammar's matcher has: it allows even ids and odd ids in turn."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        is_excluded = torch.arange(scores.shape[1], device=scores.device) % 2 == self.num_calls % 2
        return scores.masked_fill(is_excluded, -torch.inf)


@dataclass(frozen=True)
class SampledCall:
    """One kind of generate() call. has_grammar: with a processor that has a state, anew for each call."""

    what: str
    arguments: dict[str, Any]
    has_grammar: bool = False
    has_stops: bool = False

    def build(self, stop_ids: list[int]) -> dict[str, Any]:
        """The arguments of one call."""
        arguments = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW_TOKENS} | self.arguments
        arguments["eos_token_id"] = stop_ids if self.has_stops else []
        if self.has_grammar:
            arguments["logits_processor"] = LogitsProcessorList([EvenAndOddInTurn()])
        return arguments


CALLS = {
    "plain": SampledCall("temperature 1", {}),
    "nucleus": SampledCall("temperature 0.7, top-p 0.9", {"temperature": 0.7, "top_p": 0.9}),
    "penalty": SampledCall("repetition penalty 1.3, min-p 0.05", {"repetition_penalty": 1.3, "min_p": 0.05}),
    "stops": SampledCall("temperature 1, with stop ids", {}, has_stops=True),
    "grammar": SampledCall("a processor with a state, in lockstep", {}, has_grammar=True),
}


@dataclass
class Sample:
    """What one sampled call showed. All sums are over its ids.

    log_wealth: the logarithm of the factor by which the wealth of each of BETTORS changed.
    num_ids: by group.
    means: E_p[1(q > p)] at draft positions, in a histogram.
    impossible: ids with p = 0. excluded: ids whose law differs from plain decoding's by more than rounding.
    stop_errors: rows that end at another position than under plain decoding.
    seed_errors: 1 where the same seed gave another text.
    max_logit_difference: the largest between logits that were verified with and those of plain decoding, as a share of
        the call's largest logit, as widths.py measures rounding.
    """

    log_wealth: list[float]
    num_ids: dict[str, int]
    means: list[int]
    impossible: int = 0
    excluded: int = 0
    stop_errors: int = 0
    seed_errors: int = 0
    max_logit_difference: float = 0.0


@dataclass
class _Step:
    """One step of one row. probs: [K, V] of its draft, ids [K] where it is one-hot; num_drafted: of them that count."""

    num_drafted: int
    ids: Tensor
    probs: Tensor | None
    emitted: int
    accepted: int
    logits: Tensor
    scores: Tensor


@dataclass
class _Recorder:
    """Collects the steps of a call by row."""

    rows: dict[int, list[_Step]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, result: StepResult) -> None:
        lengths, accepted = result.draft.lengths.tolist(), result.verdict.accepted.tolist()
        for row, step in enumerate(result.steps):
            if step is None:
                continue
            probs = None if result.draft.probs is None else result.draft.probs[row].clone()
            self.rows[row].append(
                _Step(
                    lengths[row], result.draft.ids[row].clone(), probs, step.emitted, accepted[row],
                    result.logits[row].clone(), result.scores[row].clone(),
                )
            )  # fmt: skip


@dataclass(frozen=True)
class _Position:
    """Where an id stands in the steps: known before it is drawn.

    step: None where the loop shows no steps. after_rejection: the step before it kept less than its draft; in lockstep
    another row's rejection counts too.
    """

    step: _Step | None
    column: int = 0
    after_rejection: bool = False

    @property
    def is_draft(self) -> bool:
        return self.step is not None and self.column < self.step.num_drafted

    def groups(self) -> list[str]:
        names = ["all"]
        if self.step is None:
            return names
        if self.is_draft:
            names.append("draft")
            if self.column == self.step.num_drafted - 1:
                names.append("last")
        elif self.step.num_drafted:
            names.append("bonus")
        return [*names, "rejection"] if self.after_rejection else names


UNKNOWN = _Position(None)


def _positions(steps: list[_Step]) -> list[_Position]:
    """One for each id of a row."""
    positions: list[_Position] = []
    after_rejection = False
    for step in steps:
        for column in range(step.emitted):
            positions.append(_Position(step, column, after_rejection and column == 0))
        after_rejection = step.accepted < step.num_drafted
    return positions


def draw_and_replay(
    model: Any,
    inputs: dict[str, Tensor],
    call: SampledCall,
    stop_ids: list[int],
    pad_token_id: int,
    num_draft_tokens: int,
    seed: int,
    prefixes: RepeatedPrefixes,
    max_law_rounding: float = 0.0,
    repeat: bool = False,
    assistance: dict[str, Any] | None = None,
) -> Sample:
    """One sampled call of an enabled model, and its replay.

    inputs: input_ids and attention_mask [B, P]. prefixes: of calls of this kind. max_law_rounding: the largest total
    variation between the law that an id was drawn from and plain decoding's that counts as rounding; an id with a
    larger one is left out of the bets and counted. repeat: draw a second time with the same seed, and compare.
    assistance: arguments with which transformers' own loop drafts; None: specdec's loop draws.
    Raises ValueError where the stock loop served the call.
    """
    recorder = _Recorder()
    arguments = {"pad_token_id": pad_token_id, "num_assistant_tokens": num_draft_tokens} | (assistance or {})

    def draw() -> Tensor:
        torch.manual_seed(seed)
        text: Tensor = model.generate(**inputs, **call.build(stop_ids), **arguments)
        return text

    if assistance is None:
        with observed_steps(model, recorder):
            text = draw()
        if specdec.last_stats(model) is None:
            raise ValueError(f"transformers' own loop served the call ({call.what}), so there is nothing to audit")
        again = draw() if repeat else text
    else:
        with stock_loop(model):
            text = draw()
            again = draw() if repeat else text
    width = inputs["input_ids"].shape[1]
    rows = {row: _positions(steps) for row, steps in recorder.rows.items()}
    if assistance is not None:
        rows = {row: [UNKNOWN] * (text.shape[1] - width) for row in range(len(text))}
    sample = Sample([0.0] * len(BETTORS), dict.fromkeys(GROUPS, 0), [])
    bets = _Bets(prefixes, torch.tensor(stop_ids, dtype=torch.int64), seed, max_law_rounding, sample)

    captured: list[Tensor] = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: captured.append(output.logits[:, -1].float()), with_kwargs=True
    )

    def observe(column: int, probs: Tensor) -> None:
        logits = captured.pop()
        captured.clear()
        live = [row for row, positions in rows.items() if column < len(positions)]
        if live:
            positions = [rows[row][column] for row in live]
            texts = text[live, : width + column + 1].cpu()
            bets.place(positions, texts, probs[live].cpu(), logits[live].cpu(), call.has_stops)

    with stock_loop(model):
        try:
            plain = replay(model, inputs, text, observe, **call.build(stop_ids), pad_token_id=pad_token_id)
        finally:
            handle.remove()
    sample.seed_errors = 0 if torch.equal(text, again) else 1
    sample.stop_errors = _count_stop_errors(text, plain)
    bets.finish()
    return sample


def _count_stop_errors(text: Tensor, plain: Tensor | None) -> int:
    if plain is None:
        return len(text)
    width = min(text.shape[1], plain.shape[1])
    is_other = (text[:, :width] != plain[:, :width]).any(1)
    return int(is_other.sum()) if text.shape == plain.shape else max(1, int(is_other.sum()))


class _Bets:
    """Collects features and their means, then the wealth of BETTORS."""

    def __init__(
        self, prefixes: RepeatedPrefixes, stop_ids: Tensor, seed: int, max_law_rounding: float, sample: Sample
    ) -> None:
        self.prefixes, self.stop_ids, self.max_law_rounding, self.sample = prefixes, stop_ids, max_law_rounding, sample
        self.generator = torch.Generator().manual_seed(seed)
        self.placed: dict[Kind, list[Bet]] = defaultdict(list)
        self.means: list[float] = []
        self.max_logit_change, self.max_logit = 0.0, 1e-30

    def place(self, positions: list[_Position], texts: Tensor, probs: Tensor, logits: Tensor, has_stops: bool) -> None:
        """One id of each of R rows, the last of texts [R, L]; its law [R, V] and logits [R, V] under plain decoding."""
        sample = self.sample
        law_change = torch.zeros(len(positions))
        p = probs.double()
        p = own = p / p.sum(1, keepdim=True)
        steps = [(position.step, position.column) for position in positions if position.step is not None]
        if steps:
            own_logits = torch.stack([step.logits[column].cpu() for step, column in steps])
            own_scores = torch.stack([step.scores[column].cpu() for step, column in steps])
            self.max_logit_change = max(self.max_logit_change, float((own_logits - logits).abs().max()))
            self.max_logit = max(self.max_logit, float(logits.abs().max()))
            law_change = (own_scores.softmax(-1) - probs).abs().sum(1) / 2
            own = own_scores.double().softmax(-1)
        drawn = texts[:, -1:]
        likelihood = p.gather(1, drawn)
        uniform = torch.rand(len(p), generator=self.generator, dtype=torch.float64)
        below, ties = p.where(p < likelihood, 0).sum(1), p.where(p == likelihood, 0).sum(1)
        features = {
            "likelihood": torch.stack([below + uniform * ties, torch.full_like(below, 0.5)]),
            "rare": torch.stack([(likelihood[:, 0] < RARE).double(), p.where(p < RARE, 0).sum(1)]),
            "impossible": torch.stack([(likelihood[:, 0] == 0).double(), torch.zeros_like(below)]),
            "draft": self._toward_draft(positions, drawn[:, 0], p),
            "stop": torch.stack([torch.isin(drawn[:, 0], self.stop_ids).double(), p[:, self.stop_ids].sum(1)]),
        }
        sample.impossible += int((likelihood == 0).sum())
        by_row = {name: feature.clamp(max=1).T.tolist() for name, feature in features.items()}
        tolerances = law_change.double().tolist()
        # Rare ids could hide in a whole law's tolerance: here it is how much rounding changes the probability of these.
        event_tolerances = {
            "rare": (own - p).where(p < RARE, 0).sum(1).abs().tolist(),
            "impossible": own.where(p == 0, 0).sum(1).tolist(),
        }
        for row, (position, (*prefix, token)) in enumerate(zip(positions, texts.tolist(), strict=True)):
            if tolerances[row] > self.max_law_rounding:  # known before the id is drawn, so no choice of ids
                sample.excluded += 1
                continue
            repeated = self.prefixes.feature(tuple(prefix), token, lambda ids, law=p[row]: law[ids].tolist())  # type: ignore[misc]
            names = position.groups()
            if position.is_draft:
                self.means.append(by_row["draft"][row][1])
            if has_stops:
                names.append("stop")
            for group in names:
                sample.num_ids[group] += 1
                for feature in FEATURES[group]:
                    if feature != "draft" or position.is_draft:
                        z, mean = repeated if feature == "repeated" else by_row[feature][row]
                        tolerance = event_tolerances.get(feature, tolerances)[row]
                        self.placed[group, feature].append((z, mean, tolerance))

    @staticmethod
    def _toward_draft(positions: list[_Position], drawn: Tensor, p: Tensor) -> Tensor:
        """Whether q(x) > p(x), and the probability of that under p: [2, R], zeros where nothing was drafted."""
        found = torch.zeros(2, len(positions), dtype=torch.float64)
        for row, position in enumerate(positions):
            step, column = position.step, position.column
            if step is None or not position.is_draft:
                continue
            if step.probs is not None:
                is_larger = step.probs[column].cpu().double() > p[row]
                found[0, row], found[1, row] = is_larger[drawn[row]], p[row][is_larger].sum()
            elif p[row, step.ids[column]] < 1:
                found[0, row], found[1, row] = drawn[row] == step.ids[column], p[row, step.ids[column]]
        return found

    def finish(self) -> None:
        """Set the sample's log_wealth, means and max_logit_difference."""
        self.sample.log_wealth = BETTORS.wager(self.placed)
        self.sample.means = histogram(self.means)
        self.sample.max_logit_difference = self.max_logit_change / self.max_logit
