"""From what enable() or a call is given to a Drafter that fits its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec.core.interfaces import Drafter
from specdec.drafters.dflash import DFlashDrafter, DFlashHead
from specdec.drafters.dspark import DSparkDrafter, DSparkHead
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3Head
from specdec.drafters.head_checkpoint import MTP, is_head, load_head
from specdec.drafters.heads import DraftHead, HeadDrafter
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.mtp import MtpHead
from specdec.drafters.none import NoDrafter
from specdec.drafters.other_tokenizer import OtherTokenizerDrafter
from specdec.drafters.peagle import PEagleDrafter, PEagleHead
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.shared_vocabulary import SharedVocabulary
from specdec.drafters.suffix import SuffixDecoding
from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.quant.checkpoints import load_checkpoint, named_errors
from specdec.quant.layers import is_4bit
from specdec.runtime.loading import check_tokenizer_files, load
from specdec.runtime.runner import context_of, widths
from specdec.runtime.support import unsupported
from specdec.utils.warn import warn

AUTO = "auto"
SUFFIX = "suffix"
SUFFIX_AND = f"{SUFFIX}+"  # before the folder or hub id of a draft model
MIN_COVERAGE = 0.01  # of the target's ids that a draft model of another tokenizer can draft
Tokenizers = tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]
HEAD_DRAFTERS: dict[type[DraftHead], Callable[..., HeadDrafter]] = {
    Eagle3Head: Eagle3Drafter,
    PEagleHead: PEagleDrafter,
    DFlashHead: DFlashDrafter,
    DSparkHead: DSparkDrafter,
    MtpHead: Eagle3Drafter,
}
NAMED_DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "none": NoDrafter,
    "prompt_lookup": PromptLookup,
    SUFFIX: SuffixDecoding,
}
NAMES = sorted([*NAMED_DRAFTERS, MTP])


def resolve_drafter(drafter: PreTrainedModel | Drafter | str | Path, model: PreTrainedModel) -> Drafter:
    """The Drafter for what enable() or a call is given. Raises TypeError or ValueError where it does not fit."""
    if isinstance(drafter, str | Path):
        return _named_drafter(str(drafter), model, partial(_load_draft, model=model))
    drafter = unwrap_peft(drafter)
    if isinstance(drafter, PreTrainedModel):
        return make_model_drafter(drafter, widths(model)[0], check_pair(model, drafter))
    if isinstance(drafter, type) or not isinstance(drafter, Drafter):
        raise TypeError(
            f"drafter={drafter!r} must be a transformers model, a hub id or folder, one of {NAMES},"
            f" {SUFFIX_AND!r} with a hub id or folder, or an object with begin(), propose() and observe()"
        )
    return drafter


def with_suffix_decoding(draft: PreTrainedModel, model: PreTrainedModel) -> SuffixHybrid:
    """Suffix decoding and a draft model for this target. Raises ValueError where the draft model does not fit."""
    drafter = resolve_drafter(draft, model)
    assert isinstance(drafter, ModelDrafter)
    return SuffixHybrid(drafter)


def load_drafter(name: str, model: PreTrainedModel, dtype: str) -> Drafter:
    """The drafter of a name for this target; its draft model, where it has one, in a dtype of load()."""
    return _named_drafter(name, model, lambda path: load(path, dtype, str(model.device)))


def _named_drafter(name: str, model: PreTrainedModel, load_draft: Callable[[str], PreTrainedModel]) -> Drafter:
    if (path := draft_model_of(name)) is None:
        return NAMED_DRAFTERS[name]()
    drafter: Drafter | None = None
    with named_errors(f"drafter={path!r} cannot be used"):
        if is_head(path, model.config):
            drafter = _make_head_drafter(load_head(path, model), model)
    drafter = drafter or resolve_drafter(load_draft(path), model)
    assert isinstance(drafter, ModelDrafter)
    return SuffixHybrid(drafter) if name.startswith(SUFFIX_AND) else drafter


def _make_head_drafter(head: DraftHead, model: PreTrainedModel) -> HeadDrafter:
    """The drafter of a draft head. Raises ValueError where the target's forward does not return its hidden states."""
    layers = head.settings.feature_layers
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with in_eval_mode(model), torch.no_grad():
        states = getattr(model(input_ids=ids, output_hidden_states=True, use_cache=False), "hidden_states", None)
    widths_of = None if states is None or max(layers) >= len(states) else {states[i].shape[-1] for i in layers}
    if widths_of != {head.settings.target_hidden_size}:
        raise ValueError(
            f"{type(model).__name__} does not return the hidden states {list(layers)} of width"
            f" {head.settings.target_hidden_size} that the draft head reads"
        )
    vocab_size = widths(model)[0]
    return HEAD_DRAFTERS[type(head)](head, vocab_size)


def description(drafter: Any) -> str:
    """What the model of a drafter is, which has one, in a few words for a person."""
    runner = drafter.runner
    if isinstance(runner.model, DraftHead):
        return runner.model.description()
    count = runner.config.num_hidden_layers
    return f"a draft model, {type(runner.model).__name__} with {count} layer{'s' * (count > 1)}"


def has_suffix_decoding(name: str) -> bool:
    """Whether the drafter of a name keeps answers for suffix decoding."""
    return name == SUFFIX or name.startswith(SUFFIX_AND)


def draft_model_of(name: str) -> str | None:
    """The folder or hub id of the draft model in a drafter's name; None where it has none."""
    path = name.removeprefix(SUFFIX_AND)
    if path != name and (path in NAMED_DRAFTERS or not path):
        raise ValueError(
            f"drafter={name!r} combines suffix decoding with a draft model: name its folder or hub id behind"
            f" {SUFFIX_AND!r}"
        )
    return None if path in NAMED_DRAFTERS else path


def unwrap_peft(model: Any) -> Any:
    """The transformers model that a PeftModel adapts; anything else as it is."""
    is_adapted = isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_adapted and not isinstance(model, PreTrainedModel) else model


def _load_draft(name: str, model: PreTrainedModel) -> PreTrainedModel:
    try:
        return load_checkpoint(name, dtype=model.dtype, device=model.device, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"drafter={name!r} is not one of {NAMES}, and {error}") from error


def make_model_drafter(draft: PreTrainedModel, vocab_size: int, shared: SharedVocabulary | None) -> ModelDrafter:
    """The drafter of a draft model, for a target with logits of this width; shared: as check_pair returns it."""
    return ModelDrafter(draft, vocab_size) if shared is None else OtherTokenizerDrafter(draft, vocab_size, shared)


def check_pair(
    model: PreTrainedModel, draft: PreTrainedModel, tokenizers: Tokenizers = (None, None)
) -> SharedVocabulary | None:
    """Raise ValueError where a draft model cannot draft for this target; -> None where they have one tokenizer.

    tokenizers: of target and draft model; those of their folders where None. If one is in neither place, it is taken to
    be the other one, as padded vocabularies of one tokenizer have different widths. If they differ, what they have in
    common is returned, and a warning says how much it is.
    """
    check_device(model, draft)
    with in_eval_mode(draft):
        if reason := unsupported(draft):
            raise ValueError(f"{type(draft).__name__} cannot draft: {reason}")
    tokenizer, draft_tokenizer = tokenizers[0] or _tokenizer_of(model), tokenizers[1] or _tokenizer_of(draft)
    if tokenizer is None or draft_tokenizer is None or _is_same(tokenizer, draft_tokenizer):
        return None
    shared = SharedVocabulary(tokenizer, draft_tokenizer)
    words = (
        f"the draft model has another tokenizer than the target: {shared.coverage:.1%} of the target's"
        f" {shared.num_ids} ids can be drafted"
    )
    if shared.coverage < MIN_COVERAGE:
        raise ValueError(f"{words}, too few to draft with; use a draft model whose tokenizer has more of its tokens")
    warn(words)
    return shared


def _is_same(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether one has all tokens of the other under the same ids, and nothing more than further added tokens."""
    smaller, larger = sorted((tokenizer, other), key=len)
    vocab, further = larger.get_vocab(), larger.get_vocab().keys() - smaller.get_vocab().keys()
    return smaller.get_vocab().items() <= vocab.items() and further <= larger.get_added_vocab().keys()


def check_device(model: PreTrainedModel, draft: PreTrainedModel) -> None:
    if draft.device != model.device:
        raise ValueError(
            f"the draft model is on {draft.device}, the target on {model.device}; move one of them with .to()"
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the model's folder; None where there is none, or it needs code or packages that are missing.

    Uses no network and runs no code from the folder. Raises ValueError where its files are damaged.
    """
    path = model.name_or_path
    if not path or (
        Path(path).is_dir() and not any(Path(path).glob("*token*")) and not any(Path(path).glob("*vocab*"))
    ):
        return None
    check_tokenizer_files(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception:  # tokenizers raises bare exceptions
        return None


def check_num_draft_tokens(num_draft_tokens: int | str, model: PreTrainedModel) -> None:
    if num_draft_tokens == AUTO:
        return
    if not isinstance(num_draft_tokens, int) or isinstance(num_draft_tokens, bool) or num_draft_tokens < 1:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens!r} must be a whole number, 1 or more, or 'auto'; for plain decoding"
            " use drafter='none'"
        )
    context = context_of(model)
    if context is not None and num_draft_tokens >= context:
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens} does not fit the model's context of {context}; 2 to 8 is usual"
        )
    if num_draft_tokens >= MAX_WINDOW and is_4bit(model):
        raise ValueError(
            f"num_draft_tokens={num_draft_tokens} makes a window that a 4-bit model takes for a prompt, with other"
            f" rounding; use at most {MAX_WINDOW - 1} (2 to 8 is usual)"
        )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, dropout is off; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
