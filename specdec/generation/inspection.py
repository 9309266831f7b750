"""An enabled model from inside: transformers' own loop on it, the steps of its calls, a runner of its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from specdec.core.steps import StepResult
from specdec.drafters.resolve import unwrap_peft
from specdec.generation.enable import state_of, stock_class
from specdec.runtime.runner import ModelRunner


@contextmanager
def stock_loop(model: PreTrainedModel) -> Iterator[None]:
    """Within, generate() of an enabled model is transformers' own; what enable() prepared is kept."""
    enabled = unwrap_peft(model)
    drop_in = enabled.__class__
    enabled.__class__ = stock_class(enabled)
    try:
        yield
    finally:
        enabled.__class__ = drop_in


@contextmanager
def observed_steps(model: PreTrainedModel, observer: Callable[[StepResult], None]) -> Iterator[None]:
    """Within, `observer` is called with the result of each step of the model's calls, before the next step begins."""
    state = state_of(model)
    state.observer = observer
    try:
        yield
    finally:
        state.observer = None


@contextmanager
def prefill_in_chunks(model: PreTrainedModel, positions: int | None) -> Iterator[None]:
    """Within, the model's calls read prompts so many positions at a time, as they read long ones; None: as always."""
    target = state_of(model).target
    target.prefill_chunk = positions
    try:
        yield
    finally:
        target.prefill_chunk = None


def spare_runner(model: PreTrainedModel) -> ModelRunner:
    """A runner of an enabled model's target, on its compiled forward where it has one, with a KV cache of its own."""
    return state_of(model).target.spare()
