"""Which calls of an enabled model specdec serves: one table of checks, each with the reason for the stock loop.

A call that cannot be shown to give plain decoding's result goes to the stock loop, transformers' own. The checks run in
the order of the table: some on generate()'s arguments, the others when ids, mask and drafter are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from transformers.generation.configuration_utils import GenerationMode

from specdec.generation.model_inputs import find_other_inputs, is_empty
from specdec.generation.request import Request
from specdec.runtime.support import dynamic_rope_limit

SERVED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
SERVED_INPUTS = {"attention_mask", "position_ids", "logits_to_keep", "use_cache"}


class Stage(Enum):
    """When a check runs, by what the request holds."""

    ARGUMENTS = auto()  # generate()'s arguments and config
    INPUTS = auto()  # ids and mask as well, and the trial of the target
    DRAFTER = auto()  # all of that and the drafter


@dataclass(frozen=True)
class Route:
    """A kind of call that the stock loop serves.

    calls: which calls these are, a row of the README's table.
    check: request -> the reason for the stock loop; None where the request is not of this kind.
    """

    stage: Stage
    calls: str
    check: Callable[[Request], str | None]


def _other_mode(request: Request) -> str | None:
    if request.mode not in SERVED_MODES:
        return f"{request.mode.value.replace('_', ' ')} is not sampling or greedy search"
    if request.arguments.get("custom_generate") is not None:
        return "custom_generate replaces the decoding loop"
    return None


def _other_drafting(request: Request) -> str | None:
    config = request.config
    for name in ("assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            return f"{name} drafts with the target itself"
    if getattr(config, "speculation_type", None) == "dflash":
        return "speculation_type='dflash' reads the target's hidden states"
    if getattr(config, "assistant_ensemble_weight", None):
        return "assistant_ensemble_weight mixes the draft model's distribution into the target's"
    return None


def _synced_gpus(request: Request) -> str | None:
    return (
        "synced_gpus: processes must run the same number of forwards"
        if request.mode_kwargs.get("synced_gpus")
        else None
    )


def _other_cache(request: Request) -> str | None:
    config = request.config
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} was requested"
    return "use_cache=False was requested" if config.use_cache is False else None


def _other_outputs(request: Request) -> str | None:
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(request.config, name, None):
            return f"{name}=True was requested"
    return None


def _other_inputs(request: Request) -> str | None:
    if request.arguments.get("position_ids") is not None:
        return "position_ids were passed"
    for name, value in request.model_kwargs.items():
        if name not in SERVED_INPUTS and not is_empty(request.model, name, value):
            return "images, video or audio were passed" if name == "mm_encoder_outputs" else f"{name} was passed"
    return None


def _offloaded(request: Request) -> str | None:
    return "its weights are offloaded, so the model is on no device" if request.model.device.type == "meta" else None


def _growing_rope(request: Request) -> str | None:
    limit = dynamic_rope_limit(request.model)
    if limit is not None and request.max_length > limit:
        return f"beyond {limit} positions its rotary frequencies change with the longest row of a batch"
    return None


def _hooked(request: Request) -> str | None:
    assert request.target_trial is not None
    return request.target_trial.hook


def _failed_trial(request: Request) -> str | None:
    assert request.target_trial is not None
    return request.target_trial.support.reason


def _longer_than_trial(request: Request) -> str | None:
    assert request.target_trial is not None
    limit = request.target_trial.support.max_length
    if limit is not None and request.max_length > limit:
        return f"its text may have {request.max_length} positions, drafts included; the model's trial had {limit}"
    return None


def _other_padding(request: Request) -> str | None:
    if request.mask is None:
        return None
    assert request.input_ids is not None
    if request.mask.shape != request.input_ids.shape:
        return f"its attention_mask is {list(request.mask.shape)} and its prompts are {list(request.input_ids.shape)}"
    mask = request.mask.bool()
    if not mask.any(1).all():
        return f"row {int((~mask.any(1)).nonzero()[0])} of its attention_mask is all zeros, an empty prompt"
    if not mask[:, -1].all():
        return "its attention_mask hides the end of a prompt; for speculation set tokenizer.padding_side = 'left'"
    return None if (mask[:, 1:] >= mask[:, :-1]).all() else "its attention_mask hides more than left padding"


def _too_long(request: Request) -> str | None:
    assert request.input_ids is not None
    context = request.runner.context
    length = int(request.input_ids.shape[1] if request.mask is None else request.mask.long().sum(1).max())
    if context is not None and length > context:
        return f"its prompt has {length} tokens, more than the model's context of {context}"
    return None


def _failed_draft_trial(request: Request) -> str | None:
    if request.draft_trial is None or (reason := request.draft_trial.support.reason) is None:
        return None
    drafter: Any = request.drafter
    return f"its draft model, a {type(drafter.runner.model).__name__}, cannot draft: {reason}"


def _drafter_in_use(request: Request) -> str | None:
    if request.acquired_drafter is not None:
        return None
    return f"its drafter, a {type(request.drafter).__name__}, serves another call, and cannot serve two at a time"


# In the order in which they run.
ROUTES = (
    Route(
        Stage.ARGUMENTS,
        "decoding modes other than greedy search and sampling (beam search, …), `custom_generate`",
        _other_mode,
    ),
    Route(
        Stage.ARGUMENTS,
        "other ways of drafting: `assistant_early_exit`, `use_mtp`, `speculation_type`, `assistant_ensemble_weight`",
        _other_drafting,
    ),
    Route(Stage.ARGUMENTS, "`synced_gpus`", _synced_gpus),
    Route(Stage.ARGUMENTS, '`use_cache=False`, a `cache_implementation` other than `"dynamic"`', _other_cache),
    Route(Stage.ARGUMENTS, "`output_attentions`, `output_hidden_states`", _other_outputs),
    Route(
        Stage.ARGUMENTS,
        "model inputs other than ids and mask: images, video, audio, `inputs_embeds`, `position_ids`,"
        " `past_key_values`",
        _other_inputs,
    ),
    Route(Stage.ARGUMENTS, "models whose weights are offloaded", _offloaded),
    Route(
        Stage.ARGUMENTS,
        "rotary embeddings that change with length (dynamic, longrope) beyond their original context",
        _growing_rope,
    ),
    Route(Stage.INPUTS, "models with forward hooks of your own", _hooked),
    Route(Stage.INPUTS, "models that were changed after `enable` and no longer pass its trial", _failed_trial),
    Route(
        Stage.INPUTS,
        "texts longer than the trial of a model class that is not known to work (`enable` warns)",
        _longer_than_trial,
    ),
    Route(Stage.INPUTS, "prompts with right padding, with masked positions inside, or without a token", _other_padding),
    Route(Stage.INPUTS, "prompts longer than the model's context", _too_long),
    Route(
        Stage.INPUTS,
        "a `prepare_inputs_for_generation` that feeds anything but ids, positions and mask (soft prompts)",
        find_other_inputs,
    ),
    Route(Stage.DRAFTER, "draft models that were changed after `enable` and can no longer draft", _failed_draft_trial),
    Route(Stage.DRAFTER, "a `Drafter` of your own that serves another call at the same time", _drafter_in_use),
)


def all_calls() -> list[str]:
    """The kinds of calls that the stock loop serves, in the order of the README's table."""
    return [route.calls for route in ROUTES]


def why_stock(request: Request, stage: Stage) -> str | None:
    """The reason for the stock loop that the checks of this stage give; None where none does."""
    checks = (route.check for route in ROUTES if route.stage is stage)
    return next((reason for check in checks if (reason := check(request)) is not None), None)
