"""Which models run on the ragged cache: what rules one out, and a trial of what does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.quant.batch_invariant import ATTENTION
from specdec.quant.int4 import Int4Linear
from specdec.quant.quantizer import METHOD
from specdec.runtime.attention.override import implementation_of
from specdec.runtime.kv_cache.masks import attention_kinds
from specdec.runtime.runner import ModelRunner, context_of, masks_by_slot, widths

ATTENTIONS = ("sdpa", "eager", ATTENTION)  # implementations that take a mask for each row
LINEAR_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}

# Relative error that a dtype's rounding explains; a wrong mask or cache is off by much more.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RECURRENT = "its cache is recurrent, so a rejected draft cannot be taken back"
ROUNDED_BY_NEIGHBOURS = 1e-1  # of 8-bit layers that quantize activations over the whole batch

KNOWN = (
    Path(__file__).parents[1] / "assets" / "models.json"
)  # what scripts/check_models.py found for each class of transformers
SHORT = 64  # positions of a trial
SHORT_ROW = 11  # of its other row
BEYOND = 32  # positions of a trial behind the largest window of its config
TRIAL_FLOPS = {"cpu": 5e11}  # that a trial may take: ten seconds at 50 GFLOP/s; elsewhere the default
DEFAULT_TRIAL_FLOPS = 1e15
TRIAL_FORWARDS = 5  # forwards over the trial's whole text, about
WINDOW_NAME = re.compile("window|chunk|local|block|stride|segment|span|extent|distance|top_?k|mem_len")


@dataclass(frozen=True)
class Support:
    """What was found of a model.

    reason: why it cannot run on the ragged cache; None where it can.
    max_length: positions of the longest text that this holds for; None: of any length.
    warning: what its user should know; None where there is nothing.
    """

    reason: str | None = None
    max_length: int | None = None
    warning: str | None = None


def support_of(model: PreTrainedModel) -> Support:
    """Whether this model runs on the ragged cache: by what it is, by trial runs, and how long its texts may be.

    A class that docs/models.md has as working is tried on a short text. Any other is tried beyond the largest number of its
    config that may be a window; where that takes too long, or fails, its texts may be as long as the longest trial that passed.
    """
    if reason := ruled_out(model):
        return Support(reason)
    context = context_of(model)
    max_length = context if masks_by_slot(model) else None
    window = 0 if is_known(model) else largest_window(model)
    beyond = min(window + BEYOND, context or window + BEYOND)
    affordable = int(
        TRIAL_FLOPS.get(model.device.type, DEFAULT_TRIAL_FLOPS) / (2 * TRIAL_FORWARDS * model.num_parameters())
    )
    warnings, tried, is_rounded = [], 0, False
    for length in sorted({SHORT, *(max(SHORT, min(length, affordable)) for length in (window, beyond))}):
        reason, differs = _trial(model, length)
        if reason is not None and not tried:
            return Support(reason)
        if reason is not None:
            break
        tried, is_rounded = length, is_rounded or differs
    if tried < beyond:
        max_length = tried
        why = reason or f"its config has {window} where a window may be, and a longer trial takes too long"
        warnings.append(
            f"{type(model).__name__}: calls with texts of over {tried} positions go to the stock loop ({why})"
        )
    if is_rounded:
        warnings.append(
            f"{type(model).__name__}: its quantized layers round a row by what else is in the batch, so near-ties may fall"
            " otherwise than in plain decoding of the row alone, as they may in plain batches"
        )
    return Support(None, max_length, "; ".join(warnings) or None)


def unsupported(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on the ragged cache at all, None where it can with short texts: enough for a draft model."""
    return ruled_out(model) or _trial(model, SHORT)[0]


@cache
def known_classes() -> frozenset[str]:
    """Names of transformers' classes whose texts were found equal to plain decoding's, with windows shorter and longer."""
    return frozenset(row["class"] for row in json.loads(KNOWN.read_text())["models"] if row["result"] == "works")


def is_known(model: PreTrainedModel) -> bool:
    cls = type(model)
    return cls.__module__.startswith("transformers.models.") and cls.__name__ in known_classes()


def largest_window(model: PreTrainedModel) -> int:
    """The largest number of the model's config, short of its context, whose name may be that of a window; 0 where none is."""
    config = model.config.get_text_config(decoder=True)
    context = context_of(model)
    numbers = [value for value in _numbers(config.to_dict(), is_window=False) if context is None or value < context]
    return max(numbers, default=0)


def _numbers(value: Any, is_window: bool) -> Iterator[int]:
    """The whole numbers in a config's value that stand under a window's name, or within something that does."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from _numbers(inside, is_window or WINDOW_NAME.search(str(name)) is not None)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _numbers(inside, is_window)
    elif is_window and isinstance(value, int) and not isinstance(value, bool):
        yield value


def ruled_out(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on the ragged cache, as far as its config and attributes tell; no forward is run."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return RECURRENT
    text_config = config.get_text_config(decoder=True)
    if kinds := attention_kinds(text_config) - LINEAR_KINDS:
        return f"its layers of kind {', '.join(sorted(kinds))} keep more than keys and values by position"
    implementation = implementation_of(text_config)
    if implementation not in ATTENTIONS:
        return (
            f"its attention implementation {implementation!r} does not take a mask for each row;"
            " load it with attn_implementation='sdpa' or 'eager'"
        )
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing in training mode drops the KV cache; call model.eval() first"
    return None


def dynamic_rope_limit(model: PreTrainedModel) -> int | None:
    """Length beyond which rotary frequencies depend on the batch's longest row (dynamic, longrope); None: they never do."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in by_kind
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """The coarsest dtype that a model computes in: kernels of 4-bit layers take and give 16 bits, whatever is around them."""
    has_kernel = any(isinstance(module, Int4Linear) and module.use_kernel for module in model.modules())
    dtype = torch.bfloat16 if has_kernel else model.dtype
    return max(dtype, autocast_of(model.device) or dtype, key=lambda dtype: PROBE_TOLERANCE.get(dtype, 1e-1))


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype that the caller's autocast computes in on this device, None where there is none."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


@torch.no_grad()
def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether a forward draws random numbers in the model's present mode, as dropout does in training.

    Leaves seeds alone. False where the forward fails: what is wrong with it, a trial says.
    """
    device = model.device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        with suppress(Exception):
            model(input_ids=ids, use_cache=False)
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    pairs = zip(before, after, strict=True)
    return any(one is not None and other is not None and not one.equal(other) for one, other in pairs)


def _rounds_by_neighbours(model: PreTrainedModel) -> bool:
    """Whether another library's quantized layers may round a row's activations by what else is in the forward."""
    quantizer = getattr(model, "hf_quantizer", None)
    by_another = quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) != METHOD
    return by_another or any(type(parameter).__module__.startswith("torchao") for parameter in model.parameters())


@torch.no_grad()
def _trial(model: PreTrainedModel, length: int) -> tuple[str | None, bool]:
    """Compare a ragged run of two rows, of a few and of `length` positions, to plain decoding of each row alone.

    -> what went wrong, None where nothing did; and whether the rows differ by more than their dtype rounds, as those of 8-bit
    layers may. The short row is decoded id by id on transformers' own cache, so that a forward which treats its last position in
    another way than those before it shows; and once more behind left padding, which must make no difference to a model that is
    given positions.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(length, context_of(model) or length)
    if length < 3:
        return f"its context of {length} is too short", False
    vocab_size = min(widths(model))
    ids, wrong = (
        torch.randint(vocab_size, shape, generator=generator).to(model.device) for shape in ((2, length), (2, 3))
    )
    try:
        runner = ModelRunner(model)
        windows = _ragged(runner, ids, wrong)
        if (width := windows[0][1].shape[-1]) != runner.vocab_size:
            return f"its head has {runner.vocab_size} rows and its logits are {width} wide", False
        alone = [_decoded(runner, ids[:1, :SHORT_ROW]), _plain(runner, ids[1:])]
        if any(logits.isnan().any() for logits in alone):
            return "its logits are NaN; check its weights and dtype", False
        errors = []
        for positions, logits in windows:
            for row in range(2):
                columns = 1 + int((positions[row].diff() > 0).sum())  # those that repeat a position are of no use
                want = alone[row].to(logits.device)[positions[row, :columns]]  # the model may lie on several devices
                errors.append(_error(logits[row, :columns], want))
        error = max(errors)
        tolerance = PROBE_TOLERANCE.get(precision_of(model), 1e-1)
        largest = ROUNDED_BY_NEIGHBOURS if _rounds_by_neighbours(model) else tolerance
        if not error <= largest:
            return (
                f"on a ragged batch its logits differ from those of the row alone (relative error {error:.1e})",
                False,
            )
        if length > SHORT_ROW and "position_ids" in runner.parameters:
            padded = _error(_decoded(runner, ids[:1, :SHORT_ROW], length - SHORT_ROW), alone[0])
            if not padded <= largest:
                return (
                    f"its plain logits behind left padding are not those of the row alone (relative error {padded:.1e})",
                    False,
                )
    except Exception as failure:  # a model may fail in any way on inputs it was not made for; the answer is the same
        what = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        return f"it does not run with positions and a mask for each row (a trial ended in {what})", False
    return None, error > tolerance


def _ragged(runner: ModelRunner, ids: Tensor, wrong: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Positions [2, W] and logits [2, W, V] of windows over two rows of ids [2, L], the first SHORT_ROW positions long.

    Uneven on purpose: some families pass an even batch and write other text on an uneven one. The rows do not advance alike
    either, since rotary embeddings forgive positions that are off by one number throughout. The windows are those of decoding
    steps: a draft behind a rejected one (wrong [2, 3]), one that is shorter in one row, none at all, and one of a single column.
    """
    last = ids.shape[1] - 1  # of a short context: then some windows end early
    first = torch.tensor([[SHORT_ROW - 8], [last - 7]], device=ids.device).clamp(min=1, max=last - 1)
    runner.prefill(ids, first[:, 0] - 1)
    positions = (first + torch.arange(3, device=ids.device)).clamp(max=last)
    wrong[0, :2] = ids[0, positions[0, :2]]  # the short row keeps two ids of this window, the other one none
    runner.forward(wrong, positions)
    windows = []
    for columns in ([[2, 3, 4], [0, 1, 2]], [[5, 6, 5], [3, 3, 3]], [[7], [4]]):
        positions = (first + torch.tensor(columns, device=ids.device)).clamp(max=last)
        windows.append((positions, runner.forward(ids.gather(1, positions), positions).logits))
    return windows


def _error(got: Tensor, want: Tensor) -> float:
    """Relative error of logits [n, V], by what they vary."""
    return float((got - want).norm() / (want - want.mean()).norm().clamp(min=1e-30))


def _plain(runner: ModelRunner, text: Tensor) -> Tensor:
    """Logits [L, V] float32 of text [1, L] in one forward without a cache; those of the last 8 positions, zeros before."""
    last = min(8, text.shape[1])
    keeps = {"logits_to_keep": last} if "logits_to_keep" in runner.parameters else {}
    logits: Tensor = runner.model(input_ids=text, use_cache=False, **keeps).logits[0, -last:].float()
    return F.pad(logits, (0, 0, text.shape[1] - last, 0))


def _decoded(runner: ModelRunner, text: Tensor, padding: int = 0) -> Tensor:
    """Logits [L, V] float32 of text [1, L], one position a forward, on transformers' own cache behind left padding.

    Positions are named as generate() does: some models would else count from what an earlier call has left in them.
    """
    ids = torch.cat([text.new_zeros(1, padding), text], dim=1)
    columns = torch.arange(ids.shape[1], device=ids.device)[None]
    call: dict[str, Any] = {
        runner.cache_argument: DynamicCache(config=runner.config),
        "use_cache": True,
        "return_dict": True,
    }
    if "logits_to_keep" in runner.parameters:
        call["logits_to_keep"] = 1
    logits = []
    for start, end in pairwise([0, *range(padding + 1, ids.shape[1] + 1)]):
        if "position_ids" in runner.parameters:
            call["position_ids"] = (columns[:, start:end] - padding).clamp(min=0)
        if padding:
            call["attention_mask"] = (columns[:, :end] >= padding).long()
        logits.append(runner.model(input_ids=ids[:, start:end], **call).logits[0, -1])
    return torch.stack(logits).float()
