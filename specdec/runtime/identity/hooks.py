"""Hooks and replaced forwards, which a compiled or recorded copy of a forward would not call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
GLOBAL_HOOKS: dict[str, Any] = {
    "forward hook": torch.nn.modules.module._global_forward_hooks,
    "forward pre-hook": torch.nn.modules.module._global_forward_pre_hooks,
}
# transformers leaves these on a model after a call with output_hidden_states; without that argument they do nothing
INERT_HOOKS = "transformers.utils.output_capturing"


def active_hooks(hooks: dict[int, Any]) -> dict[int, Any]:
    return dict(enumerate(hook for hook in hooks.values() if getattr(hook, "__module__", None) != INERT_HOOKS))


def find_hook(model: nn.Module) -> str | None:
    """Which hook a copy of the model's forward would not call, None where there is none; global hooks included."""
    for name, hooks in GLOBAL_HOOKS.items():
        if hooks:
            return f"a {name} is on all modules"
    for path, module in model.named_modules():
        for attribute, name in HOOKS.items():
            if (hooks := vars(module)[attribute]) and active_hooks(hooks):
                return f"a {name} is on {path or 'the model'}"
        if "_hf_hook" in vars(module):
            return f"an accelerate hook is on {path or 'the model'}"
    return None


def why_not_traceable(model: nn.Module) -> str | None:
    """Why a trace of the forward would miss part of it: a hook, or a forward that one instance overrides; else None."""
    if (reason := find_hook(model)) is not None:
        return reason
    replaced = (path for path, module in model.named_modules() if {"forward", "_call_impl"} & vars(module).keys())
    return next((f"the forward of {path or 'the model'} was replaced" for path in replaced), None)
