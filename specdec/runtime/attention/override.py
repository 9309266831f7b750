"""Run a model's attention through `batch_invariant_attention` during a forward, by its config."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedConfig

from specdec.quant.batch_invariant import ATTENTION


@dataclass
class _Override:
    """The implementation that a config had, and how many forwards replace it at the moment."""

    original: str
    num_forwards: int = 0


_LOCK = threading.Lock()
_OVERRIDES: dict[int, _Override] = {}  # by id of the config; not in the config, which another thread may copy or save


@contextmanager
def attention_override(config: PreTrainedConfig) -> Iterator[None]:
    """Within the block, the layers of `config` run `batch_invariant_attention`.

    Blocks may overlap; the last one that ends restores the original implementation, so that layers of the others still
    get their intervals. A stock call in another thread may run either implementation, with the same result.
    """
    key = id(config)
    with _LOCK:
        _OVERRIDES.setdefault(key, _Override(config._attn_implementation)).num_forwards += 1
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        with _LOCK:
            override = _OVERRIDES[key]
            override.num_forwards -= 1
            if not override.num_forwards:
                config._attn_implementation = override.original
                del _OVERRIDES[key]


def implementation_of(config: PreTrainedConfig) -> str:
    """The attention implementation that the model was given, even while an override is active."""
    with _LOCK:
        override = _OVERRIDES.get(id(config))
        name: str = config._attn_implementation if override is None else override.original
    return name
