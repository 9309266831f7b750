"""One generate() call that specdec serves: build what it runs on, run the loop, assemble the output."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec.core.interfaces import Drafter, DraftLengthPolicy, Run, run_eager
from specdec.core.lockstep import Lockstep
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import speculate
from specdec.core.stats import Stats, StatsCounter, chance_acceptance
from specdec.core.steps import StepResult
from specdec.core.timing import StepTimer, no_mark
from specdec.draft_length.adaptive import AdaptiveK
from specdec.draft_length.constant import ConstantK
from specdec.draft_length.cost_model import PairCostModel
from specdec.draft_length.profiler import profile, profiled_draft_lengths
from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.draft_length.synchronized import SynchronizedPolicy
from specdec.drafters.none import NoDrafter
from specdec.generation.callbacks import Callbacks
from specdec.generation.dead_draft import AcceptanceWatch
from specdec.generation.output import ScoreCollector, dict_output, padded_text, stream
from specdec.generation.request import Request
from specdec.generation.state import CALL_TRACKER, COST_MODELS, State, members_of, runner_of
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.runner import ModelRunner
from specdec.runtime.tensor_parallel import Ranks
from specdec.utils.warn import warn

MAX_PLAIN_STEPS = 16  # of one call of the target, which an interrupt waits for


def decode(state: State, target: ModelRunner, drafter: Drafter, request: Request, callbacks: Callbacks) -> Any:
    """Decode request.input_ids [B, P]: -> what generate() returns.

    The prompts are left-padded, and their rows are already repeated for num_return_sequences.
    """
    loop = _build_loop(state, target, drafter, request, callbacks)
    scores = ScoreCollector(loop.lockstep, request.config, loop.sequences.batch_size)
    stats = state.last_stats = _run_loop(loop, scores, callbacks.streamer, state.observer)
    if (runner := runner_of(drafter)) is not None:
        watch = state.acceptance_watches.setdefault(runner.model, AcceptanceWatch())
        if (message := watch.add(stats)) is not None:
            warn(message)
    return _assemble_output(loop, scores, stats, request)


@dataclass(frozen=True)
class _Loop:
    """What one call's loop runs on; see `speculate`. timer: None where the call is not timed."""

    target: ModelRunner
    drafter: Drafter
    sequences: Sequences
    sampling: Sampling
    policy: DraftLengthPolicy
    lockstep: Lockstep | None
    run: Run
    max_in_flight: int
    max_plain_steps: int
    timer: StepTimer | None


def _build_loop(state: State, target: ModelRunner, drafter: Drafter, request: Request, callbacks: Callbacks) -> _Loop:
    timer = StepTimer(target.model.device) if state.timing else None
    ranks = Ranks(*(member.runner.model for member in members_of(target, drafter)))
    sampling = Sampling(
        callbacks.known_processors(), do_sample=bool(request.config.do_sample), verification=state.verification
    )
    input_ids = request.input_ids
    assert input_ids is not None
    lockstep = None
    if callbacks.need_lockstep(len(input_ids)):
        lockstep = _build_lockstep(input_ids, sampling, callbacks, request.config, ranks)
    sequences = _build_sequences(target, input_ids, request, callbacks, in_lockstep=lockstep is not None)
    graphs = ranks.common_graphs(state.graphs(target, drafter))
    reads_each_step = (
        lockstep is not None
        or sequences.stop is not None
        or sampling.needs_prefix
        or state.timing
        or state.observer is not None
        or callbacks.streamer is not None
        or request.config.output_scores
        or request.config.output_logits
    )
    max_in_flight, max_plain_steps = 0, 1
    if graphs is not None or state.records_steps:
        # a spare runner's eager call has the same number in flight, so a seed gives the same text on either
        max_in_flight = 0 if reads_each_step else 1
    elif not reads_each_step and not sampling.do_sample and not sampling.processors:
        max_plain_steps = MAX_PLAIN_STEPS
    policy = _build_policy(state, target, drafter, request, sequences, sampling, graphs, ranks, max_plain_steps)
    run = run_eager
    if graphs is not None:
        sequences.pin_buffers(graphs.static_buffer)  # a profile used these buffers before
        run = graphs.run
    return _Loop(target, drafter, sequences, sampling, policy, lockstep, run, max_in_flight, max_plain_steps, timer)


def _run_loop(
    loop: _Loop, scores: ScoreCollector, streamer: Any, observer: Callable[[StepResult], None] | None
) -> Stats:
    """Run the loop to its end: -> the call's statistics."""
    counter = StatsCounter(loop.sequences.batch_size, loop.policy.max_draft_tokens)
    results = speculate(
        loop.target,
        loop.drafter,
        loop.sequences,
        loop.sampling,
        loop.policy,
        lockstep=loop.lockstep,
        run=loop.run,
        max_in_flight=loop.max_in_flight,
        max_plain_steps=loop.max_plain_steps,
        mark=loop.timer.mark if loop.timer else no_mark,
    )
    for result in results:
        counter.add(result)
        scores.add(result)
        if observer is not None:
            observer(result)
        if streamer is not None and loop.lockstep is None:
            stream(streamer, loop.sequences, result)
    if streamer is not None:
        streamer.end()
    stats = counter.stats()
    stats.choice = loop.policy.end()
    if stats.num_draft_tokens:
        stats.chance_acceptance = chance_acceptance(loop.sequences.answers())
    if loop.timer:
        loop.timer.mark("other")
        stats.timing = loop.timer.timing()
    return stats


def _assemble_output(loop: _Loop, scores: ScoreCollector, stats: Stats, request: Request) -> Any:
    """The text [B, L] on the device of the prompts; with return_dict_in_generate a dictionary that holds it."""
    if loop.lockstep is not None:
        text = loop.lockstep.input_ids
    else:
        assert request.input_ids is not None
        text = padded_text(loop.sequences, _pad_token_id(request.config) or 0).to(request.input_ids.device)
    if not request.config.return_dict_in_generate:
        return text
    return dict_output(loop.target, loop.sequences, text, scores, stats)


def _build_lockstep(
    input_ids: Tensor, sampling: Sampling, callbacks: Callbacks, config: GenerationConfig, ranks: Ranks
) -> Lockstep:
    streamer = callbacks.streamer
    as_dict = config.return_dict_in_generate
    return Lockstep(
        input_ids,
        sampling,
        callbacks.processors,
        ranks.synchronized(callbacks.criteria),  # a time limit depends on the process' own clock
        emit=None if streamer is None else lambda tokens: streamer.put(tokens.cpu()),
        pad_token_id=_pad_token_id(config) if callbacks.has_eos else None,
        keeps_scores=bool(as_dict and config.output_scores),
        keeps_logits=bool(as_dict and config.output_logits),
    )


def _pad_token_id(config: GenerationConfig) -> int | None:
    pad = config._pad_token_tensor
    return None if pad is None else int(pad)


def _build_sequences(
    target: ModelRunner, input_ids: Tensor, request: Request, callbacks: Callbacks, in_lockstep: bool
) -> Sequences:
    prompt = input_ids.to(device=target.model.device, dtype=torch.int64)
    prompt_lengths = prompt.new_full((len(prompt),), prompt.shape[1])
    if request.mask is not None:
        prompt_lengths = request.mask.to(prompt.device).long().sum(1)
    return Sequences(
        prompt,
        prompt_lengths,
        max_length=max(callbacks.max_length, prompt.shape[1] + 1),  # plain decoding always writes one id
        context=target.context,
        num_draft_tokens=request.max_draft_tokens,
        stop_ids=None if in_lockstep else callbacks.stop_ids,
        stop=None if in_lockstep else callbacks.stop_at_string(),
        in_lockstep=in_lockstep,
    )


def max_draft_tokens(num_draft_tokens: int | str, target: ModelRunner) -> int:
    """The largest K of any step of a call with this num_draft_tokens."""
    if isinstance(num_draft_tokens, int):
        return num_draft_tokens
    return MAX_DRAFT_TOKENS if target.context is None else min(MAX_DRAFT_TOKENS, target.context - 1)


def _build_policy(
    state: State,
    target: ModelRunner,
    drafter: Drafter,
    request: Request,
    sequences: Sequences,
    sampling: Sampling,
    graphs: Graphs | None,
    ranks: Ranks,
    max_plain_steps: int,
) -> DraftLengthPolicy:
    """The policy that chooses K for each step. The first call of its kind is profiled before it starts.

    Of several ranks the first measures and chooses K; the others run the same steps.
    """
    if isinstance(drafter, NoDrafter):
        return ConstantK(0)  # so that steps run together
    if isinstance(request.num_draft_tokens, int):
        return ConstantK(request.num_draft_tokens)
    cost_models = _cost_models_of(state, target, drafter)
    is_compiled = [member.runner.compiled is not None for member in members_of(target, drafter)]
    key = (
        type(drafter),
        sequences.device,
        sequences.batch_size,
        sampling.do_sample,
        torch.get_num_threads(),
        graphs is not None,
        max_plain_steps,
        *is_compiled,
    )
    largest_k = request.max_draft_tokens
    is_new = ranks.broadcast_bool(key not in cost_models)
    if is_new:
        is_alone = CALL_TRACKER.watch_other_threads()
        measured = profile(
            target, drafter, sequences, sampling, largest_k, graphs, ranks.broadcast_bool, is_alone, max_plain_steps
        )
        if ranks.is_first:
            cost_models[key] = PairCostModel(measured)
    if not ranks.is_first:
        return SynchronizedPolicy(ranks, None, largest_k)
    remaining_tokens = sequences.limit(sequences.max_length).tolist()
    allowed_k = None if graphs is None else [0, *profiled_draft_lengths(largest_k)]  # each K is recorded on its own
    policy = AdaptiveK(cost_models[key], remaining_tokens, sequences.longest, is_new, allowed_k)
    return policy if ranks.group is None else SynchronizedPolicy(ranks, policy, largest_k)


def _cost_models_of(state: State, target: ModelRunner, drafter: Drafter) -> dict[tuple[Any, ...], PairCostModel]:
    """The cost models of this pair, by kind of call."""
    of_target = COST_MODELS.setdefault(target.model, weakref.WeakKeyDictionary())
    try:
        runner = runner_of(drafter)
        return of_target.setdefault(drafter if runner is None else runner.model, {})
    except TypeError:  # the drafter has no hash or no weak references
        return state.local_cost_models
