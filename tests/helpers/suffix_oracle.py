"""Writes tests/data/suffix_proposals.json: what arctic-inference's suffix trees propose for random texts.

    python -m tests.helpers.suffix_oracle

It needs arctic-inference 0.3.0, which nothing else here does.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "suffix_proposals.json"
SCENARIOS = 48


def scenario(seed: int) -> dict[str, Any]:
    """A tree that texts are added to and removed from. A proposal: context, limits, and the ids and score found."""
    from arctic_inference.suffix_decoding._C import SuffixTree

    rng = random.Random(seed)
    depth, vocabulary = rng.choice([2, 3, 5, 8, 24]), rng.choice([1, 2, 3, 5, 20])
    tree, events = SuffixTree(depth), []
    texts: dict[int, list[int]] = {}
    for number in range(rng.randint(2, 8)):
        period = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 8))]
        ids = [
            period[at % len(period)] if rng.random() < 0.7 else rng.randrange(vocabulary)
            for at in range(rng.randint(1, 30))
        ]
        tree.extend(number, ids)
        texts[number] = ids
        events.append({"append": ids})
        while texts and rng.random() < 0.3:
            oldest = min(texts)
            tree.remove(oldest)
            del texts[oldest]
            events.append({"remove": oldest})
        for _ in range(4):
            known = rng.choice(list(texts.values()) or [[0]])
            context = (known[: rng.randint(1, len(known))] + [rng.randrange(vocabulary)] * rng.randrange(2))[-depth:]
            limits = rng.randint(0, 10), rng.choice([0.5, 1.0, 2.0, 4.0]), rng.choice([0.0, 0.1, 0.3, 0.5])
            found = tree.speculate(context, limits[0], limits[1], 0.0, limits[2], False)
            events.append({"context": context, "limits": limits, "ids": found.token_ids, "score": found.score})
    return {"depth": depth, "events": events}


if __name__ == "__main__":
    lines = [json.dumps(scenario(seed), separators=(",", ":")) for seed in range(SCENARIOS)]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
