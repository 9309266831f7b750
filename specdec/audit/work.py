"""Pieces of work of several kinds, in turn until a budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from specdec.audit.evidence import Evidence, Key

# what a result is kept under, what is done, and the work itself; None: the budget ended before it was done
Piece = tuple[Key, str, Callable[[], dict[str, Any] | None]]
OnProgress = Callable[[str, float], None]  # called with what is done now, and the seconds that the run has taken
TURN_S = 10.0  # seconds that one kind of work goes on at most, since another may have to prepare something anew


def ignore_progress(what: str, seconds: float) -> None:
    pass


def work_through(
    queues: Mapping[str, Iterator[Piece]],
    shares: Mapping[str, float],
    evidence: Evidence,
    budget_s: float,
    on_progress: OnProgress,
) -> None:
    """Work until nothing is left, or for budget_s seconds; each kind gets its share as long as it has work."""
    left = dict(queues)
    begun = time.monotonic()
    spent = dict(evidence.seconds)
    while left and time.monotonic() < begun + budget_s:
        kind = min(left, key=lambda name: spent.get(name, 0.0) / shares[name])
        turn_ends = min(time.monotonic() + min(TURN_S, shares[kind] * budget_s), begun + budget_s)
        while (started := time.monotonic()) < turn_ends:
            piece = next(left[kind], None)
            if piece is None:
                del left[kind]
                break
            key, what, work = piece
            on_progress(what, started - begun)
            result = work()
            if result is None:  # the budget ended in the middle of it
                break
            seconds = time.monotonic() - started
            spent[kind] = spent.get(kind, 0.0) + seconds
            evidence.add(key, seconds, result)
