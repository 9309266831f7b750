"""`import specdec`: the public names, and from_pretrained reads 4-bit checkpoints."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import specdec

ROOT = Path(__file__).parents[1]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LOAD = """
model = AutoModelForCausalLM.from_pretrained("specdec/assets/target")
assert any(type(module).__name__ == "Int4Linear" for module in model.modules())
"""
IMPORT_TRANSFORMERS = "from transformers import AutoModelForCausalLM\n"


@pytest.mark.parametrize("imports", [
    "import specdec\n" + IMPORT_TRANSFORMERS,
    IMPORT_TRANSFORMERS + "AutoModelForCausalLM.from_config\nimport specdec\n",
    "from specdec.quant import batch_invariant\n" + IMPORT_TRANSFORMERS,
], ids=["specdec first", "transformers first", "a module of specdec first"])  # fmt: skip
def test_from_pretrained_reads_4_bits_once_specdec_is_imported(imports: str) -> None:
    run(imports + LOAD)


def test_public_names_are_all_there() -> None:
    assert set(specdec.__all__) <= set(dir(specdec))
    for name in specdec.__all__:
        assert getattr(specdec, name).__name__ == name
    with pytest.raises(AttributeError, match="'specdec' has no attribute 'enabled'"):
        _ = specdec.enabled  # type: ignore[attr-defined]


def test_public_classes_can_be_pickled() -> None:
    config = pickle.loads(pickle.dumps(specdec.Int4Config(64)))
    assert isinstance(config, specdec.Int4Config)
    assert config.group_size == 64
