"""Which models run on the ragged KV cache: what rules a model out, and trial runs of those that nothing rules out."""

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
from specdec.quant.config import METHOD
from specdec.quant.linear import Int4Linear
from specdec.runtime.attention.override import implementation_of
from specdec.runtime.kv_cache.masks import attention_kinds
from specdec.runtime.runner import ModelRunner, context_of, masks_by_slot, widths
from specdec.utils.numerics import relative_error

ATTENTIONS = ("sdpa", "eager", ATTENTION)  # implementations that take a mask for each row
LINEAR_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that cache by position alone
RECURRENT = "its cache is recurrent, so rejected draft tokens cannot be rolled back"

# Relative error that a dtype's rounding explains; a wrong mask or cache gives a much larger one.
TRIAL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
BATCH_ROUNDING_TOLERANCE = 1e-1  # of 8-bit layers that quantize activations over the whole batch

# The result of scripts/check_models.py for each class of transformers.
MODELS_FILE = Path(__file__).parents[1] / "assets" / "models.json"
TRIAL_LENGTH = 64  # positions of the shortest trial
SHORT_ROW_LENGTH = 11  # positions of its other row
BEYOND_WINDOW = 32  # positions of a trial beyond the largest window of the config
MAX_TRIAL_FLOPS = {"cpu": 5e11}  # by device type; ten seconds at 50 GFLOP/s
DEFAULT_MAX_TRIAL_FLOPS = 1e15
TRIAL_FORWARDS = 5  # approximate number of forwards over the whole text of a trial
WINDOW_NAME = re.compile("window|chunk|local|block|stride|segment|span|extent|distance|top_?k|mem_len")


@dataclass(frozen=True)
class Support:
    """Whether a model runs on the ragged KV cache.

    reason: why it cannot, None where it can.
    max_length: positions of the longest text that this holds for; None: of any length.
    warning: a limitation that the user of the model should be warned of; None: nothing.
    """

    reason: str | None = None
    max_length: int | None = None
    warning: str | None = None


def support_of(model: PreTrainedModel) -> Support:
    """Decide whether a model runs on the ragged KV cache: by its config, then by trial runs.

    A class that docs/models.md lists as working is tried on a short text. Any other is tried beyond the largest number
    of its config that may be an attention window. Where that takes too long, or fails, max_length is the length of the
    longest trial that passed.
    """
    if reason := ruled_out(model):
        return Support(reason)
    context = context_of(model)
    max_length = context if masks_by_slot(model) else None
    window = 0 if is_tested(model) else largest_window(model)
    needed = min(window + BEYOND_WINDOW, context or window + BEYOND_WINDOW)
    max_flops = MAX_TRIAL_FLOPS.get(model.device.type, DEFAULT_MAX_TRIAL_FLOPS)
    affordable = int(max_flops / (2 * TRIAL_FORWARDS * model.num_parameters()))
    warnings, passed, is_rounded = [], 0, False
    for length in sorted({TRIAL_LENGTH, *(max(TRIAL_LENGTH, min(length, affordable)) for length in (window, needed))}):
        reason, differs = _trial(model, length)
        if reason is not None and not passed:
            return Support(reason)
        if reason is not None:
            break
        passed, is_rounded = length, is_rounded or differs
    if passed < needed:
        max_length = passed
        why = reason or f"its config has {window} where a window may be, and a longer trial takes too long"
        warnings.append(
            f"{type(model).__name__}: calls with texts of over {passed} positions go to the stock loop ({why})"
        )
    if is_rounded:
        warnings.append(
            f"{type(model).__name__}: its quantized layers round each row depending on the other rows of the batch, so"
            " tokens with nearly equal scores may be chosen differently than in plain decoding of the row alone, as in"
            " plain batches"
        )
    return Support(None, max_length, "; ".join(warnings) or None)


def unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot run on the ragged cache even with short texts, None where it can: enough for a draft model."""
    return ruled_out(model) or _trial(model, TRIAL_LENGTH)[0]


@cache
def tested_classes() -> frozenset[str]:
    """Names of transformers' classes that write plain decoding's text, with windows shorter and longer than it."""
    models = json.loads(MODELS_FILE.read_text())["models"]
    return frozenset(row["class"] for row in models if row["result"] == "works")


def is_tested(model: PreTrainedModel) -> bool:
    cls = type(model)
    return cls.__module__.startswith("transformers.models.") and cls.__name__ in tested_classes()


def largest_window(model: PreTrainedModel) -> int:
    """The largest number in the config, less than the context, that may by its name be an attention window; else 0."""
    config = model.config.get_text_config(decoder=True)
    context = context_of(model)
    numbers = [value for value in _numbers(config.to_dict(), is_window=False) if context is None or value < context]
    return max(numbers, default=0)


def _numbers(value: Any, is_window: bool) -> Iterator[int]:
    """The integers in a value of a config that have, or are nested under, the name of a window."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, is_window or WINDOW_NAME.search(str(name)) is not None)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, is_window)
    elif is_window and isinstance(value, int) and not isinstance(value, bool):
        yield value


def ruled_out(model: PreTrainedModel) -> str | None:
    """Why its config or attributes rule a model out, None where they do not; no forward is run."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return RECURRENT
    text_config = config.get_text_config(decoder=True)
    if kinds := attention_kinds(text_config) - LINEAR_KINDS:
        return f"its layers of type {', '.join(sorted(kinds))} cache more than keys and values by position"
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
    """Length beyond which rotary frequencies depend on the batch's longest row (dynamic, longrope); None: no length."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in by_layer_type
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """The coarsest dtype that a model computes in: the kernels of 4-bit layers have 16-bit inputs and outputs."""
    has_kernel = any(isinstance(module, Int4Linear) and module.use_kernel for module in model.modules())
    dtype = torch.bfloat16 if has_kernel else model.dtype
    return max(dtype, autocast_of(model.device) or dtype, key=lambda dtype: TRIAL_TOLERANCE.get(dtype, 1e-1))


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that is enabled on this device, None where there is none."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


@torch.no_grad()
def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether a forward draws random numbers in the model's present mode, as dropout does in training.

    Seeds are restored. False where the forward fails; a trial reports why.
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


def _rounds_by_batch(model: PreTrainedModel) -> bool:
    """Whether another library's quantized layers may round a row's activations depending on the other rows."""
    quantizer = getattr(model, "hf_quantizer", None)
    by_another = quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) != METHOD
    return by_another or any(type(parameter).__module__.startswith("torchao") for parameter in model.parameters())


@torch.no_grad()
def _trial(model: PreTrainedModel, length: int) -> tuple[str | None, bool]:
    """Compare a ragged run of two rows, of SHORT_ROW_LENGTH and `length` positions, to plain decoding row by row.

    Returns what went wrong, None where nothing did; and whether the logits differ by more than the dtype's rounding, as
    those of 8-bit layers may. The short row is decoded token by token on transformers' own cache, which shows a forward
    that treats its last position differently from the others; and again with left padding, which must not matter to a
    model that is given position_ids.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(length, context_of(model) or length)
    if length < 3:
        return f"its context of {length} is too short", False
    vocab_size = min(widths(model))
    ids, rejected = (
        torch.randint(vocab_size, shape, generator=generator).to(model.device) for shape in ((2, length), (2, 3))
    )
    try:
        runner = ModelRunner(model)
        windows = _ragged_windows(runner, ids, rejected)
        if (width := windows[0][1].shape[-1]) != runner.vocab_size:
            return f"its head has {runner.vocab_size} rows, but its logits have {width} columns", False
        alone = [_decoded(runner, ids[:1, :SHORT_ROW_LENGTH]), _plain(runner, ids[1:])]
        if any(logits.isnan().any() for logits in alone):
            return "its logits are NaN; check its weights and dtype", False
        error = _largest_error(windows, alone)
        tolerance = TRIAL_TOLERANCE.get(precision_of(model), 1e-1)
        allowed = BATCH_ROUNDING_TOLERANCE if _rounds_by_batch(model) else tolerance
        if not error <= allowed:
            reason = f"on a ragged batch its logits differ from those of the row alone (relative error {error:.1e})"
            return reason, False
        if length > SHORT_ROW_LENGTH and "position_ids" in runner.parameters:
            padded = relative_error(_decoded(runner, ids[:1, :SHORT_ROW_LENGTH], length - SHORT_ROW_LENGTH), alone[0])
            if not padded <= allowed:
                reason = "with left padding its plain logits differ from those of the row alone"
                return f"{reason} (relative error {padded:.1e})", False
    except Exception as failure:  # a model may fail in any way on inputs that it was not made for
        error_line = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
        return f"it does not run with positions and a mask for each row (a trial raised {error_line})", False
    return None, error > tolerance


def _ragged_windows(runner: ModelRunner, ids: Tensor, rejected: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Positions [2, W] and logits [2, W, V] of windows over two rows of ids [2, L].

    The first row has SHORT_ROW_LENGTH positions, the second L, since some models are right on rows of one length and
    wrong on uneven ones. The rows also advance by different numbers, since rotary embeddings do not show an offset that
    all positions of a row share. The windows are those of decoding steps: a draft after a rejected one (rejected
    [2, 3]), a draft that is shorter in one row, no draft, and a window of one column.
    """
    last = ids.shape[1] - 1  # in a short context, some windows end early
    first = torch.tensor([[SHORT_ROW_LENGTH - 8], [last - 7]], device=ids.device).clamp(min=1, max=last - 1)
    runner.prefill(ids, first[:, 0] - 1)
    positions = (first + torch.arange(3, device=ids.device)).clamp(max=last)
    rejected[0, :2] = ids[0, positions[0, :2]]  # the short row accepts two ids of this window, the other row none
    runner.forward(rejected, positions)
    windows = []
    for columns in ([[2, 3, 4], [0, 1, 2]], [[5, 6, 5], [3, 3, 3]], [[7], [4]]):
        positions = (first + torch.tensor(columns, device=ids.device)).clamp(max=last)
        windows.append((positions, runner.forward(ids.gather(1, positions), positions).logits))
    return windows


def _largest_error(windows: list[tuple[Tensor, Tensor]], alone: list[Tensor]) -> float:
    """The largest relative error of a row in one of the windows, compared to the logits [L, V] of the row alone."""
    errors = []
    for positions, logits in windows:
        for row, expected in enumerate(alone):
            columns = 1 + int((positions[row].diff() > 0).sum())  # without those that repeat a position
            want = expected.to(logits.device)[positions[row, :columns]]  # the model may be on several devices
            errors.append(relative_error(logits[row, :columns], want))
    return max(errors)


def _plain(runner: ModelRunner, text: Tensor) -> Tensor:
    """Logits [L, V] float32 of text [1, L] in one forward without a cache: the last 8 positions, zeros before."""
    num_logits = min(8, text.shape[1])
    arguments = {"logits_to_keep": num_logits} if "logits_to_keep" in runner.parameters else {}
    logits: Tensor = runner.model(input_ids=text, use_cache=False, **arguments).logits[0, -num_logits:].float()
    return F.pad(logits, (0, 0, text.shape[1] - num_logits, 0))


def _decoded(runner: ModelRunner, text: Tensor, padding: int = 0) -> Tensor:
    """Logits [L, V] float32 of text [1, L], one position per forward, on transformers' own cache, with left padding.

    position_ids are passed as generate() does: without them, some models continue from state of an earlier call.
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
