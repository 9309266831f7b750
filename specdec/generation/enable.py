"""The drop-in: `enable(model, drafter)`, then `model.generate(...)` as before.

`enable` gives the model a subclass of its own class (same name, same module) whose decoding methods run `speculate`. generate()
itself stays transformers': it prepares prompts, processors and stopping criteria, and picks the loop. A call that routing.py
does not let through goes to the stock loop with one warning that names the reason.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from specdec.core.interfaces import Drafter
from specdec.core.stats import Stats
from specdec.drafters.model import ModelDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.resolve import (
    AUTO,
    check_device,
    check_num_draft_tokens,
    check_pair,
    in_eval_mode,
    resolve_drafter,
    unwrapped,
)
from specdec.generation.call import decode, max_draft_tokens
from specdec.generation.routing import BEFORE_INPUTS, WITH_INPUTS, Request, user_hook, why_stock
from specdec.generation.state import CALLS, Call, State, Trials, members_of, runner_of, take_drafter
from specdec.runtime.cuda_graphs import RECORDINGS, Graphs
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.prepare import Compile, prepare
from specdec.runtime.runner import ModelRunner, masks_by_slot, widths
from specdec.runtime.support import Support, support_of

_STATE = "_specdec_state"  # in an enabled model's __dict__; pickles and copies leave it out
_STOCK = "_specdec_stock"  # in a drop-in class


def enable(
    model: PreTrainedModel,
    drafter: PreTrainedModel | Drafter | str | Path | None = None,
    *,
    num_draft_tokens: int | str = AUTO,
    compile: Compile = "auto",
    timing: bool = False,
) -> PreTrainedModel:
    """Make model.generate() speculative, in place: same arguments, same results, sooner.

    drafter: a model, a hub id or a folder of one, "prompt_lookup", "none" (plain decoding in our loop), a Drafter of your own, or
    None: calls run the stock loop unless they bring an `assistant_model` or `prompt_lookup_num_tokens`.
    num_draft_tokens: K, how many ids a step proposes; a call's `num_assistant_tokens` goes first. "auto": whatever gives the most
    tokens a second, chosen for each step from times and acceptance as measured; 0, plain decoding, where drafting does not pay.
    A profile, of some seconds at most, comes before the first call of each batch size. Sampled text keeps its distribution, but
    K follows measured times, so the same seed may give another text; with a number it gives the same.
    compile: on a CPU, run decoding forwards compiled. True: compile what is not on disk yet, once per machine and architecture,
    in a minute or so, with a progress bar; "auto": use what is on disk; False: don't. Where it fails, a warning says why and the
    model runs without. A 4-bit target's logits are the same, bit for bit; a dense one's differ by rounding. On a CUDA device,
    True and "auto" record steps as CUDA graphs, which are kept from call to call, caches included, until disable(); False: don't.
    timing: measure where each call's time goes, as `Stats.timing`.
    A PeftModel is enabled through the model that it adapts.
    Enabling again replaces. Raises ValueError or TypeError, leaving the model as it was, where the pair cannot work.
    """
    enabled = unwrapped(model)
    if not isinstance(enabled, PreTrainedModel) or not isinstance(enabled, GenerationMixin):
        raise TypeError(f"enable() takes a transformers model that can generate, got {type(model).__name__}")
    stock = _stock_class(enabled)
    if (
        stock._sample is not GenerationMixin._sample
        or stock._assisted_decoding is not GenerationMixin._assisted_decoding
    ):
        raise ValueError(
            f"{stock.__name__} has a decoding loop of its own; speculative decoding would change its output"
        )
    check_num_draft_tokens(num_draft_tokens, enabled)
    if compile not in ("auto", True, False):
        raise ValueError(f"compile={compile!r} must be True, False or 'auto'")
    with in_eval_mode(enabled):
        support = support_of(enabled)
        if support.reason is not None:
            raise ValueError(f"{stock.__name__} cannot decode speculatively: {support.reason}")
        resolved = None if drafter is None else resolve_drafter(drafter, enabled)
        state = State(enabled, resolved, num_draft_tokens, compile, timing)
        prepare(state.members(state.drafter), compile, _graphs_for(enabled, compile))
        if user_hook(enabled) is None:
            state.target_trials.remember(state.target, support, _identity_of(state.target))
    if (runner := runner_of(resolved)) is not None:
        state.draft_trials.setdefault(runner.model, Trials()).remember(runner, Support(), _identity_of(runner))
    enabled.__dict__[_STATE] = state
    enabled.__class__ = _drop_in_class(stock)
    if support.warning is not None:
        warnings.warn(support.warning, stacklevel=2)
    return model


def _identity_of(runner: ModelRunner) -> Identity | None:
    """Of the model as it was just prepared, where there is one: a call then compares it once for trial and compiled forward."""
    return None if runner.compiled is None else runner.compiled.identity


def _graphs_for(model: PreTrainedModel, compile: Compile) -> Graphs | None:
    is_wanted = compile is True or (compile == "auto" and not masks_by_slot(model))  # which can't be recorded
    return Graphs(model.device) if is_wanted and model.device.type in RECORDINGS else None


def decoding_of(model: PreTrainedModel) -> str:
    """How the steps of an enabled model run: "compiled", on a CPU; "recorded", as CUDA graphs; else "eager"."""
    state: State = unwrapped(model).__dict__[_STATE]
    runners = [member.runner for member in state.members(state.drafter)]
    if all(runner.compiled is not None for runner in runners):
        return "compiled"
    is_recorded = all(runner.graphs is not None and runner.graphs.failure is None for runner in runners)
    return "recorded" if is_recorded else "eager"


def disable(model: PreTrainedModel) -> None:
    """Restore the model's own class and generate(); nothing happens to a model that is not enabled."""
    enabled = unwrapped(model)
    enabled.__class__ = _stock_class(enabled)
    enabled.__dict__.pop(_STATE, None)


def last_stats(model: PreTrainedModel) -> Stats | None:
    """Stats of the model's last generate() call; None where it was never enabled or the stock loop served the call."""
    state: State | None = unwrapped(model).__dict__.get(_STATE)
    return state.last_stats if state else None


def _stock_class(model: PreTrainedModel) -> Any:
    return type(model).__dict__.get(_STOCK, type(model))


@functools.cache
def _drop_in_class(stock: Any) -> Any:
    """The subclass whose decoding methods are ours."""

    positional = list(inspect.signature(stock.generate).parameters)[1:]

    @functools.wraps(stock.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: State = self.__dict__[_STATE]
        call = Call(dict(zip(positional, args, strict=False)) | kwargs)
        if not state.calls:
            state.last_stats = None
        state.calls.append(call)  # a criterion or a processor may itself call generate()
        try:
            _check_prompt(call.prompt)
            with CALLS.entered():
                return stock.generate(self, *args, **kwargs)
        finally:
            state.calls.pop()

    def _validate_generation_mode(self: Any, generation_mode: Any, generation_config: Any, mode_kwargs: Any) -> None:
        call = _call_of(self, None)
        if call is not None:
            call.config, call.mode_kwargs = generation_config, mode_kwargs
        if call is None or generation_mode != GenerationMode.ASSISTED_GENERATION:
            stock._validate_generation_mode(self, generation_mode, generation_config, mode_kwargs)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Decide what can be decided before ids and mask are there; what the stock loop needs, it gets when it is chosen."""
        state: State = self.__dict__[_STATE]
        call = _call_of(self, generation_config)

        def prepare_stock(model_kwargs: Any) -> None:
            if call is not None and generation_mode == GenerationMode.ASSISTED_GENERATION:
                stock._validate_generation_mode(self, generation_mode, generation_config, call.mode_kwargs)
            stock._prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)

        is_asked = state.drafter is not None or generation_mode == GenerationMode.ASSISTED_GENERATION
        if not is_asked or generation_config.is_assistant:
            prepare_stock(model_kwargs)
        elif call is None:
            _warn("it went past the model's own generate()", stacklevel=4)
            prepare_stock(model_kwargs)
        else:
            asked = _num_draft_tokens(self, call, generation_config)
            request = Request(
                model=self,
                runner=state.target,
                config=generation_config,
                mode=generation_mode,
                arguments=call.arguments,
                mode_kwargs=call.mode_kwargs,
                model_kwargs=model_kwargs,
                num_draft_tokens=asked,
                max_draft_tokens=max_draft_tokens(asked, state.target),
            )
            if reason := why_stock(BEFORE_INPUTS, request):
                _warn(reason, stacklevel=5)
                prepare_stock(model_kwargs)
            else:
                call.request, call.prepare_stock = request, prepare_stock

    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return _decode(self, input_ids, functools.partial(stock._sample, self), kwargs)

    def _assisted_decoding(self: Any, input_ids: Tensor, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        return _decode(
            self, input_ids, functools.partial(stock._assisted_decoding, self, inputs_tensor=inputs_tensor), kwargs
        )

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.__class__ = stock  # only enable() makes an instance of this class

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        attributes = {name: value for name, value in self.__dict__.items() if name != _STATE}
        return copyreg._reconstructor, (stock, object, None), attributes  # type: ignore[attr-defined]

    methods = (
        generate, _validate_generation_mode, _prepare_cache_for_generation, _sample, _assisted_decoding, __init__, __reduce_ex__,
    )  # fmt: skip
    namespace: dict[str, Any] = {method.__name__: method for method in methods}
    namespace |= {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        _STOCK: stock,
    }
    return type(stock.__name__, (stock,), namespace)


def _warn(reason: str, stacklevel: int) -> None:
    warnings.warn(f"specdec leaves this call to the stock loop: {reason}", stacklevel=stacklevel + 1)


def _call_of(model: Any, config: GenerationConfig | None) -> Call | None:
    """This thread's innermost call, where generate() has made this config for it.

    None where the class' own generate() was called instead of the model's, also from within one of the model's: a
    callback or a streamer may do so.
    """
    calls = model.__dict__[_STATE].calls
    return calls[-1] if calls and calls[-1].config is config else None


def _decode(model: Any, input_ids: Tensor, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Serve one call by our loop, or by the stock one where a reason is found now that ids and mask are there."""
    state: State = model.__dict__[_STATE]
    call = _call_of(model, kwargs.get("generation_config"))
    if call is None or (request := call.request) is None:
        return stock(input_ids, **kwargs)
    request.input_ids = input_ids
    target, drafter, is_whole = state.take_target(), None, False
    try:
        reason = state.why_stock(target, request.max_length) or why_stock(WITH_INPUTS, request)
        if reason is None:
            drafter, reason = _take_drafter(state, target, request, kwargs.get("assistant_model"))
        if drafter is not None:
            output = decode(
                state,
                target,
                drafter,
                request.num_draft_tokens,
                input_ids,
                logits_processor=kwargs["logits_processor"],
                stopping_criteria=kwargs["stopping_criteria"],
                generation_config=kwargs["generation_config"],
                attention_mask=request.mask,
                streamer=kwargs.get("streamer"),
            )
        is_whole = True
    finally:
        state.give_back(target, drafter, keep=is_whole)
    if drafter is not None:
        return output
    assert reason is not None
    _warn(reason, stacklevel=6)
    call.prepare_stock(request.model_kwargs)
    return stock(input_ids, **kwargs | request.model_kwargs)


def _take_drafter(
    state: State, target: ModelRunner, request: Request, assistant_model: Any
) -> tuple[Drafter, None] | tuple[None, str]:
    """The drafter of a call, what it brings itself before what enable() was given; or why the stock loop has to serve it."""
    model, config = request.model, request.config
    drafter: Drafter | None = state.drafter
    if assistant_model is not None:
        drafter = _assistant_drafter(state, target, unwrapped(assistant_model))
    elif config.prompt_lookup_num_tokens is not None:
        drafter = PromptLookup(config.max_matching_ngram_size) if config.max_matching_ngram_size else PromptLookup()
    assert drafter is not None
    if isinstance(drafter, ModelDrafter):
        check_device(model, drafter.runner.model)
        if reason := state.why_not_drafted(drafter.runner):
            return None, f"its draft model, a {type(drafter.runner.model).__name__}, cannot draft: {reason}"
    taken = take_drafter(drafter, target)
    if taken is None:
        return None, f"its drafter, a {type(drafter).__name__}, serves another call at the moment"
    if isinstance(taken, ModelDrafter):
        taken.fit(*widths(model))
    return taken, None


def _assistant_drafter(state: State, target: ModelRunner, assistant: PreTrainedModel) -> ModelDrafter:
    """A drafter of a call's own assistant_model; of an equal call before, where recordings of it are kept."""
    if assistant not in state.paired:
        check_pair(target.model, assistant)
        state.paired.add(assistant)
    is_own = target is state.target
    if is_own and state.assistant is not None:
        if state.assistant.runner.model is assistant:
            return state.assistant
        state.assistant.runner.begin(0)  # and its recordings go
    drafter = ModelDrafter(assistant, target.vocab_size)
    prepare(members_of(target, drafter)[1:], state.compile, target.graphs)
    if is_own:
        state.assistant = None if target.graphs is None else drafter
    return drafter


def _num_draft_tokens(model: Any, call: Call, config: GenerationConfig) -> int | str:
    """K of this call, or "auto": its own, else enable's."""
    own = config.prompt_lookup_num_tokens
    if own is None:
        own = call.arguments.get("num_assistant_tokens")
    if own is None and (passed := call.arguments.get("generation_config")) is not None:
        own = passed.num_assistant_tokens
    state: State = model.__dict__[_STATE]
    own = state.num_draft_tokens if own is None else own
    check_num_draft_tokens(own, model)
    return own


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, Tensor) and prompt.ndim == 2 and prompt.numel() == 0:
        what = "batch is empty" if prompt.shape[0] == 0 else "prompt is empty"
        raise ValueError(f"the {what} (input_ids of shape {list(prompt.shape)}); pass at least one token for each row")
