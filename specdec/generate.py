"""The drop-in: `enable(model, drafter)`, then `model.generate(...)` as before.

`enable` gives the model a subclass of its own class (same name, same module) whose decoding methods run `speculate`. generate()
itself stays transformers': it prepares prompts, processors and stopping criteria, and picks the loop. A call that is not ours
goes to the stock loop with one warning that names the reason.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from specdec.clock import Clock, no_lap
from specdec.compiled import Compile, Part, prepare
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.graphs import RECORDINGS, Graphs, directly, why_not_recorded
from specdec.interfaces import Drafter, Outcome
from specdec.models import ATTENTIONS, CachedModel, context_of, dynamic_rope_limit, unsupported
from specdec.pace import LARGEST, Auto, Constant, Experience, Pace
from specdec.profiling import drafted_ids, profile
from specdec.quant.checkpoints import load_as_it_is
from specdec.quant.quantizer import is_4bit
from specdec.quant.rows import MAX_WINDOW
from specdec.sampling import Processor, Sampling
from specdec.sequences import Sequences
from specdec.speculative import speculate
from specdec.stats import Stats, StatsCounter

AUTO = "auto"
NAMED_DRAFTERS: dict[str, Callable[[], Drafter]] = {"none": NoDrafter, "prompt_lookup": PromptLookup}

# The scores alone decide, row by row: these run on all positions of a window at once.
POINTWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# These keep a state of their own from call to call.
STATEFUL_PROCESSORS = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "classifier-free guidance (guidance_scale)",
    WatermarkLogitsProcessor: "watermarking",
    SynthIDTextWatermarkLogitsProcessor: "SynthID watermarking",
}
OUR_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
OUR_MODEL_KWARGS = {"attention_mask", "position_ids", "logits_to_keep", "use_cache"}


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
    Enabling again replaces. Raises ValueError or TypeError, leaving the model as it was, where the pair cannot work.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(f"enable() takes a transformers model that can generate, got {type(model).__name__}")
    stock = _stock_class(model)
    if stock._sample is not GenerationMixin._sample or stock._assisted_decoding is not GenerationMixin._assisted_decoding:
        raise ValueError(f"{stock.__name__} has a decoding loop of its own; speculative decoding would change its output")
    if reason := unsupported(model):
        raise ValueError(f"{stock.__name__} cannot decode speculatively: {reason}")
    _check_num_draft_tokens(num_draft_tokens, model)
    if compile not in ("auto", True, False):
        raise ValueError(f"compile={compile!r} must be True, False or 'auto'")
    state = _State(model, None if drafter is None else resolve_drafter(drafter, model), num_draft_tokens, compile, timing)
    prepare(state.parts(state.drafter), compile, _graphs_for(model, compile))
    model.__dict__[_STATE] = state
    model.__class__ = _drop_in_class(stock)
    return model


def _graphs_for(model: PreTrainedModel, compile: Compile) -> Graphs | None:
    return Graphs(model.device) if compile is not False and model.device.type in RECORDINGS else None


def runner_of(drafter: Drafter | None) -> CachedModel | None:
    """What runs a drafter's model, None where it has none; one that hands on to another may have the other's `runner`."""
    runner = getattr(drafter, "runner", None)
    return runner if isinstance(runner, CachedModel) else None


def decoding_of(model: PreTrainedModel) -> str:
    """How the steps of an enabled model run: "compiled", on a CPU; "recorded", as CUDA graphs; else "eager"."""
    state: _State = model.__dict__[_STATE]
    runners = [part.runner for part in state.parts(state.drafter)]
    if all(runner.compiled is not None for runner in runners):
        return "compiled"
    is_recorded = all(runner.graphs is not None and runner.graphs.failure is None for runner in runners)
    return "recorded" if is_recorded else "eager"


def disable(model: PreTrainedModel) -> None:
    """Restore the model's own class and generate(); nothing happens to a model that is not enabled."""
    model.__class__ = _stock_class(model)
    model.__dict__.pop(_STATE, None)


def last_stats(model: PreTrainedModel) -> Stats | None:
    """Stats of the model's last generate() call; None where it was never enabled or the stock loop served the call."""
    state: _State | None = model.__dict__.get(_STATE)
    return state.last_stats if state else None


class _State:
    """What an enabled model remembers between calls, and the call in progress."""

    def __init__(
        self, model: PreTrainedModel, drafter: Drafter | None, num_draft_tokens: int | str, compile: Compile, timing: bool
    ) -> None:
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.compile = compile
        self.timing = timing
        self.target = CachedModel(model)
        self.checked: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # assistant models of earlier calls
        self.assistant: ModelDrafter | None = None  # the last one, where graphs are recorded of it
        self.learned_of_own: dict[tuple[Any, ...], Experience] = {}  # of a drafter that can be no key of _LEARNED
        self.last_stats: Stats | None = None
        self.lock = threading.RLock()  # a drafter serves one call at a time
        self.call: _Call | None = None

    def parts(self, drafter: Drafter | None) -> list[Part]:
        """The models that a call with this drafter runs."""
        runner = runner_of(drafter)
        return [Part("target", self.target, exact=True)] + ([] if runner is None else [Part("draft", runner, exact=False)])

    def graphs(self, drafter: Drafter) -> Graphs | None:
        """What a call with this drafter records its steps in, None where it does not."""
        graphs, parts = self.target.graphs, self.parts(drafter)
        if graphs is None or graphs.failure is not None:
            return None
        models = [part.runner.model for part in parts]
        graphs.is_on = all(model.device == graphs.device and why_not_recorded(model) is None for model in models)
        if not graphs.renew(models):
            for part in parts:
                part.runner.begin(0)
        return graphs if graphs.is_on else None

    def end(self, keep: bool) -> None:
        """A call has ended: free its caches, but for those that recorded steps go on with."""
        graphs = self.target.graphs
        if keep and graphs is not None and graphs.failure is None:
            return
        if graphs is not None:
            graphs.close()
        for drafter in (self.drafter, self.assistant):
            for part in self.parts(drafter):
                part.runner.begin(0)
        self.assistant = None


@dataclass
class _Call:
    """One generate() call in progress: its arguments by name, and what was decided on the way to the loop."""

    arguments: dict[str, Any]
    nested: bool
    mode_kwargs: dict[str, Any] = field(default_factory=dict)
    ours: bool = False

    @property
    def prompt(self) -> Any:
        inputs = self.arguments.get("inputs")
        return self.arguments.get("input_ids") if inputs is None else inputs


# What steps take and drafts are worth, by target, drafter and kind of call; it outlives disable().
_LEARNED: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Experience]]]
_LEARNED = weakref.WeakKeyDictionary()
_STATE = "_specdec_state"  # in an enabled model's __dict__; pickles and copies leave it out
_STOCK = "_specdec_stock"  # in a drop-in class


def _stock_class(model: PreTrainedModel) -> Any:
    return type(model).__dict__.get(_STOCK, type(model))


def _state_of(model: PreTrainedModel) -> tuple[_State, _Call]:
    """What enable() left on the model, and the call in progress: an outsider's where the class' own generate() was called."""
    state: _State = model.__dict__[_STATE]
    return state, state.call or _Call({}, nested=True)


@functools.cache
def _drop_in_class(stock: Any) -> Any:
    """The subclass whose decoding methods are ours."""

    positional = list(inspect.signature(stock.generate).parameters)[1:]

    @functools.wraps(stock.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: _State = self.__dict__[_STATE]
        with state.lock:
            outer = state.call  # a criterion or a processor may itself call generate()
            named = dict(zip(positional, args, strict=False))
            state.call = _Call(named | kwargs, nested=outer is not None)
            if outer is None:
                state.last_stats = None
            is_over = False
            try:
                _check_prompt(state.call.prompt)
                output = stock.generate(self, *args, **kwargs)
                is_over = True
                return output
            finally:
                state.call = outer
                if outer is None:
                    state.end(keep=is_over)

    def _validate_generation_mode(self: Any, generation_mode: Any, generation_config: Any, mode_kwargs: Any) -> None:
        _state_of(self)[1].mode_kwargs = mode_kwargs
        if generation_mode != GenerationMode.ASSISTED_GENERATION:
            stock._validate_generation_mode(self, generation_mode, generation_config, mode_kwargs)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        state, call = _state_of(self)
        asked = generation_mode == GenerationMode.ASSISTED_GENERATION
        if (state.drafter is not None or asked) and not generation_config.is_assistant:
            reason = _why_stock(self, generation_config, generation_mode, model_kwargs)
            if reason is None:
                call.ours = True
                return
            warnings.warn(f"specdec leaves this call to the stock loop: {reason}", stacklevel=5)
        if asked:  # put off above, when it was not known whose call this is
            stock._validate_generation_mode(self, generation_mode, generation_config, call.mode_kwargs)
        stock._prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _sample(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return _decode(self, input_ids, **kwargs) if _state_of(self)[1].ours else stock._sample(self, input_ids, **kwargs)

    def _assisted_decoding(self: Any, input_ids: Tensor, inputs_tensor: Tensor | None = None, **kwargs: Any) -> Any:
        if _state_of(self)[1].ours:
            return _decode(self, input_ids, **kwargs)
        return stock._assisted_decoding(self, input_ids, inputs_tensor=inputs_tensor, **kwargs)

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
    namespace |= {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__, _STOCK: stock}
    return type(stock.__name__, (stock,), namespace)


def _why_stock(model: Any, config: GenerationConfig, mode: GenerationMode, model_kwargs: dict[str, Any]) -> str | None:
    """Why the stock loop has to serve this call; None where ours does."""
    state, call = _state_of(model)
    given = call.arguments
    if call.nested:
        return "it comes from inside another call of this model, whose caches are in use, or went past model.generate()"
    if mode not in OUR_MODES:
        return f"{mode.value.replace('_', ' ')} is not sampling or greedy search"
    if given.get("custom_generate") is not None:
        return "it brings a decoding loop of its own (custom_generate)"
    if call.mode_kwargs.get("assistant_tokenizer") is not None:
        return "assistant_tokenizer: the draft model has another tokenizer"
    for name in ("assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            return f"{name} drafts with the target itself"
    if getattr(config, "speculation_type", None) == "dflash":
        return "speculation_type='dflash' reads the target's hidden states"
    if call.mode_kwargs.get("synced_gpus"):
        return "synced_gpus: processes must run the same number of forwards"
    if config.guidance_scale is not None and config.guidance_scale != 1:
        return "guidance_scale keeps a KV cache of its own"
    if config.watermarking_config is not None:
        return "watermarking_config keeps a state from token to token"
    for processor in given.get("logits_processor") or ():
        if type(processor) in STATEFUL_PROCESSORS:
            return f"{STATEFUL_PROCESSORS[type(processor)]} keeps a state from token to token"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    if config.use_cache is False:
        return "use_cache=False was asked for"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            return f"{name}=True was asked for"
    if given.get("position_ids") is not None:
        return "position_ids were passed"
    for name, value in model_kwargs.items():
        if value is not None and name not in OUR_MODEL_KWARGS:
            return f"{name} was passed"
    implementation = state.target.config._attn_implementation
    if implementation not in ATTENTIONS:
        return f"attention implementation {implementation!r} does not take a mask for each row"
    rope_limit = dynamic_rope_limit(model)
    limits = [config.max_length, *(c.max_length for c in given.get("stopping_criteria") or () if type(c) is MaxLengthCriteria)]
    if rope_limit is not None and max(limits) + _most(_num_draft_tokens(model, config), state) > rope_limit:
        return f"beyond {rope_limit} positions its rotary frequencies change with the longest row of a batch"
    if (
        call.mode_kwargs.get("streamer") is not None
        and len(call.prompt if isinstance(call.prompt, Tensor) else [0]) * (config.num_return_sequences or 1) > 1
    ):
        return "a streamer takes one sequence at a time"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not _is_left_padding(mask):
        return "its attention_mask hides more than left padding"
    return None


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    assistant_model: PreTrainedModel | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,  # position_ids, logits_to_keep, use_cache, tokenizer, synced_gpus=False: settled before, see _why_stock
) -> Any:
    """Serve one call: input_ids [B, P], left-padded, rows already repeated for num_return_sequences."""
    state, _call = _state_of(model)
    clock = Clock(model.device) if state.timing else None
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change its output; call model.eval() first")
    if state.target.vocab_size != state.target.config.vocab_size:
        raise ValueError(
            f"the vocabulary went from {state.target.vocab_size} to {state.target.config.vocab_size} since enable(); enable again"
        )
    num_draft_tokens = _num_draft_tokens(model, generation_config)
    drafter = _call_drafter(model, state, generation_config, assistant_model)
    context = state.target.context
    device = input_ids.device
    prompt = input_ids.to(device=model.device, dtype=torch.int64)
    prompt_lengths = prompt.new_full((len(prompt),), prompt.shape[1])
    if attention_mask is not None:
        prompt_lengths = attention_mask.to(prompt.device).long().sum(1)
    if context is not None and prompt_lengths.max() > context:
        raise ValueError(
            f"the prompt has {int(prompt_lengths.max())} tokens, more than the model's context of {context}; shorten it"
        )

    stop_ids, max_length, host_criteria = _split_criteria(stopping_criteria)
    sequences = Sequences(
        prompt,
        prompt_lengths,
        max_length=max(max_length, prompt.shape[1] + 1),  # plain decoding judges its first id after it has chosen it
        context=context,
        num_draft_tokens=_most(num_draft_tokens, state),
        stop_ids=stop_ids,
        stop=functools.partial(_any_stops, host_criteria) if host_criteria else None,
    )
    sampling = Sampling(
        [_processor(function) for function in logits_processor],
        do_sample=bool(generation_config.do_sample),
    )
    graphs = state.graphs(drafter)
    pace = _pace(state, drafter, num_draft_tokens, sequences, sampling, graphs)
    run, ahead = directly, 0
    if graphs is not None:
        sequences.settle(graphs.hold)
        run = graphs.run
        asks = sequences.stop is not None or sampling.needs_prefix or state.timing or streamer is not None
        ahead = 0 if asks or generation_config.output_scores or generation_config.output_logits else 1
    counter = StatsCounter(sequences.batch_size, pace.most)
    as_dict = generation_config.return_dict_in_generate
    scores = _PerToken(len(prompt)) if as_dict and generation_config.output_scores else None
    logits = _PerToken(len(prompt)) if as_dict and generation_config.output_logits else None
    lap = clock.lap if clock else no_lap
    for outcome in speculate(state.target, drafter, sequences, sampling, pace, run=run, ahead=ahead, lap=lap):
        counter.add(outcome)
        if scores is not None:
            scores.add(outcome, outcome.scores)
        if logits is not None:
            logits.add(outcome, outcome.logits)
        if streamer is not None:
            _stream(streamer, sequences, outcome)
    if streamer is not None:
        streamer.end()

    state.last_stats = counter.stats()
    state.last_stats.choice = pace.end() if isinstance(pace, Auto) else None
    if clock:
        clock.lap("other")
        state.last_stats.timing = clock.timing()
    pad = generation_config._pad_token_tensor
    text = _padded_text(sequences, 0 if pad is None else int(pad)).to(device)
    if not as_dict:
        return text
    output: Any = GenerateDecoderOnlyOutput(
        sequences=text,  # type: ignore[arg-type]
        scores=None if scores is None else scores.columns(),  # type: ignore[arg-type]
        logits=None if logits is None else logits.columns(),  # type: ignore[arg-type]
    )
    output.speculation = state.last_stats
    return output


class _PerToken:
    """Collects [V] rows for each committed id; columns() are one [B, V] tensor a generated position, 0 behind a row's stop."""

    def __init__(self, batch_size: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(batch_size)]

    def add(self, outcome: Outcome, values: Tensor) -> None:
        for row, count in enumerate(outcome.emitted.tolist()):
            self.rows[row].append(values[row, :count].clone())

    def columns(self) -> tuple[Tensor, ...]:
        rows = [torch.cat(row) for row in self.rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(1)


def _stream(streamer: Any, sequences: Sequences, outcome: Outcome) -> None:
    """Hand over the ids just committed, one at a time, as the stock loop does."""
    count, stop = int(outcome.emitted), int(sequences.lengths)
    for token in sequences.ids[0, stop - count : stop, None].cpu():
        streamer.put(token)


def _padded_text(sequences: Sequences, pad_token_id: int) -> Tensor:
    """[B, P + longest continuation]: prompts as they came, ids, then padding behind each row's stop."""
    lengths = sequences.padded_lengths
    text = sequences.padded(int(lengths.max()))
    behind = torch.arange(text.shape[1], device=text.device) >= lengths[:, None]
    return text.masked_fill(behind, pad_token_id)


def _split_criteria(criteria: StoppingCriteriaList) -> tuple[Tensor | None, int, list[Callable[[Tensor, None], Any]]]:
    """EOS ids and the length limit, which tensors judge, and the rest, judged on the host for each committed id."""
    stop_ids = [c.eos_token_id.flatten() for c in criteria if type(c) is EosTokenCriteria]
    max_length = min(2**62, *(c.max_length for c in criteria if type(c) is MaxLengthCriteria))  # generate() always sets one
    rest = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
    return torch.cat(stop_ids) if stop_ids else None, max_length, rest


def _processor(function: Any) -> Processor:
    """A logits processor with what is known of its kind."""
    if type(function) is PrefixConstrainedLogitsProcessor:  # a grammar may know its own row's texts and no other

        def ask(row: int, text: Tensor, scores: Tensor) -> Tensor:
            def allowed(_: int, ids: Tensor) -> list[int]:
                return function._prefix_allowed_tokens_fn(row, ids)

            constrained: Tensor = PrefixConstrainedLogitsProcessor(allowed, 1)(text[None], scores[None])
            return constrained[0]

        return Processor(ask, by_row=True)
    return Processor(function, needs_prefix=type(function) not in POINTWISE)


def _any_stops(criteria: list[Callable[[Tensor, None], Any]], text: Tensor) -> bool:
    """Ask each criterion about one row's text [1, L]; all of them, as plain decoding does, since some count their calls."""
    stops = False
    for criterion in criteria:
        answer = torch.as_tensor(criterion(text, None))
        if answer.numel() != 1:
            raise ValueError(
                f"{type(criterion).__name__} gave {answer.numel()} answers about one row; with specdec a stopping criterion sees"
                " each row alone, as input_ids [1, L]"
            )
        stops |= bool(answer)
    return stops


def _num_draft_tokens(model: PreTrainedModel, config: GenerationConfig) -> int | str:
    """K of this call, or "auto": its own, else enable's."""
    state, call = _state_of(model)
    own = config.prompt_lookup_num_tokens
    if own is None:
        own = call.arguments.get("num_assistant_tokens")
    if own is None and (passed := call.arguments.get("generation_config")) is not None:
        own = passed.num_assistant_tokens
    own = state.num_draft_tokens if own is None else own
    _check_num_draft_tokens(own, model)
    return own


def _most(num_draft_tokens: int | str, state: _State) -> int:
    """The largest K that a step of the call may ask for."""
    if isinstance(num_draft_tokens, int):
        return num_draft_tokens
    return LARGEST if state.target.context is None else min(LARGEST, state.target.context - 1)


def _pace(
    state: _State,
    drafter: Drafter,
    num_draft_tokens: int | str,
    sequences: Sequences,
    sampling: Sampling,
    graphs: Graphs | None,
) -> Pace:
    """What says how many ids each step drafts. The first call of its kind is preceded by a profile."""
    if isinstance(num_draft_tokens, int):
        return Constant(num_draft_tokens)
    if isinstance(drafter, NoDrafter):
        return Constant(0)
    of_target = _LEARNED.setdefault(state.target.model, weakref.WeakKeyDictionary())
    try:
        runner = runner_of(drafter)
        learned = of_target.setdefault(drafter if runner is None else runner.model, {})
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        learned = state.learned_of_own
    compiled = [part.runner.compiled is not None for part in state.parts(drafter)]
    kind = (sequences.device, sequences.batch_size, sampling.do_sample, torch.get_num_threads(), graphs is not None, *compiled)
    is_new = kind not in learned
    most = _most(num_draft_tokens, state)
    if is_new:
        learned[kind] = Experience(profile(state.target, drafter, sequences, sampling, most, graphs))
    rooms = sequences.limit(sequences.max_length).tolist()
    among = None if graphs is None else [0, *drafted_ids(most)]  # each K is recorded by itself
    return Auto(learned[kind], rooms, sequences.longest, is_new, among)


def _call_drafter(
    model: PreTrainedModel, state: _State, config: GenerationConfig, assistant_model: PreTrainedModel | None
) -> Drafter:
    """What the call itself brings, else what enable was given."""
    if assistant_model is not None:
        if assistant_model not in state.checked:
            _check_pair(model, assistant_model)
            state.checked.add(assistant_model)
        drafter: Drafter
        if state.assistant is not None and state.assistant.runner.model is assistant_model:
            drafter = state.assistant
        else:
            if state.assistant is not None:
                state.assistant.runner.begin(0)  # and its recordings go
            drafter = ModelDrafter(assistant_model, state.target.vocab_size)
            prepare(state.parts(drafter)[1:], state.compile, state.target.graphs)
            state.assistant = None if state.target.graphs is None else drafter
    elif config.prompt_lookup_num_tokens is not None:
        drafter = PromptLookup(config.max_matching_ngram_size) if config.max_matching_ngram_size else PromptLookup()
    else:
        assert state.drafter is not None
        drafter = state.drafter
    if isinstance(drafter, ModelDrafter):
        _check_device(model, drafter.runner.model)
        if drafter.runner.model.training:
            raise ValueError("the draft model is in training mode, so dropout would spoil its drafts; call .eval() on it first")
    return drafter


def resolve_drafter(drafter: PreTrainedModel | Drafter | str | Path, model: PreTrainedModel) -> Drafter:
    """A Drafter from whatever enable() or a call was given; raises where it does not fit the target."""
    if isinstance(drafter, str | Path):
        if str(drafter) in NAMED_DRAFTERS:
            return NAMED_DRAFTERS[str(drafter)]()
        drafter = _load_draft(str(drafter), model)
    if isinstance(drafter, PreTrainedModel):
        _check_pair(model, drafter)
        return ModelDrafter(drafter, CachedModel(model).vocab_size)
    if isinstance(drafter, type) or not isinstance(drafter, Drafter):
        raise TypeError(
            f"drafter={drafter!r} is none of: a transformers model, a hub id or folder, {sorted(NAMED_DRAFTERS)}, an object with"
            " begin(), propose() and observe()"
        )
    return drafter


def _load_draft(name: str, model: PreTrainedModel) -> PreTrainedModel:
    try:
        draft: Any = load_as_it_is(name, dtype=model.dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"drafter={name!r} is not one of {sorted(NAMED_DRAFTERS)}, and no model could be loaded from it as a folder or"
            f" hub id: {str(error).splitlines()[0]}"
        ) from error
    model_on_device: PreTrainedModel = draft.to(model.device)
    return model_on_device


def _check_pair(model: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise where a draft model cannot draft for this target."""
    _check_device(model, draft)
    if reason := unsupported(draft):
        raise ValueError(f"{type(draft).__name__} cannot draft: {reason}")
    tokenizer, draft_tokenizer = _tokenizer_of(model), _tokenizer_of(draft)
    if tokenizer is None or draft_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda item: item[1])[0]
        raise ValueError(
            f"the draft model has another tokenizer than the target: {token!r} is id {theirs.get(token)} in {draft.name_or_path}"
            f" and {ours.get(token)} in {model.name_or_path}; take a draft that was trained with the target's tokenizer"
        )


def _check_device(model: PreTrainedModel, draft: PreTrainedModel) -> None:
    if draft.device != model.device:
        raise ValueError(f"the draft model is on {draft.device}, the target on {model.device}; move one of them with .to()")


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model's weights, None where there is none at hand. Never asks a network."""
    path = model.name_or_path
    if not path or (Path(path).is_dir() and not any(Path(path).glob("*token*")) and not any(Path(path).glob("*vocab*"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None


def _check_num_draft_tokens(num_draft_tokens: int | str, model: PreTrainedModel) -> None:
    if num_draft_tokens == AUTO:
        return
    if not isinstance(num_draft_tokens, int) or isinstance(num_draft_tokens, bool) or num_draft_tokens < 1:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens!r} must be a whole number, 1 or more, or 'auto'; for plain decoding use"
            " drafter='none'"
        )
    context = context_of(model)
    if context is not None and num_draft_tokens >= context:
        raise ValueError(f"num_draft_tokens={num_draft_tokens} does not fit the model's context of {context}; 2 to 8 is usual")
    if num_draft_tokens >= MAX_WINDOW and is_4bit(model):
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens} makes a window that a 4-bit model takes for a prompt, and rounds otherwise; the"
            f" most is {MAX_WINDOW - 1}, and 2 to 8 is usual"
        )


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, Tensor) and prompt.ndim == 2 and prompt.numel() == 0:
        what = "batch is empty" if prompt.shape[0] == 0 else "prompt is empty"
        raise ValueError(f"the {what} (input_ids of shape {list(prompt.shape)}); pass at least one token for each row")


def _is_left_padding(mask: Tensor) -> bool:
    """True for 0…01…1 in every row; raises for right padding and for a row without a token."""
    mask = mask.bool()
    if not mask.any(1).all():
        raise ValueError(f"row {int((~mask.any(1)).nonzero()[0])} of the attention_mask is all zeros, an empty prompt; drop it")
    if not mask[:, -1].all():
        raise ValueError("the batch is padded on the right; set tokenizer.padding_side = 'left' before tokenizing")
    return bool((mask[:, 1:] >= mask[:, :-1]).all())
