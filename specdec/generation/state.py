"""What an enabled model keeps between calls, and what a call takes for itself.

Weights are shared. Caches and the state of a drafter belong to one call at a time: the first call runs on the model's own runner
and drafter, whose buffers and recordings are kept where steps are recorded; a call that begins before it has ended gets spare
ones, freed with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from specdec.core.interfaces import Drafter
from specdec.core.stats import Stats
from specdec.draft_length.cost_model import PairCostModel
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.generation.routing import Request, user_hook
from specdec.runtime.attention.override import implementation_of
from specdec.runtime.cuda_graphs import Graphs, why_not_recorded
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.pair import PairMember
from specdec.runtime.prepare import Compile
from specdec.runtime.runner import ModelRunner
from specdec.runtime.support import Support, autocast_of, draws_random_numbers, ruled_out, support_of, unsupported

STATELESS_DRAFTERS = (NoDrafter, PromptLookup)  # any number of calls may share one
TRIED = 4  # states of a model whose trials are remembered

# What steps take and drafts are worth, by target, drafter and kind of call; it outlives disable().
COST_MODELS: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], PairCostModel]]]
COST_MODELS = weakref.WeakKeyDictionary()

_LOCK = threading.Lock()
_DRAFTERS_IN_USE: set[int] = set()  # ids of drafters and of the runners of their models, which their calls keep alive


class CallsInProgress:
    """generate() calls of all enabled models and threads; those that a thread makes within another count as one."""

    def __init__(self) -> None:
        self._by_thread = threading.local()
        self._num_now = self._num_begun = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        depth = self._by_thread.__dict__.get("depth", 0)
        self._by_thread.depth = depth + 1
        if not depth:
            with _LOCK:
                self._num_now += 1
                self._num_begun += 1
        try:
            yield
        finally:
            self._by_thread.depth = depth
            if not depth:
                with _LOCK:
                    self._num_now -= 1

    def alone(self) -> Callable[[], bool]:
        """For a call in progress: -> whether no other thread has been in one from now until it is asked."""
        with _LOCK:
            num_others, num_begun = self._num_now - 1, self._num_begun
        return lambda: num_others <= 0 and self._num_begun == num_begun


CALLS = CallsInProgress()


def runner_of(drafter: Drafter | None) -> ModelRunner | None:
    """What runs a drafter's model, None where it has none; one that hands on to another may have the other's `runner`."""
    runner = getattr(drafter, "runner", None)
    return runner if isinstance(runner, ModelRunner) else None


def members_of(target: ModelRunner, drafter: Drafter | None) -> list[PairMember]:
    """The models that a call with this drafter runs."""
    runner = runner_of(drafter)
    parts = [PairMember("target", target, exact=True)]
    return parts if runner is None else [*parts, PairMember("draft", runner, exact=False)]


class Trials:
    """What trials of a model gave, by the state that it was in: one that has changed since is tried again."""

    def __init__(self) -> None:
        self._known: list[tuple[Identity, Any, Support]] = []

    def support_of(self, runner: ModelRunner, check: Callable[[PreTrainedModel], Support]) -> Support:
        """What the check finds of the runner's model, as it is now."""
        model = runner.model
        mode = _mode_of(model)
        for identity, known_mode, support in self._known:
            if known_mode == mode and identity.change() is None:
                runner.unchanged = identity
                return support
        support = check(model)
        self.remember(runner, support)
        return support

    def remember(self, runner: ModelRunner, support: Support, identity: Identity | None = None) -> None:
        """What a trial of the runner's model, as it is now, gave; identity: of the model as it is now, where there is one."""
        model = runner.model
        runner.unchanged = identity or Identity(model)
        earlier = [
            known for known in self._known[: TRIED - 1] if known[0].is_part_of(model)
        ]  # others keep old weights alive
        self._known = [(runner.unchanged, _mode_of(model), support), *earlier]


def _mode_of(model: PreTrainedModel) -> Any:
    """What decides how a model computes, and is no member of it or changes while a forward runs."""
    return implementation_of(model.config.get_text_config(decoder=True)), autocast_of(model.device)


@dataclass
class Call:
    """One generate() call in progress: its arguments by name, and what was decided on the way to the loop.

    config: the GenerationConfig that generate() made for it, by which the call is recognized; None before that.
    mode_kwargs: what generate() keeps for the loop. request: what routing.py decides on, None where the stock loop was chosen.
    prepare_stock: validation and cache of the stock loop, put off until it is chosen.
    """

    arguments: dict[str, Any]
    config: GenerationConfig | None = None
    mode_kwargs: dict[str, Any] = field(default_factory=dict)
    request: Request | None = None
    prepare_stock: Callable[[dict[str, Any]], None] = lambda model_kwargs: None

    @property
    def prompt(self) -> Any:
        inputs = self.arguments.get("inputs")
        return self.arguments.get("input_ids") if inputs is None else inputs


class State:
    """Of one enabled model."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None,
        num_draft_tokens: int | str,
        compile: Compile,
        timing: bool,
    ) -> None:
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.compile = compile
        self.timing = timing
        self.target = ModelRunner(model)
        self.is_busy = False  # target serves a call
        self.assistant: ModelDrafter | None = None  # of the last call that brought one, where graphs are recorded of it
        self.own_cost_models: dict[
            tuple[Any, ...], PairCostModel
        ] = {}  # of a drafter that can be no key of COST_MODELS
        self.last_stats: Stats | None = None
        self.target_trials = Trials()
        self.draft_trials: weakref.WeakKeyDictionary[PreTrainedModel, Trials] = weakref.WeakKeyDictionary()
        self.paired: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # draft models whose tokenizers were compared
        self._by_thread = threading.local()

    @property
    def calls(self) -> list[Call]:
        """This thread's calls of the model, one inside the other."""
        calls: list[Call] = self._by_thread.__dict__.setdefault("calls", [])
        return calls

    @property
    def records(self) -> bool:
        """Whether the model's own runner records its steps."""
        return self.target.graphs is not None and self.target.graphs.failure is None

    def members(self, drafter: Drafter | None) -> list[PairMember]:
        return members_of(self.target, drafter)

    def why_stock(self, target: ModelRunner, length: int) -> str | None:
        """Why no call of the model, as it is now, can be served whose longest text has `length` positions.

        ValueError where dropout acts.
        """
        target.refresh()
        support = self.target_trials.support_of(target, self._check_target)
        if support.reason is None and support.max_length is not None and length > support.max_length:
            return f"its text may have {length} positions, drafts included; the model is known to work up to {support.max_length}"
        return support.reason

    def why_not_drafted(self, draft: ModelRunner) -> str | None:
        """Why a draft model, as it is now, cannot draft. ValueError where dropout acts."""
        return self.draft_trials.setdefault(draft.model, Trials()).support_of(draft, _check_draft).reason

    @staticmethod
    def _check_target(model: PreTrainedModel) -> Support:
        if reason := user_hook(model):
            return Support(reason)
        _check_dropout(
            model, "the model is in training mode, so dropout would change its output; call model.eval() first"
        )
        return support_of(model)

    def take_target(self) -> ModelRunner:
        """A runner for one call, to be given back."""
        with _LOCK:
            if not self.is_busy:
                self.is_busy = True
                return self.target
        return self.target.spare()

    def graphs(self, target: ModelRunner, drafter: Drafter) -> Graphs | None:
        """What a call of these records its steps in, None where it does not."""
        graphs, parts = target.graphs, members_of(target, drafter)
        if graphs is None or graphs.failure is not None:
            return None
        models = [member.runner.model for member in parts]
        graphs.is_on = all(
            member.runner.graphs is graphs and model.device == graphs.device and why_not_recorded(model) is None
            for member, model in zip(parts, models, strict=True)
        )
        if not graphs.refresh(models):
            for member in parts:
                member.runner.begin(0)
        return graphs if graphs.is_on else None

    def give_back(self, target: ModelRunner, drafter: Drafter | None, keep: bool) -> None:
        """A call has ended: its caches are freed, but for those that recorded steps go on with where `keep` holds."""
        graphs = target.graphs
        if not keep or graphs is None or graphs.failure is not None:
            if graphs is not None:
                graphs.close()
            for member in members_of(target, drafter):
                member.runner.begin(0)
            if target is self.target:
                self.assistant = None
        with _LOCK:
            _DRAFTERS_IN_USE.difference_update(_ids_of(drafter))
            if target is self.target:
                self.is_busy = False


def take_drafter(drafter: Drafter, target: ModelRunner) -> Drafter | None:
    """A drafter for one call on this runner, to be given back; None where it serves another call and cannot be copied."""
    if type(drafter) in STATELESS_DRAFTERS:  # a subclass may keep something
        return drafter
    runner = runner_of(drafter)
    shares_graphs = runner is None or runner.graphs is target.graphs
    with _LOCK:
        if shares_graphs and _DRAFTERS_IN_USE.isdisjoint(ids := _ids_of(drafter)):
            _DRAFTERS_IN_USE.update(ids)
            return drafter
    if type(drafter) is not ModelDrafter:
        return None
    spare = ModelDrafter(drafter.runner.model, drafter.vocab_size)
    spare.runner = drafter.runner.spare()
    return spare


def _ids_of(drafter: Drafter | None) -> set[int]:
    """Of a drafter and of the runner of its model: two drafters may share one."""
    return {id(member) for member in (drafter, runner_of(drafter)) if member is not None}


def _check_draft(model: PreTrainedModel) -> Support:
    _check_dropout(
        model, "the draft model is in training mode, so dropout would spoil its drafts; call .eval() on it first"
    )
    return Support(unsupported(model))


def _check_dropout(model: PreTrainedModel, message: str) -> None:
    """ValueError, in these words, where dropout acts."""
    is_training = any(module.training for module in model.modules())
    if is_training and ruled_out(model) is None and draws_random_numbers(model):
        raise ValueError(message)
