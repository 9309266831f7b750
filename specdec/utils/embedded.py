"""The embedded pair: a small target, a draft model, an EAGLE-3 head and held-out prompts; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
TARGET = ASSETS / "target"
DRAFT = ASSETS / "draft"
EAGLE3 = ASSETS / "eagle3"


def prompts() -> list[dict[str, str]]:
    """Excerpts from held-out modules of the standard library: dicts with `id`, `task`, `prompt`."""
    return [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
