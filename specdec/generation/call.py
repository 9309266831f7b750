"""One generate() call, served by the loop of speculative.py: what it is built of, running it, its output."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.core.interfaces import Drafter, DraftLengthPolicy, run_eager
from specdec.core.lockstep import Lockstep
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import speculate
from specdec.core.stats import StatsCounter
from specdec.core.steps import StepResult
from specdec.core.timing import StepTimer, no_mark
from specdec.draft_length.adaptive import AdaptiveK
from specdec.draft_length.constant import ConstantK
from specdec.draft_length.cost_model import PairCostModel
from specdec.draft_length.profiler import profile, profiled_draft_lengths
from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.draft_length.synchronized import SynchronizedPolicy
from specdec.drafters.none import NoDrafter
from specdec.generation.callbacks import KnownCriteria, has_eos, known_processors, need_lockstep
from specdec.generation.state import CALLS, COST_MODELS, State, members_of, runner_of
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.model_forward import cache_argument
from specdec.runtime.runner import ModelRunner
from specdec.runtime.tensor_parallel import Ranks

CACHE_FIELD = cache_argument(GenerateDecoderOnlyOutput.__dataclass_fields__)  # where generate() returns the cache


def decode(
    state: State,
    target: ModelRunner,
    drafter: Drafter,
    num_draft_tokens: int | str,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
) -> Any:
    """Decode input_ids [B, P], left-padded, rows already repeated for num_return_sequences: -> what generate() returns."""
    clock = StepTimer(target.model.device) if state.timing else None
    ranks = Ranks(*(member.runner.model for member in members_of(target, drafter)))
    sampling = Sampling(known_processors(logits_processor), do_sample=bool(generation_config.do_sample))
    lockstep = None
    if need_lockstep(logits_processor, stopping_criteria, len(input_ids)) or (
        streamer is not None and len(input_ids) > 1
    ):
        lockstep = _lockstep(
            input_ids, sampling, logits_processor, stopping_criteria, generation_config, streamer, ranks
        )
    sequences = _sequences(target, num_draft_tokens, input_ids, attention_mask, stopping_criteria, lockstep is not None)
    graphs = ranks.common_graphs(state.graphs(target, drafter))
    policy = _pace(state, target, drafter, num_draft_tokens, sequences, sampling, graphs, ranks)
    run, max_in_flight = run_eager, 0
    if graphs is not None:
        sequences.pin_buffers(graphs.static_buffer)
        run = graphs.run
    if graphs is not None or state.records:  # an eager second call draws its random numbers in the same order
        waits = sequences.stop is not None or sampling.needs_prefix or state.timing or streamer is not None or lockstep
        max_in_flight = 0 if waits or generation_config.output_scores or generation_config.output_logits else 1

    counter = StatsCounter(sequences.batch_size, policy.max_draft_tokens)
    collected = _Collected(lockstep, generation_config, len(input_ids))
    mark = clock.mark if clock else no_mark
    steps = speculate(
        target, drafter, sequences, sampling, policy, lockstep=lockstep, run=run, max_in_flight=max_in_flight, mark=mark
    )
    for outcome in steps:
        counter.add(outcome)
        collected.add(outcome)
        if streamer is not None and lockstep is None:
            _stream(streamer, sequences, outcome)
    if streamer is not None:
        streamer.end()

    stats = counter.stats()
    stats.choice = policy.end()
    if clock:
        clock.mark("other")
        stats.timing = clock.timing()
    state.last_stats = stats
    pad = generation_config._pad_token_tensor
    text = (
        lockstep.input_ids if lockstep else _padded_text(sequences, 0 if pad is None else int(pad)).to(input_ids.device)
    )
    if not generation_config.return_dict_in_generate:
        return text
    fields: dict[str, Any] = {"sequences": text, "scores": collected.scores, "logits": collected.logits}
    fields[CACHE_FIELD] = plain_cache(target, sequences, text)
    output: Any = GenerateDecoderOnlyOutput(**fields)
    output.speculation = stats
    return output


def _lockstep(
    input_ids: Tensor,
    sampling: Sampling,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    ranks: Ranks,
) -> Lockstep:
    pad = config._pad_token_tensor
    as_dict = config.return_dict_in_generate
    return Lockstep(
        input_ids,
        sampling,
        processors,
        ranks.synchronized(criteria),  # a time limit is decided by a clock
        emit=None if streamer is None else lambda tokens: streamer.put(tokens.cpu()),
        pad_token_id=int(pad) if pad is not None and has_eos(criteria) else None,
        keeps_scores=bool(as_dict and config.output_scores),
        keeps_logits=bool(as_dict and config.output_logits),
    )


def _sequences(
    target: ModelRunner,
    num_draft_tokens: int | str,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    criteria: StoppingCriteriaList,
    in_lockstep: bool,
) -> Sequences:
    prompt = input_ids.to(device=target.model.device, dtype=torch.int64)
    prompt_lengths = prompt.new_full((len(prompt),), prompt.shape[1])
    if attention_mask is not None:
        prompt_lengths = attention_mask.to(prompt.device).long().sum(1)
    known = KnownCriteria(criteria)
    return Sequences(
        prompt,
        prompt_lengths,
        max_length=max(known.max_length, prompt.shape[1] + 1),  # plain decoding asks its criteria behind its first id
        context=target.context,
        num_draft_tokens=max_draft_tokens(num_draft_tokens, target),
        stop_ids=None if in_lockstep else known.stop_ids,
        stop=known.stops if known.stop_strings and not in_lockstep else None,
        in_lockstep=in_lockstep,
    )


class _Collected:
    """Scores and logits of a call, where it asks for them: one [B, V] tensor a generated position, None where it does not.

    In lockstep they are plain decoding's; else zeros stand behind a row's stop, where plain decoding has those of its padding.
    """

    def __init__(self, lockstep: Lockstep | None, config: GenerationConfig, batch_size: int) -> None:
        self.lockstep = lockstep
        collects = bool(config.return_dict_in_generate) and lockstep is None
        self._scores = _PerToken(batch_size) if collects and config.output_scores else None
        self._logits = _PerToken(batch_size) if collects and config.output_logits else None

    def add(self, outcome: StepResult) -> None:
        if self._scores is not None:
            self._scores.add(outcome, outcome.scores)
        if self._logits is not None:
            self._logits.add(outcome, outcome.logits)

    @property
    def scores(self) -> Any:
        return self.lockstep.scores if self.lockstep else self._scores and self._scores.columns()

    @property
    def logits(self) -> Any:
        return self.lockstep.logits if self.lockstep else self._logits and self._logits.columns()


class _PerToken:
    """Collects [V] rows for each committed id; columns() are one [B, V] tensor a generated position, 0 behind a row's stop."""

    def __init__(self, batch_size: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(batch_size)]

    def add(self, outcome: StepResult, values: Tensor) -> None:
        for row, count in enumerate(outcome.emitted.tolist()):
            self.rows[row].append(values[row, :count].clone())

    def columns(self) -> tuple[Tensor, ...]:
        rows = [torch.cat(row) for row in self.rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(1)


def _stream(streamer: Any, sequences: Sequences, outcome: StepResult) -> None:
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


@torch.no_grad()
def plain_cache(target: ModelRunner, sequences: Sequences, text: Tensor) -> DynamicCache:
    """The KV cache that plain decoding returns with this text [B, L]: entries of all columns but the last, left-padded.

    What stands behind a row's stop, the target has not read yet; it does here, since plain decoding feeds its padding.
    """
    text = text.to(sequences.device)
    padding, width = sequences.padding, text.shape[1] - 1
    last = width - 1 - padding  # position of the last entry
    covered = sequences.lengths - 2  # and of the last one that there is
    if (missing := int((last - covered).max())) > 0:
        columns = torch.arange(text.shape[1], device=text.device) + padding[:, None]
        target.reserve(int(last.max()) + 1)
        target.feed(text.gather(1, columns.clamp(max=width)), last, missing)
    cache = DynamicCache(config=target.config)
    columns = (torch.arange(width, device=text.device) - padding[:, None]).clamp(min=0)
    buffers = target.cache.buffers()
    for layer, (keys, values) in enumerate(zip(buffers[::2], buffers[1::2], strict=True)):
        cache.update(_columns(keys, columns), _columns(values, columns), layer)
        kept: Any = cache.layers[layer]
        if kept.is_sliding:  # it keeps a view of its last columns, and so the memory of all of them
            kept.keys, kept.values = kept.keys.clone(), kept.values.clone()
    return cache


def _columns(states: Tensor, columns: Tensor) -> Tensor:
    """Slots [B, L] of each row's states [B, H, S, D]: -> [B, H, L, D], apart from the buffer."""
    index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index.to(states.device))


def max_draft_tokens(num_draft_tokens: int | str, target: ModelRunner) -> int:
    """The largest K that a step of the call may ask for."""
    if isinstance(num_draft_tokens, int):
        return num_draft_tokens
    return MAX_DRAFT_TOKENS if target.context is None else min(MAX_DRAFT_TOKENS, target.context - 1)


def _pace(
    state: State,
    target: ModelRunner,
    drafter: Drafter,
    num_draft_tokens: int | str,
    sequences: Sequences,
    sampling: Sampling,
    graphs: Graphs | None,
    ranks: Ranks,
) -> DraftLengthPolicy:
    """What says how many ids each step drafts. The first call of its kind is preceded by a profile.

    Of several ranks the first keeps the times and chooses K; the others run the same steps.
    """
    if isinstance(num_draft_tokens, int):
        return ConstantK(num_draft_tokens)
    if isinstance(drafter, NoDrafter):
        return ConstantK(0)
    of_target = COST_MODELS.setdefault(target.model, weakref.WeakKeyDictionary())
    try:
        runner = runner_of(drafter)
        learned = of_target.setdefault(drafter if runner is None else runner.model, {})
    except TypeError:  # it cannot be hashed, or not be referred to weakly
        learned = state.own_cost_models
    compiled = [member.runner.compiled is not None for member in members_of(target, drafter)]
    kind = (
        sequences.device,
        sequences.batch_size,
        sampling.do_sample,
        torch.get_num_threads(),
        graphs is not None,
        *compiled,
    )
    is_new = ranks.broadcast_bool(kind not in learned)
    most = max_draft_tokens(num_draft_tokens, target)
    if is_new:
        measured = profile(target, drafter, sequences, sampling, most, graphs, ranks.broadcast_bool, CALLS.alone())
        if ranks.is_first:
            learned[kind] = PairCostModel(measured)
    if not ranks.is_first:
        return SynchronizedPolicy(ranks, None, most)
    rooms = sequences.limit(sequences.max_length).tolist()
    among = None if graphs is None else [0, *profiled_draft_lengths(most)]  # each K is recorded by itself
    auto = AdaptiveK(learned[kind], rooms, sequences.longest, is_new, among)
    return auto if ranks.group is None else SynchronizedPolicy(ranks, auto, most)
