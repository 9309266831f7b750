"""Trials of a model in its current state, and their results by the state that the model was in.

A model may change between calls: adapters, dtype, attention implementation, hooks, training mode. A call uses the
result of an earlier trial where the model is as it was then, and tries the model again where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedModel

from specdec.drafters.heads import DraftHead
from specdec.runtime.attention.override import implementation_of
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.runner import ModelRunner
from specdec.runtime.support import Support, autocast_of, draws_random_numbers, ruled_out, support_of, unsupported

MAX_CACHED_TRIALS = 4  # states of one model


@dataclass(frozen=True)
class Trial:
    """What was found of a model in one state.

    support: the result of the trial. hook: why the model was not tried, a forward hook of the user's own; else None.
    """

    support: Support = Support()  # noqa: RUF009
    hook: str | None = None


class TrialCache:
    """Results of one model's trials, by the state that the model was in."""

    def __init__(self) -> None:
        self._entries: list[tuple[Identity, Any, Trial]] = []  # the last trial first

    def trial_of(self, runner: ModelRunner, run_trial: Callable[[PreTrainedModel], Trial]) -> Trial:
        """The trial of the runner's model in its current state; run_trial runs where there was none in this state."""
        mode = _mode_of(runner.model)
        for identity, trial_mode, trial in self._entries:
            if trial_mode == mode and identity.change() is None:
                runner.unchanged = identity
                return trial
        trial = run_trial(runner.model)
        self.store(runner, trial)
        return trial

    def store(self, runner: ModelRunner, trial: Trial, identity: Identity | None = None) -> None:
        """Store a trial of the runner's model in its current state. identity: of that state; made here if None."""
        model = runner.model
        runner.unchanged = identity or Identity(model)
        # entries of weights that are no longer part of the model would keep them in memory
        earlier = [entry for entry in self._entries[: MAX_CACHED_TRIALS - 1] if entry[0].is_part_of(model)]
        self._entries = [(runner.unchanged, _mode_of(model), trial), *earlier]


def _mode_of(model: PreTrainedModel) -> Any:
    """What decides how a model computes but is not part of its identity, or changes while a forward runs."""
    return implementation_of(model.config.get_text_config(decoder=True)), autocast_of(model.device)


def try_target(model: PreTrainedModel) -> Trial:
    """Try a target. Raises ValueError where dropout is active."""
    if reason := user_hook(model):
        return Trial(hook=reason)
    _check_dropout(model, "the model is in training mode, so dropout would change its output; call model.eval() first")
    return Trial(support_of(model))


def try_draft_model(model: PreTrainedModel) -> Trial:
    """Try a draft model. Raises ValueError where dropout is active."""
    _check_dropout(
        model, "the draft model is in training mode, so dropout would change its drafts; call .eval() on it first"
    )
    return Trial(Support(None if isinstance(model, DraftHead) else unsupported(model)))


def user_hook(model: nn.Module) -> str | None:
    """Why a model is not tried: a forward hook that is not torch's, transformers' or accelerate's; None without one."""
    for name, module in (("every module", None), *model.named_modules()):
        hooks = (
            (*_global_forward_hooks.values(), *_global_forward_pre_hooks.values())
            if module is None
            else (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        if not all(map(_is_of_a_library, hooks)):
            where = name or "the model"
            return f"a hook on {where} would see several positions a forward, where plain decoding shows it one"
    return None


def _is_of_a_library(hook: Any) -> bool:
    module_name: str = getattr(hook, "__module__", None) or type(hook).__module__
    return module_name.partition(".")[0] in ("torch", "transformers", "accelerate")


def _check_dropout(model: PreTrainedModel, message: str) -> None:
    """Raise ValueError with this message where dropout is active."""
    is_training = any(module.training for module in model.modules())
    if is_training and ruled_out(model) is None and draws_random_numbers(model):
        raise ValueError(message)
