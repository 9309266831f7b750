"""What an enabled model keeps between calls, and what each call acquires of it.

Weights are shared. A KV cache and a drafter with state serve one call at a time. The first call uses the model's own
runner and drafter; with CUDA graphs their buffers and recorded steps are kept for the next call. A call that begins
before the first one has ended gets spare ones, which are freed when it ends.
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
from specdec.core.sampling import Verification
from specdec.core.stats import Stats
from specdec.core.steps import StepResult
from specdec.draft_length.cost_model import PairCostModel
from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.other_tokenizer import OtherTokenizerDrafter
from specdec.drafters.peagle import PEagleDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.resolve import Tokenizers
from specdec.drafters.shared_vocabulary import SharedVocabulary
from specdec.drafters.suffix import SuffixDecoding
from specdec.generation.dead_draft import AcceptanceWatch
from specdec.generation.request import Request
from specdec.generation.trials import Trial, TrialCache, try_draft_model, try_target
from specdec.runtime.cuda_graphs import Graphs, why_not_recorded
from specdec.runtime.pair import PairMember
from specdec.runtime.prepare import Compile
from specdec.runtime.runner import ModelRunner

# A subclass may have state of its own, so these are compared with a drafter's very type.
STATELESS_DRAFTERS = (NoDrafter, PromptLookup)  # any number of calls may share one
# which make spare ones
SPARE_DRAFTERS = (
    *(ModelDrafter, OtherTokenizerDrafter, Eagle3Drafter, PEagleDrafter, DFlashDrafter),
    *(SuffixDecoding, SuffixHybrid),
)

# Step times and acceptance, by target, drafter and kind of call. They are kept after disable().
COST_MODELS: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], PairCostModel]]]
COST_MODELS = weakref.WeakKeyDictionary()

_LOCK = threading.Lock()
_DRAFTERS_IN_USE: set[int] = set()  # ids of drafters and of the runners of their models, which their calls keep alive


class CallTracker:
    """Counts generate() calls of all enabled models and threads. Calls that a thread nests count as one."""

    def __init__(self) -> None:
        self._by_thread = threading.local()
        self._num_running = self._num_begun = 0

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count a call of this thread for as long as the block runs."""
        depth = self._by_thread.__dict__.get("depth", 0)
        self._by_thread.depth = depth + 1
        if not depth:
            with _LOCK:
                self._num_running += 1
                self._num_begun += 1
        try:
            yield
        finally:
            self._by_thread.depth = depth
            if not depth:
                with _LOCK:
                    self._num_running -= 1

    def watch_other_threads(self) -> Callable[[], bool]:
        """Start watching, from within a call: -> a function, whether no other thread has been in a call since."""
        with _LOCK:
            num_others, num_begun = self._num_running - 1, self._num_begun
        return lambda: num_others <= 0 and self._num_begun == num_begun


CALL_TRACKER = CallTracker()


def runner_of(drafter: Drafter | None) -> ModelRunner | None:
    """The runner of a drafter's model; None where it has none. A drafter that wraps another may expose its `runner`."""
    runner = getattr(drafter, "runner", None)
    return runner if isinstance(runner, ModelRunner) else None


def model_drafter_of(drafter: Drafter | None) -> ModelDrafter | None:
    """The part of a drafter that drafts with a model; None where there is none."""
    drafter = drafter.model_drafter if isinstance(drafter, SuffixHybrid) else drafter
    return drafter if isinstance(drafter, ModelDrafter) else None


def feature_layers_of(drafter: Drafter | None) -> tuple[int, ...]:
    """The hidden states of the target that a drafter reads; () where it reads none."""
    layers: tuple[int, ...] = getattr(drafter, "feature_layers", ())
    return layers


def members_of(target: ModelRunner, drafter: Drafter | None) -> list[PairMember]:
    """The models that a call with this drafter runs."""
    runner = runner_of(drafter)
    members = [PairMember("target", target, exact=True)]
    return members if runner is None else [*members, PairMember("draft", runner, exact=False)]


@dataclass
class Call:
    """One generate() call in progress.

    arguments: of generate(), by name.
    config: the GenerationConfig that generate() made for this call, which identifies it; None before that.
    mode_kwargs: what generate() keeps for the decoding loop (streamer, tokenizer, …).
    request: what routing.py decides on; None where the stock loop was chosen before ids and mask were prepared.
    prepare_stock: the stock loop's own validation and cache, which wait until that loop is chosen.
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


@dataclass(frozen=True)
class CheckedDraft:
    """What was found of a draft model that a call brought, with the tokenizers that the call brought.

    shared: what the tokenizers of target and draft model have in common; None where they are one.
    """

    tokenizers: Tokenizers
    shared: SharedVocabulary | None


class State:
    """What one enabled model keeps between calls.

    drafter, num_draft_tokens, compile, verification, timing: as enable() was given them.
    observer: called with the result of each step, before the next one; None: nothing is called.
    target: the model's own runner. is_target_in_use: whether a call uses it now.
    assistant: the drafter of the last call that brought an `assistant_model`, kept where its steps are recorded.
    local_cost_models: of drafters that cannot be keys of COST_MODELS.
    target_trials, draft_trials: results of trials of the target and of each draft model.
    checked_drafts: draft models of calls, whose tokenizers were compared with the target's.
    acceptance_watches: how often the drafts of each draft model were accepted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None,
        num_draft_tokens: int | str,
        compile: Compile,
        verification: Verification,
        timing: bool,
    ) -> None:
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.compile = compile
        self.verification = verification
        self.timing = timing
        self.observer: Callable[[StepResult], None] | None = None
        self.target = ModelRunner(model, feature_layers_of(drafter))
        self.is_target_in_use = False
        self.assistant: ModelDrafter | None = None
        self.local_cost_models: dict[tuple[Any, ...], PairCostModel] = {}
        self.last_stats: Stats | None = None
        self.target_trials = TrialCache()
        self.draft_trials: weakref.WeakKeyDictionary[PreTrainedModel, TrialCache] = weakref.WeakKeyDictionary()
        self.acceptance_watches: weakref.WeakKeyDictionary[PreTrainedModel, AcceptanceWatch]
        self.acceptance_watches = weakref.WeakKeyDictionary()
        self.checked_drafts: weakref.WeakKeyDictionary[PreTrainedModel, CheckedDraft] = weakref.WeakKeyDictionary()
        self._by_thread = threading.local()

    @property
    def calls(self) -> list[Call]:
        """This thread's calls of the model, the innermost last."""
        calls: list[Call] = self._by_thread.__dict__.setdefault("calls", [])
        return calls

    @property
    def records_steps(self) -> bool:
        """Whether the model's own runner records its steps."""
        return self.target.graphs is not None and self.target.graphs.failure is None

    def members(self, drafter: Drafter | None) -> list[PairMember]:
        return members_of(self.target, drafter)

    def try_target(self, target: ModelRunner) -> Trial:
        """The trial of the target in its current state. Raises ValueError where dropout is active."""
        target.refresh()
        return self.target_trials.trial_of(target, try_target)

    def try_draft_model(self, draft: ModelRunner) -> Trial:
        """The trial of a draft model in its current state. Raises ValueError where dropout is active."""
        return self.draft_trials.setdefault(draft.model, TrialCache()).trial_of(draft, try_draft_model)

    def acquire_target(self) -> ModelRunner:
        """A runner of the target for one call, which `release` takes back."""
        with _LOCK:
            if not self.is_target_in_use:
                self.is_target_in_use = True
                return self.target
        return self.target.spare()

    def graphs(self, target: ModelRunner, drafter: Drafter) -> Graphs | None:
        """The CUDA graphs that record the steps of a call with this runner and drafter; None where it runs eagerly."""
        graphs, members = target.graphs, members_of(target, drafter)
        if graphs is None or graphs.failure is not None:
            return None
        models = [member.runner.model for member in members]
        graphs.is_on = all(
            member.runner.graphs is graphs and model.device == graphs.device and why_not_recorded(model) is None
            for member, model in zip(members, models, strict=True)
        )
        if not graphs.refresh(models):
            for member in members:
                member.runner.begin(0)
        return graphs if graphs.is_on else None

    def release(self, target: ModelRunner, drafter: Drafter | None, keep_recorded: bool) -> None:
        """End a call: free its KV caches, except those that recorded steps use again where keep_recorded holds."""
        graphs = target.graphs
        if not keep_recorded or graphs is None or graphs.failure is not None:
            if graphs is not None:
                graphs.close()
            for member in members_of(target, drafter):
                member.runner.begin(0)
            if target is self.target:
                self.assistant = None
        with _LOCK:
            _DRAFTERS_IN_USE.difference_update(_ids_of(drafter))
            if target is self.target:
                self.is_target_in_use = False


def acquire_drafter(drafter: Drafter, target: ModelRunner) -> Drafter | None:
    """A drafter for one call on this runner, which `State.release` takes back: the drafter itself, or a spare one.

    None where it serves another call and specdec cannot make a spare one.
    """
    if type(drafter) in STATELESS_DRAFTERS:
        return drafter
    runner = runner_of(drafter)
    shares_graphs = runner is None or runner.graphs is target.graphs
    with _LOCK:
        if shares_graphs and _DRAFTERS_IN_USE.isdisjoint(ids := _ids_of(drafter)):
            _DRAFTERS_IN_USE.update(ids)
            return drafter
    return drafter.spare() if isinstance(drafter, SPARE_DRAFTERS) and type(drafter) in SPARE_DRAFTERS else None


def _ids_of(drafter: Drafter | None) -> set[int]:
    """id() of a drafter and of the runner of its model, which two drafters may share."""
    return {id(member) for member in (drafter, runner_of(drafter)) if member is not None}
