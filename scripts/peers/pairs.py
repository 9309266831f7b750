"""The models of a run: a target with a draft, or a target alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import widen_pair
from rich.console import Console
from transformers import PreTrainedModel

from peers import setup
from specdec.quant.config import Int4Config
from specdec.runtime.loading import load
from specdec.utils import embedded

BUILT_PAIRS = setup.ROOT / "build" / "pairs"
NAMES = ("embedded", *widen_pair.PAIRS, "smollm2")


@dataclass(frozen=True)
class Pair:
    """Folders of the target in full precision, the draft, and the target in 4 bits.

    draft: None where there is none. int4: None where the target is quantized while it is loaded.
    """

    name: str
    target: Path
    draft: Path | None
    int4: Path | None = None

    @cache  # noqa: B019  # pairs live as long as the process
    def load_dense(self, dtype: str) -> PreTrainedModel:
        return load(str(self.target), dtype, "cpu")

    @cache  # noqa: B019
    def load_int4(self, dtype: str) -> PreTrainedModel:
        return load_int4(self.int4 or self.target, dtype, is_quantized=self.int4 is not None)

    @cache  # noqa: B019
    def load_draft(self, dtype: str, int4: bool) -> PreTrainedModel:
        assert self.draft is not None
        return load_int4(self.draft, dtype) if int4 else load(str(self.draft), dtype, "cpu")


def load_int4(folder: Path, dtype: str, is_quantized: bool = False) -> PreTrainedModel:
    """The one place that decides how specdec's models are quantized. Groups are of the size that OpenVINO's have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="specdec keeps in full precision")  # of the head
        return load(str(folder), dtype, "cpu", None if is_quantized else Int4Config(setup.GROUP_SIZE))


def find_pair(name: str, console: Console) -> Pair:
    """The embedded pair, a widened one (cached in build/pairs), SmolLM2, or a folder with target/ and draft/."""
    if name == "embedded":
        return Pair(name, widen_pair.ORIGINAL, embedded.DRAFT, embedded.TARGET)
    folder = BUILT_PAIRS / name if name in NAMES else Path(name)
    if name in widen_pair.PAIRS and not (folder / "draft").exists():
        console.print(f"widening the embedded pair to {name}, once: {folder.relative_to(setup.ROOT)}")
        widen_pair.main([name, "--output", str(folder)])
    for role in ("target", "draft"):
        if not (folder / role / "config.json").exists() and (name, role) != ("smollm2", "draft"):
            hint = "--setup-peers writes it" if name == "smollm2" else f"pairs are {', '.join(NAMES)}"
            raise ValueError(f"--pair {name}: no model in {folder / role}; {hint}")
    return Pair(folder.name, folder / "target", None if name == "smollm2" else folder / "draft")
