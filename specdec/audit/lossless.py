"""The audit of losslessness: does speculation change the answers of this model, on this machine?

Pieces of work, in turn until the budget is spent: logits at all widths and batch sizes; greedy texts against plain
decoding; sampled calls against the law of plain decoding; the same checks on loops that are broken on purpose. What was
found becomes a certificate (certificate.py).
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.audit.certificate import Certificate, certify
from specdec.audit.controls import CONTROLS
from specdec.audit.evidence import Evidence, Key
from specdec.audit.findings import e_value
from specdec.audit.identity import explain, first_difference, plain_texts, speculative_texts
from specdec.audit.sampling import BETTORS, CALLS, draw_and_replay
from specdec.audit.statistics import RepeatedPrefixes
from specdec.audit.widths import BATCHES, WIDTHS, Widths, combine, measure_batch
from specdec.audit.work import OnProgress, Piece, ignore_progress, work_through
from specdec.core.interfaces import Drafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.generation.enable import state_of
from specdec.generation.inspection import prefill_in_chunks
from specdec.quant.layers import is_4bit
from specdec.runtime.prepare import Compile
from specdec.utils.provenance import file_hashes, provenance

SPECDEC, TRANSFORMERS = "specdec", "transformers"  # whose loop is audited
SHARES = {"widths": 0.1, "greedy": 0.3, "sampled": 0.3, "control": 0.3}  # of the budget, as long as work is left
SAMPLED_ROWS, MAX_SAMPLED_ROWS = 16, 64  # of a sampled call; an id takes less time in a larger batch
DRAWS_PER_ROW = 1250  # where more ids than this a row are to be drawn, calls have more rows
CONTEXT_TOKENS = 24  # of the longest prompt of a sampled call
WIDTHS_PROMPT = 24  # tokens before the positions whose logits are compared at all widths
CONTROL_ROUNDS = 100  # calls after which a broken loop counts as not found


@dataclass(frozen=True)
class Settings:
    """What is audited. prompts: ids of each. drafters: by the name that the certificate gives them.

    num_draft_tokens, batch_sizes, prefill_chunks, max_new_tokens: of greedy calls; sampled ones draft 3 tokens, or the
        smallest K. prefill_chunks: positions of a prompt that are read at a time; None: the whole one.
    max_draws: ids after which sampling ends. alpha: the rate of false alarms of the sampling test over the whole run.
    widths, batches: at which logits are compared. loop: whose loop is audited: specdec's, or transformers' assisted
    one, which takes one row and a number of draft tokens.
    first_prompt, command: the number of the first prompt, and the command, from which a divergence's is made; None:
        divergences have none, as where drafters have names that the command line does not know.
    """

    prompts: Sequence[Sequence[int]]
    drafters: dict[str, PreTrainedModel | Drafter | str]
    num_draft_tokens: tuple[int | str, ...] = (1, 3, 6, "auto")
    batch_sizes: tuple[int, ...] = (1, 4)
    prefill_chunks: tuple[int | None, ...] = (None, 16)
    max_new_tokens: int = 64
    alpha: float = 0.001
    seed: int = 0
    max_draws: int = 20_000
    widths: tuple[int, ...] = WIDTHS
    batches: tuple[int, ...] = BATCHES
    loop: str = "specdec"
    first_prompt: int = 0
    command: str | None = None

    def __post_init__(self) -> None:
        if self.loop not in (SPECDEC, TRANSFORMERS):
            raise ValueError(f"loop={self.loop!r} must be {SPECDEC!r} or {TRANSFORMERS!r}")
        if not self.drafters or not self.prompts or not all(len(prompt) >= 2 for prompt in self.prompts):
            raise ValueError("an audit takes at least one drafter, and prompts of two tokens or more")
        if self.loop == TRANSFORMERS:
            others = [name for name, drafter in self.drafters.items() if not _drafts_in_transformers(drafter)]
            is_single = set(self.batch_sizes) == {1} and set(self.prefill_chunks) == {None}
            if others or not is_single or not all(isinstance(k, int) for k in self.num_draft_tokens):
                raise ValueError(
                    "transformers' own loop drafts with a model or prompt_lookup, for one row (batch sizes (1,)) whose"
                    " prompt it reads as a whole (prefill chunks (None,)), with a number of draft tokens; given:"
                    f" {', '.join(others) or 'other batch sizes, prefill chunks or numbers'}"
                )


class Audit:
    """Runs the pieces of work of one audit on a model, which is enabled and disabled meanwhile."""

    def __init__(self, model: PreTrainedModel, settings: Settings, evidence: Evidence) -> None:
        self.model, self.settings, self.evidence = model, settings, evidence
        self.prefixes: dict[str, RepeatedPrefixes] = {name: RepeatedPrefixes() for name in CALLS}
        self.stop_ids = _frequent_ids(settings.prompts)
        self.claims_invariance = claims_invariance(model)
        self._enabled: tuple[str, Compile] | None = None
        self._deadline = math.inf
        self._plain: dict[tuple[int, ...], list[list[int]]] = {}

    def run(self, budget_s: float, on_progress: OnProgress = ignore_progress) -> None:
        """Work until nothing is left, or for budget_s seconds beyond what earlier runs took."""
        queues = {
            "widths": self._widths_work(),
            "greedy": self._greedy_work(),
            "sampled": self._sampled_work(),
            "control": self._control_work(),
        }
        drafts = [draft for draft in self.settings.drafters.values() if isinstance(draft, PreTrainedModel)]
        configs = [copy.deepcopy(draft.generation_config) for draft in drafts]  # transformers' loop reads K from them
        self._deadline = time.monotonic() + budget_s
        try:
            work_through(queues, SHARES, self.evidence, budget_s, on_progress)
        finally:
            specdec.disable(self.model)
            self._enabled = None
            for draft, config in zip(drafts, configs, strict=True):
                draft.generation_config = config

    def _enable(self, drafter: str, compile: Compile = "auto") -> None:
        if self._enabled != (drafter, compile):
            specdec.enable(self.model, self.settings.drafters[drafter], compile=compile)
            self._enabled = drafter, compile

    def _widths_work(self) -> Iterator[Piece]:
        for batch in self.settings.batches:
            key: Key = ("widths", batch)
            if key not in self.evidence.results:
                yield key, f"logits at all widths, batch {batch}", partial(self.compare_widths, batch)

    def compare_widths(self, batch: int) -> dict[str, Any]:
        """Logits of the longest prompt's last tokens at all widths in one batch size."""
        self._enable(next(iter(self.settings.drafters)))
        widths = self.settings.widths
        text = max(self.settings.prompts, key=len)
        length = min(len(text), WIDTHS_PROMPT + max(widths))
        ids = torch.tensor(text[:length], device=self.model.device)
        return asdict(measure_batch(self.model, ids, max(1, length - max(widths)), widths, batch))

    @property
    def widths(self) -> Widths | None:
        """What has been found of widths and batches."""
        return combine(self.settings.widths, self.evidence.of("widths").values())

    @property
    def _sampled_k(self) -> int:
        numbers = [k for k in self.settings.num_draft_tokens if isinstance(k, int)]
        return 3 if 3 in numbers or not numbers else min(numbers)

    def _greedy_work(self) -> Iterator[Piece]:
        """All settings on the first prompts, then on the next ones, so that a run that ends early is balanced."""
        settings = self.settings
        largest = max(settings.batch_sizes)
        for start in range(0, len(settings.prompts), largest):
            end = min(start + largest, len(settings.prompts))
            for drafter, k, chunk, size in itertools.product(
                settings.drafters, settings.num_draft_tokens, settings.prefill_chunks, settings.batch_sizes
            ):
                for first in range(start, end, size):
                    rows = tuple(range(first, min(first + size, end)))
                    key: Key = ("greedy", drafter, k, size, chunk, first)
                    if key not in self.evidence.results:
                        what = f"greedy texts: {drafter}, K={k}, batch {size}"
                        yield key, what, partial(self.compare_greedy, drafter, k, chunk, rows)

    def compare_greedy(
        self, drafter: str, num_draft_tokens: int | str, prefill_chunk: int | None, rows: tuple[int, ...]
    ) -> dict[str, Any]:
        """Greedy texts of some prompts in one batch: how many, how many are plain decoding's, and the others."""
        settings = self.settings
        self._enable(drafter)
        inputs = self._inputs([settings.prompts[row] for row in rows])
        call: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "pad_token_id": self._pad_id}
        k = {"num_assistant_tokens": num_draft_tokens} if isinstance(num_draft_tokens, int) else {}
        width = inputs["input_ids"].shape[1]
        if rows not in self._plain:
            self._plain[rows] = plain_texts(self.model, inputs, **call)[:, width:].tolist()
        assistance = self._assistance(drafter, num_draft_tokens)
        if assistance is None:
            with prefill_in_chunks(self.model, prefill_chunk):
                text = speculative_texts(self.model, inputs, **call, **k)
        else:
            text = plain_texts(self.model, inputs, **call, **assistance)
        speculative = text[:, width:].tolist()
        divergences = []
        for row, plain, text in zip(rows, self._plain[rows], speculative, strict=True):
            position = first_difference(plain, text)
            if position is not None:
                ids = torch.tensor(settings.prompts[row], device=self.model.device)
                found = explain(self.model, row, ids, plain, text, position)
                divergences.append(asdict(found) | {"is_rounding": found.is_rounding})
        return {
            "texts": len(rows),
            "identical": len(rows) - len(divergences),
            "divergences": divergences,
            "first_prompt": settings.first_prompt + rows[0],
        }

    def _sampled_work(self) -> Iterator[Piece]:
        drawn = sum(result["num_ids"].get("all", 0) for result in self.evidence.of("sampled").values())
        index = 0
        while drawn < self.settings.max_draws:
            for drafter in self.settings.drafters:
                for call in CALLS:
                    key: Key = ("sampled", drafter, call, index)
                    if key in self.evidence.results:
                        continue
                    yield (
                        key,
                        f"sampled texts: {drafter}, {CALLS[call].what}",
                        partial(self.sample, drafter, call, index),
                    )
                    drawn += self.evidence.results[key]["num_ids"].get("all", 0)
            index += 1

    def sample(self, drafter: str, call: str, index: int) -> dict[str, Any]:
        """One sampled call of the loop that is audited, replayed."""
        self._enable(drafter)
        return self._sample(drafter, call, index, self.prefixes[call], self._assistance(drafter, self._sampled_k))

    def _sample(
        self, drafter: str, call: str, index: int, prefixes: RepeatedPrefixes, assistance: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Every fourth call is one row; the others hold few contexts, each several times."""
        num_contexts = 1 if index % 4 == 3 else 2 + index % 4
        prompts = self.settings.prompts
        chosen = [prompts[(index + 7 * number) % len(prompts)] for number in range(num_contexts)]
        contexts = [_context(prompt, CONTEXT_TOKENS - 5 * number) for number, prompt in enumerate(chosen)]
        many = min(MAX_SAMPLED_ROWS, max(SAMPLED_ROWS, self.settings.max_draws // DRAWS_PER_ROW))
        rows = 1 if index % 4 == 3 or assistance is not None else many
        inputs = self._inputs([contexts[row % num_contexts] for row in range(rows)])
        seed = zlib.crc32(repr((self.settings.seed, drafter, call, index)).encode())
        sample = draw_and_replay(
            self.model, inputs, CALLS[call], self.stop_ids, self._pad_id, self._sampled_k, seed,
            prefixes, self.max_law_rounding, repeat=index % 8 == 0 and not self._remembers_calls,
            assistance=assistance,
        )  # fmt: skip
        return asdict(sample)

    @property
    def _remembers_calls(self) -> bool:
        """Whether the drafter proposes by what earlier calls have written, so that a seed does not decide the text."""
        return getattr(state_of(self.model).drafter, "remembers_calls", False)

    def _assistance(self, drafter: str, num_draft_tokens: int | str) -> dict[str, Any] | None:
        """The arguments with which transformers' own loop drafts; None where specdec's loop is audited."""
        if self.settings.loop == SPECDEC:
            return None
        draft = self.settings.drafters[drafter]
        if not isinstance(draft, PreTrainedModel):
            return {"prompt_lookup_num_tokens": num_draft_tokens}
        config: Any = draft.generation_config  # where that loop reads them
        config.num_assistant_tokens = num_draft_tokens
        config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = "constant", 0.0
        return {"assistant_model": draft}

    @property
    def max_law_rounding(self) -> float:
        """The total variation up to which rounding may change the law of an id."""
        widths = self.widths
        return 1e-6 + (0.0 if self.claims_invariance or widths is None else 8 * widths.total_variation)

    @property
    def max_logit_rounding(self) -> float:
        """The same for logits, as a share of the largest one."""
        widths = self.widths
        if self.claims_invariance or widths is None:
            return 0.0
        return max(8 * widths.change, 4 * torch.finfo(self.model.dtype).eps)

    def _control_work(self) -> Iterator[Piece]:
        for name, control in CONTROLS.items():
            key: Key = ("control", name)
            if key not in self.evidence.results:
                yield key, f"a broken loop: {control.what}", partial(self.run_control, name)

    def run_control(self, name: str) -> dict[str, Any] | None:
        """Sample from a broken loop until a check finds it: -> after how many ids, and which check.

        None where the budget ends before.
        """
        control = CONTROLS[name]
        drafter = self._control_drafter(control.needs_probs)
        if drafter is None:
            return {"found": None, "num_ids": 0, "evidence": "no drafter here samples its drafts"}
        log_wealth = torch.zeros(len(BETTORS), dtype=torch.float64)
        prefixes, num_ids = RepeatedPrefixes(), 0
        self._enable(drafter, compile=False)  # outside: enable() itself refuses a model on some of these loops
        with control.apply():
            for index in range(CONTROL_ROUNDS):
                sample = self._sample(drafter, control.call, index, prefixes, assistance=None)
                num_ids += sample["num_ids"]["all"]
                log_wealth += torch.tensor(sample["log_wealth"], dtype=torch.float64)
                evidence = self._fault_of(sample, log_wealth)
                if evidence is not None:
                    return {"found": True, "num_ids": num_ids, "evidence": evidence}
                if time.monotonic() > self._deadline:
                    return None
        return {"found": False, "num_ids": num_ids, "evidence": f"e-value {e_value(BETTORS.log_e_value(log_wealth))}"}

    def _control_drafter(self, needs_probs: bool) -> str | None:
        """The first drafter that samples its drafts, else the first one; None where one is needed and there is none."""
        names = [name for name, drafter in self.settings.drafters.items() if isinstance(drafter, PreTrainedModel)]
        return names[0] if names else None if needs_probs else next(iter(self.settings.drafters))

    def _fault_of(self, sample: dict[str, Any], log_wealth: Tensor) -> str | None:
        if sample["seed_errors"]:
            return "the same seed gives another text"
        if sample["stop_errors"]:
            return f"{sample['stop_errors']} texts end at another position than under plain decoding"
        if sample["max_logit_difference"] > self.max_logit_rounding:
            return f"logits differ from plain decoding's by {sample['max_logit_difference']:.2g} of the largest"
        log_e = BETTORS.log_e_value(log_wealth)
        if log_e >= math.log(1 / self.settings.alpha):
            return f"e-value {e_value(log_e)}"
        return None

    @property
    def _pad_id(self) -> int:
        pad = self.model.generation_config.pad_token_id
        return 0 if pad is None else int(pad)

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Left-padded prompts."""
        width = max(map(len, prompts))
        ids = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def audit_lossless(
    model: PreTrainedModel,
    settings: Settings,
    *,
    budget_s: float = 120.0,
    folder: Path | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Certificate:
    """Audit a model: does speculation change its answers on this machine?

    Args:
        model: The target, a transformers causal language model; disabled afterwards.
        settings: The prompts, the drafters, and how much of what is tried.
        budget_s: Seconds of this run. Work ends earlier where nothing is left.
        folder: Where what is found is kept, so that the same call goes on from there; None: nowhere.
        on_progress: Called with what is done now, and the seconds that this run has taken.

    Returns:
        The certificate of all that was found, in this run and in earlier ones of the folder.

    Raises:
        ValueError: The model or a drafter cannot be used, prompts are missing, or the folder holds another audit.
    """
    evidence = Evidence(_header(model, settings), folder)
    audit = Audit(model, settings, evidence)
    name = str(model.name_or_path)
    origin: dict[str, Any] = {"model": name, "dtype": str(model.dtype)[6:], "loop": settings.loop}
    origin |= provenance(str(model.device)) | {"files_sha256": file_hashes(name)}
    audit.run(budget_s, on_progress)
    return certify(
        evidence,
        audit.widths,
        audit.claims_invariance,
        settings.alpha,
        audit.max_logit_rounding,
        audit.max_law_rounding,
        settings.command,
        origin,
    )


def _header(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """What makes an audit another one."""
    return {
        "format": 3,
        "model": model.name_or_path,
        "dtype": str(model.dtype),
        "quantization": repr(getattr(model.config, "quantization_config", None)),
        "specdec": specdec.__version__,
        "torch": torch.__version__,
        "drafters": sorted(settings.drafters),
        "prompts": zlib.crc32(repr([list(prompt) for prompt in settings.prompts]).encode()),
        "num_draft_tokens": list(settings.num_draft_tokens),
        "batch_sizes": list(settings.batch_sizes),
        "prefill_chunks": list(settings.prefill_chunks),
        "max_new_tokens": settings.max_new_tokens,
        "alpha": settings.alpha,
        "seed": settings.seed,
        "loop": settings.loop,
    }


def _drafts_in_transformers(drafter: PreTrainedModel | Drafter | str) -> bool:
    return isinstance(drafter, PreTrainedModel | PromptLookup) or drafter == "prompt_lookup"


def claims_invariance(model: PreTrainedModel) -> bool:
    """Whether specdec promises logits that do not depend on widths and batches: 4-bit models on a CPU."""
    return model.device.type == "cpu" and is_4bit(model)


def _context(prompt: Sequence[int], length: int) -> list[int]:
    """The beginning of a prompt, and its first third once more, so that prompt lookup has something to propose."""
    again = length // 3
    return [*prompt[: length - again], *prompt[:again]]


def _frequent_ids(prompts: Sequence[Sequence[int]], count: int = 3) -> list[int]:
    """The most frequent ids of the prompts, so that texts that stop at them do so now and then."""
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    return ids.bincount().topk(min(count, int(ids.max()) + 1)).indices.tolist()
