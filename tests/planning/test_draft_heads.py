"""What a plan counts of a draft head: its weights, its cache, and the hidden states that it and the target keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import specdec
from specdec.generation.enable import state_of
from specdec.planning.footprint import measure_draft_footprint
from tests.helpers.families import FAMILIES, make_model, prompts
from tests.helpers.heads import random_dflash, random_dspark, random_head, random_peagle
from tests.helpers.mtp import random_mtp


@pytest.mark.parametrize("make", [random_head, random_peagle, random_dflash, random_dspark, random_mtp])
def test_weights_cache_and_hidden_states_to_the_byte(
    make: Callable[[PreTrainedModel, Path], Any], tmp_path: Path
) -> None:
    target = make_model("llama", seed=3, **FAMILIES["llama"])
    drafter = make(target, tmp_path)
    size = measure_draft_footprint(str(tmp_path), target.config, dtype=torch.float32, device="cpu")
    shared = {id(value) for value in target.parameters()}
    assert size.plain_bytes == sum(value.nbytes for value in drafter.head.parameters() if id(value) not in shared)
    held = {}

    def observe(_: Any) -> None:
        caches = [drafter.runner.cache, state_of(target).target.cache]
        keys: Any = caches[0].layers[0].keys
        held["slots"] = keys.shape[0] * keys.shape[2]
        held["cache"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[0].layers)
        features = [cache.features.buffer for cache in caches if cache.features.buffer is not None]
        held["states"] = sum(buffer.shape[1] * buffer.shape[3] for buffer in features)

    specdec.enable(target, drafter, num_draft_tokens=2, compile=False)
    state_of(target).observer = observe
    target.generate(**prompts(3), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert held["states"] == size.feature_width
    assert held["cache"] == held["slots"] * (size.token_bytes - 4 * size.feature_width)
