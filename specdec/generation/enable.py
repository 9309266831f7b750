"""The drop-in: `enable(model, drafter)`, then `model.generate(...)` as before.

`enable` gives the model a subclass of its own class (same name, same module) whose decoding methods run `speculate`.
generate() itself stays transformers': it prepares prompts, processors and stopping criteria, and picks the decoding
loop. A call for which routing.py gives a reason goes to the stock loop, with one warning that names the reason.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from specdec.core.interfaces import Drafter
from specdec.core.sampling import VERIFICATIONS, Verification
from specdec.core.stats import Stats
from specdec.drafters.model import ModelDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.resolve import (
    AUTO,
    Tokenizers,
    check_device,
    check_num_draft_tokens,
    check_pair,
    description,
    draft_model_of,
    in_eval_mode,
    make_model_drafter,
    resolve_drafter,
    unwrap_peft,
)
from specdec.generation.call import decode, max_draft_tokens
from specdec.generation.callbacks import Callbacks
from specdec.generation.request import Request
from specdec.generation.routing import Stage, why_stock
from specdec.generation.state import (
    CALL_TRACKER,
    Call,
    CheckedDraft,
    State,
    acquire_drafter,
    members_of,
    model_drafter_of,
    runner_of,
)
from specdec.generation.trials import Trial, TrialCache, user_hook
from specdec.runtime.cuda_graphs import RECORDINGS, Graphs
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.prepare import Compile, prepare
from specdec.runtime.runner import ModelRunner, masks_by_slot
from specdec.runtime.support import support_of
from specdec.utils.warn import note, warn

_STATE = "_specdec_state"  # in an enabled model's __dict__; pickles and copies leave it out
_STOCK = "_specdec_stock"  # in a drop-in class: the class it derives from


def enable(
    model: PreTrainedModel,
    drafter: PreTrainedModel | Drafter | str | Path | None = None,
    *,
    num_draft_tokens: int | str = AUTO,
    compile: Compile = "auto",
    verification: Verification = "block",
    timing: bool = False,
) -> PreTrainedModel:
    """Make model.generate() speculative, in place: same arguments, same results, less time.

    Greedy text is that of plain decoding; sampled text has the same distribution. A call for which specdec cannot
    ensure this runs in transformers' own loop, with a warning that names the reason. Enabling a model again replaces
    the earlier settings.

    Args:
        model: The target, a transformers causal language model. A PeftModel is enabled through the model it adapts.
        drafter: What proposes draft tokens: a draft model, its hub id or folder, the folder or hub id of an EAGLE-3,
            P-EAGLE, DFlash or DSpark head, "mtp" (the MTP layer in the target's own checkpoint), "prompt_lookup",
            "suffix", suffix decoding with a draft model or head ("suffix+FOLDER_OR_HUB_ID"), "none" (plain decoding in
            specdec's loop), or a `Drafter` of your own. Of a folder or hub id, one line on stderr says what is there.
            With None, calls run in transformers' loop unless they bring an `assistant_model` or
            `prompt_lookup_num_tokens`.
            A draft model of another tokenizer drafts the tokens that both have; a warning says how many these are.
        num_draft_tokens: K, the number of draft tokens in each step, at least 1. A call's own `num_assistant_tokens`
            takes precedence. With "auto", each step uses the K that is expected to give the most tokens per second,
            from measured step times and acceptance; K is 0, plain decoding, where drafting does not pay. The first call
            of each batch size is preceded by a profile, which takes a few seconds at most. Since K then depends on
            measured times, the same seed may give another sampled text; with a number it gives the same text, except by
            "suffix", which proposes more in later calls.
        compile: Whether decoding forwards run compiled. On a CPU, True compiles what is not on disk yet, once for each
            machine and architecture, in about a minute, with a progress bar; "auto" uses what is on disk; False runs
            eagerly. The logits of a 4-bit target stay the same, bit for bit; those of other targets differ by rounding.
            On a CUDA device, True and "auto" record decoding steps as CUDA graphs. The graphs and their KV caches are
            kept from call to call, until `disable`. If compiling or recording fails, a warning says why, and the model
            runs eagerly.
        verification: How sampled calls verify the draft tokens of a draft model: "block", those of a step together (Sun
            et al., 2024), which accepts as many or more on average; "token", one after the other. The distribution is
            the same; a seed gives another text.
        timing: Whether to measure where each call's time goes, in seconds, as `Stats.timing`.

    Returns:
        The model that was passed.

    Raises:
        TypeError: `model` cannot generate, or `drafter` is none of the above.
        ValueError: The model cannot decode speculatively, the drafter does not fit it, or an argument is out of range.
            The model is then left unchanged.
    """
    enabled = unwrap_peft(model)
    if not isinstance(enabled, PreTrainedModel) or not isinstance(enabled, GenerationMixin):
        raise TypeError(f"enable() takes a transformers model that can generate, got {type(model).__name__}")
    stock = stock_class(enabled)
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
    if verification not in VERIFICATIONS:
        raise ValueError(f"verification={verification!r} must be 'block' or 'token'")
    with in_eval_mode(enabled):
        support = support_of(enabled)
        if support.reason is not None:
            raise ValueError(f"{stock.__name__} cannot decode speculatively: {support.reason}")
        resolved = None if drafter is None else resolve_drafter(drafter, enabled)
        state = State(enabled, resolved, num_draft_tokens, compile, verification, timing)
        prepare(state.members(state.drafter), compile, _graphs_for(enabled, compile))
        if user_hook(enabled) is None:
            state.target_trials.store(state.target, Trial(support), _compiled_identity(state.target))
    if (runner := runner_of(resolved)) is not None:
        state.draft_trials.setdefault(runner.model, TrialCache()).store(runner, Trial(), _compiled_identity(runner))
    enabled.__dict__[_STATE] = state
    enabled.__class__ = _drop_in_class(stock)
    if isinstance(drafter, str | Path) and (path := draft_model_of(str(drafter))) is not None:
        note(f"{path}: {description(resolved)}")
    if support.warning is not None:
        warn(support.warning)
    return model


def disable(model: PreTrainedModel) -> None:
    """Restore the model's own class and generate(). A model that is not enabled stays as it is."""
    enabled = unwrap_peft(model)
    enabled.__class__ = stock_class(enabled)
    enabled.__dict__.pop(_STATE, None)


def last_stats(model: PreTrainedModel) -> Stats | None:
    """Statistics of the last generate() call; None where the model is not enabled or the stock loop served the call."""
    state: State | None = unwrap_peft(model).__dict__.get(_STATE)
    return state.last_stats if state else None


def state_of(model: PreTrainedModel) -> State:
    """The state of an enabled model."""
    state: State = unwrap_peft(model).__dict__[_STATE]
    return state


def decoding_of(model: PreTrainedModel) -> str:
    """How the steps of an enabled model run: "compiled" on a CPU, "recorded" as CUDA graphs, else "eager"."""
    state = state_of(model)
    runners = [member.runner for member in state.members(state.drafter)]
    if all(runner.compiled is not None for runner in runners):
        return "compiled"
    is_recorded = all(runner.graphs is not None and runner.graphs.failure is None for runner in runners)
    return "recorded" if is_recorded else "eager"


def _graphs_for(model: PreTrainedModel, compile: Compile) -> Graphs | None:
    is_wanted = compile is True or (compile == "auto" and not masks_by_slot(model))  # which can't be recorded
    return Graphs(model.device) if is_wanted and model.device.type in RECORDINGS else None


def _compiled_identity(runner: ModelRunner) -> Identity | None:
    """The identity that the compiled forward was made with, so that a call compares it once for forward and trial."""
    return None if runner.compiled is None else runner.compiled.identity


def stock_class(model: PreTrainedModel) -> Any:
    """The model's class; of an enabled model the class that its drop-in class derives from."""
    return type(model).__dict__.get(_STOCK, type(model))


@functools.cache
def _drop_in_class(stock: Any) -> Any:
    """The subclass of a model class whose decoding methods are specdec's."""
    parameters = list(inspect.signature(stock.generate).parameters)[1:]

    @functools.wraps(stock.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = Call(dict(zip(parameters, args, strict=False)) | kwargs)
        with _in_progress(self.__dict__[_STATE], call):
            return stock.generate(self, *args, **kwargs)

    def _validate_generation_mode(self: Any, generation_mode: Any, generation_config: Any, mode_kwargs: Any) -> None:
        call = _call_of(self, None)
        if call is not None:
            call.config, call.mode_kwargs = generation_config, mode_kwargs
        if call is None or generation_mode != GenerationMode.ASSISTED_GENERATION:
            stock._validate_generation_mode(self, generation_mode, generation_config, mode_kwargs)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the checks on arguments. The stock loop's own preparation waits until that loop is chosen."""
        call = _call_of(self, generation_config)

        def prepare_stock(model_kwargs: Any) -> None:
            if call is not None and generation_mode == GenerationMode.ASSISTED_GENERATION:
                stock._validate_generation_mode(self, generation_mode, generation_config, call.mode_kwargs)
            stock._prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)

        if _requests_speculation(self, generation_config, generation_mode):
            if call is None:
                _warn("it was not made through the model's own generate()")
            else:
                request = _make_request(self, call, generation_config, generation_mode, model_kwargs)
                reason = why_stock(request, Stage.ARGUMENTS)
                if reason is None:
                    call.request, call.prepare_stock = request, prepare_stock
                    return
                _warn(reason)
        prepare_stock(model_kwargs)

    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return _decode(self, input_ids, functools.partial(stock._sample, self), kwargs)

    def _assisted_decoding(self: Any, input_ids: Tensor, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        stock_loop = functools.partial(stock._assisted_decoding, self, inputs_tensor=inputs_tensor)
        return _decode(self, input_ids, stock_loop, kwargs)

    @functools.wraps(stock.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.__class__ = stock  # only enable() makes an instance of this class

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        attributes = {name: value for name, value in self.__dict__.items() if name != _STATE}
        return copyreg._reconstructor, (stock, object, None), attributes  # type: ignore[attr-defined]

    methods = (
        generate, _validate_generation_mode, _prepare_cache_for_generation, _sample, _assisted_decoding, __init__,
        __reduce_ex__,
    )  # fmt: skip
    namespace: dict[str, Any] = {method.__name__: method for method in methods}
    namespace |= {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        _STOCK: stock,
    }
    return type(stock.__name__, (stock,), namespace)


@contextmanager
def _in_progress(state: State, call: Call) -> Iterator[None]:
    """Within, the call is this thread's innermost one. Calls nest: a criterion or a processor may call generate()."""
    if not state.calls:
        state.last_stats = None
    state.calls.append(call)
    try:
        _check_prompt(call.prompt)
        with CALL_TRACKER.track():
            yield
    finally:
        state.calls.pop()
        del call.request, call.prepare_stock  # which refer to the call, so that no garbage collection has to free it


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, Tensor) and prompt.ndim == 2 and prompt.numel() == 0:
        what = "batch is empty" if prompt.shape[0] == 0 else "prompt is empty"
        raise ValueError(f"the {what} (input_ids of shape {list(prompt.shape)}); pass at least one token for each row")


def _call_of(model: Any, config: GenerationConfig | None) -> Call | None:
    """This thread's innermost call, where generate() has made this config for it.

    None where the class's own generate() was called instead of the model's, which a callback or a streamer may do
    within a call of the model's.
    """
    calls = model.__dict__[_STATE].calls
    return calls[-1] if calls and calls[-1].config is config else None


def _requests_speculation(model: Any, config: GenerationConfig, mode: GenerationMode) -> bool:
    """Whether enable() or the call brings a drafter; False for a draft model that transformers' own loop calls."""
    has_drafter = model.__dict__[_STATE].drafter is not None or mode == GenerationMode.ASSISTED_GENERATION
    return has_drafter and not config.is_assistant


def _make_request(
    model: Any, call: Call, config: GenerationConfig, mode: GenerationMode, model_kwargs: dict[str, Any]
) -> Request:
    state: State = model.__dict__[_STATE]
    num_draft_tokens = _num_draft_tokens(model, call, config)
    return Request(
        model=model,
        runner=state.target,
        config=config,
        mode=mode,
        arguments=call.arguments,
        mode_kwargs=call.mode_kwargs,
        model_kwargs=model_kwargs,
        num_draft_tokens=num_draft_tokens,
        max_draft_tokens=max_draft_tokens(num_draft_tokens, state.target),
    )


def _num_draft_tokens(model: Any, call: Call, config: GenerationConfig) -> int | str:
    """K of this call, or "auto": its own, else enable()'s."""
    k = config.prompt_lookup_num_tokens
    if k is None:
        k = call.arguments.get("num_assistant_tokens")
    if k is None and (passed := call.arguments.get("generation_config")) is not None:
        k = passed.num_assistant_tokens
    state: State = model.__dict__[_STATE]
    k = state.num_draft_tokens if k is None else k
    check_num_draft_tokens(k, model)
    return k


def _decode(model: Any, input_ids: Tensor, stock_loop: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Serve one call, by the stock loop where a check gives a reason. kwargs: those of the decoding loop."""
    state: State = model.__dict__[_STATE]
    call = _call_of(model, kwargs.get("generation_config"))
    if call is None or (request := call.request) is None:
        return stock_loop(input_ids, **kwargs)
    request.input_ids = input_ids
    reason, output = _try_to_decode(state, request, kwargs)
    if reason is None:
        return output
    _warn(reason)
    call.prepare_stock(request.model_kwargs)
    return stock_loop(input_ids, **kwargs | request.model_kwargs)


def _try_to_decode(state: State, request: Request, kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """-> the reason for the stock loop and nothing, or None and what generate() returns."""
    target, output, is_complete = state.acquire_target(), None, False
    try:
        request.target_trial = state.try_target(target)
        reason = why_stock(request, Stage.INPUTS)
        if reason is None:
            _acquire_drafter(state, target, request, kwargs.get("assistant_model"))
            reason = why_stock(request, Stage.DRAFTER)
        if (drafter := request.acquired_drafter) is not None:
            callbacks = Callbacks(kwargs["logits_processor"], kwargs["stopping_criteria"], kwargs.get("streamer"))
            output = decode(state, target, drafter, request, callbacks)
        is_complete = True
    finally:
        state.release(target, request.acquired_drafter, keep_recorded=is_complete)
    return reason, output


def _acquire_drafter(state: State, target: ModelRunner, request: Request, assistant_model: Any) -> None:
    """Set the request's drafter: the call's own where it brings one, else enable()'s."""
    config = request.config
    drafter: Drafter | None = state.drafter
    if assistant_model is not None:
        tokenizers = request.mode_kwargs.get("tokenizer"), request.mode_kwargs.get("assistant_tokenizer")
        drafter = _assistant_drafter(state, target, unwrap_peft(assistant_model), tokenizers)
    elif config.prompt_lookup_num_tokens is not None:
        drafter = PromptLookup(config.max_matching_ngram_size) if config.max_matching_ngram_size else PromptLookup()
    assert drafter is not None
    request.drafter = drafter
    if (model_drafter := model_drafter_of(drafter)) is not None:
        check_device(request.model, model_drafter.runner.model)
        request.draft_trial = state.try_draft_model(model_drafter.runner)
        if request.draft_trial.support.reason is not None:
            return
    request.acquired_drafter = acquire_drafter(drafter, target)
    if (match_target := getattr(request.acquired_drafter, "match_target", None)) is not None:
        match_target(target)


def _assistant_drafter(
    state: State, target: ModelRunner, assistant: PreTrainedModel, tokenizers: Tokenizers
) -> ModelDrafter:
    """The drafter of a call's own assistant_model: the last call's where its steps are recorded, else a new one.

    tokenizers: of target and assistant where the call brings them.
    """
    checked = state.checked_drafts.get(assistant)
    if checked is None or any(one is not other for one, other in zip(checked.tokenizers, tokenizers, strict=True)):
        checked = CheckedDraft(tokenizers, check_pair(target.model, assistant, tokenizers))
        state.checked_drafts[assistant] = checked
    is_own_runner = target is state.target
    if is_own_runner and state.assistant is not None:
        if state.assistant.runner.model is assistant and state.assistant.shared is checked.shared:
            return state.assistant
        state.assistant.runner.begin(0)  # drops its recorded steps
    drafter = make_model_drafter(assistant, target.vocab_size, checked.shared)
    prepare(members_of(target, drafter)[1:], state.compile, target.graphs)
    if is_own_runner:
        state.assistant = None if target.graphs is None else drafter
    return drafter


def _warn(reason: str) -> None:
    warn(f"specdec leaves this call to the stock loop: {reason}")
