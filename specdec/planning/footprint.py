"""Memory of two models and two caches before they are loaded, from their configs alone.

A skeleton on the meta device has every shape and no memory. Weights are its tensors, 4-bit ones in the layout that the device's
kernel makes of them; caches are what its forward writes into a `RaggedCache`; activations are what that forward holds. What is
left to formulas, a line each, is attention (`forward_bytes`), logits (`logits_bytes`) and distributions (`plan`).

    peak = weights + both caches + the most that a phase needs beside them: target prefill, draft prefill, drafting, verification

Tests hold it to 5 % of the peak measured on a CPU. Where attention is neither sdpa's nor our kernel's, and for MLA on a CPU,
what attention holds may be two or three times what is said. Not in it: the CUDA context, the allocator's fragmentation and
workspaces inside of operators, for which `usable_bytes` leaves room; what a logits processor keeps; what quantizing while
loading takes for a moment; what recorded steps keep for each K on a CUDA device, logits and probabilities for the most part. What
our CPU kernels take inside is little: a layer's inputs once more in float32, and in attention 16 bytes a slot for each thread. A
compiled forward is planned as the eager one.
"""

from __future__ import annotations

import bisect
import copy
import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from specdec_kernels import cpu, w4a16
from specdec_kernels.attention import DTYPES, MAX_DIM
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from specdec.planning.peak_memory import LiveStorages
from specdec.quant.batch_invariant import BLOCK, CUDA_BLOCK, MAX_WINDOW
from specdec.quant.checkpoints import config_folder, named_errors, read_config, take_settings
from specdec.quant.config import METHOD, Int4Config
from specdec.quant.cpu import OP_GROUP_SIZES, CpuKernel, TorchKernel, row_order
from specdec.quant.experts import PROJECTIONS
from specdec.quant.formats import scheme_of
from specdec.quant.formats.layer import Scheme
from specdec.quant.int4 import Int4Tensor
from specdec.quant.layers import layers_to_quantize, linear_layers, shape_of
from specdec.quant.linear import TILE_WEIGHTS
from specdec.runtime.attention.blocks import KEY_BLOCK
from specdec.runtime.kv_cache.layers import grown_capacity, static_capacity
from specdec.runtime.kv_cache.masks import attention_kinds, attention_masks
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import cache_argument
from specdec.runtime.runner import PREFILL_CHUNK, PREFILL_MASK, context_of
from specdec.runtime.support import LINEAR_KINDS

GIB = 2**30
# MiB, as nvidia-smi shows them; drivers and error correction differ a little
CARDS = {
    "RTX 3060 12GB": 12288, "RTX 4070": 12282, "T4": 15360, "RTX 4080": 16376, "A10": 23028, "L4": 23034, "RTX 3090": 24576,
    "RTX 4090": 24564, "RTX 5090": 32607, "A100 40GB": 40960, "L40S": 46068, "RTX A6000": 49140, "H100": 81559,
    "A100 80GB": 81920, "H200": 143771, "B200": 183359,
}  # fmt: skip
CONTEXT_BYTES = 3 * GIB // 4  # the CUDA context, kernels and cuBLAS' workspace
FRAGMENTATION = 0.05  # of the card: blocks that the allocator holds and cannot use
MXFP4_GROUP = 32
MEASURED = 16  # positions of the forwards on meta
PROBE = "specdec_planning"  # stands in transformers' AttentionInterface while a skeleton is measured


@dataclass(frozen=True)
class Footprint:
    """What planning knows of one model.

    plain_bytes: all weights in `dtype`. int4_bytes: with its linear layers in four bits, as they lie in memory on the device;
    None where none can be. checkpoint_method: what its checkpoint is quantized by already, None where it is not.
    context: positions that it was made for, None where its config names no limit.
    layers: (heads, key width, value width) of each layer's cache. slot == position, so sliding layers keep all positions too.
    heads, kv_heads, key_width, value_width: of the attention call; a latent cache (MLA) is expanded by then.
    position_bytes, slot_bytes: the most that a forward holds outside of attention, by position of its window and by slot of the
    cache. attention_position_bytes, attention_slot_bytes: what it holds when attention is called. Neither counts cache or masks.
    is_eager: attention holds its scores [B, H, W, S]. num_masks: one for each kind of layers.
    has_kernels: a decoding window's attention holds nothing but its result, on a CPU beside 4-bit layers alone, where prompts are
    decoding too.
    slab_weights: the most of a 4-bit layer that prefill has in full precision at any one time.
    """

    name: str
    dtype: torch.dtype
    device: str
    plain_bytes: int
    int4_bytes: int | None
    checkpoint_method: str | None
    vocab_size: int
    context: int | None
    layers: tuple[tuple[int, int, int], ...]
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    position_bytes: float
    slot_bytes: float
    attention_position_bytes: float
    attention_slot_bytes: float
    is_eager: bool
    has_kernels: bool
    num_masks: int
    tile_weights: int
    keeps_last_logits: bool  # prefill makes logits of the last position alone

    @property
    def token_bytes(self) -> int:
        """Of the cache, for one position of one row."""
        return sum(heads * (key + value) for heads, key, value in self.layers) * self.dtype.itemsize

    def weights_bytes(self, int4: bool) -> int:
        if not int4:
            return self.plain_bytes
        if self.int4_bytes is None:
            raise ValueError(
                f"no linear layer of {self.name} can be in four bits with this group size; try 32, or plan without"
            )
        return self.int4_bytes

    def growth_bytes(self, batch: int, slots: int) -> int:
        """The buffer of so many slots that one layer's keys, or values, leave: old and new exist together."""
        return max(heads * max(key, value) for heads, key, value in self.layers) * batch * slots * self.dtype.itemsize

    def forward_bytes(self, batch: int, width: int, slots: int, int4: bool, growth_bytes: int = 0) -> int:
        """The most that a forward over [B, W] positions and S slots holds beside weights, cache and logits."""
        on_cpu = self.device == "cpu"
        decodes = width <= MAX_WINDOW or (on_cpu and int4 and self.has_kernels)
        slots = (
            -(-slots // KEY_BLOCK) * KEY_BLOCK if int4 and on_cpu else slots
        )  # in whole blocks, see specdec/runtime/attention/select.py
        size, positions, pairs = self.dtype.itemsize, batch * width, batch * width * slots
        mask = self.num_masks * pairs * (size if self.is_eager else 1)
        repeated = batch * slots * self.heads * (self.key_width + self.value_width) * size
        repeated = repeated if 1 < self.kv_heads < self.heads else 0  # a single head is expanded without a copy
        if self.is_eager:  # scores twice in float32; or once in 16 bits, their softmax in float32 and in 16 bits
            attention: float = repeated + self.heads * pairs * 8
        elif decodes and self.has_kernels and (int4 or not on_cpu) and max(self.key_width, self.value_width) <= MAX_DIM:
            attention = mask = 0  # the fused kernel reads the cache itself
        elif decodes and on_cpu and int4:  # scores of 8 queries in blocks and joined, then their softmax
            attention = batch * self.heads * BLOCK * slots * size * (2 + min(width, BLOCK) / BLOCK)
        else:  # sdpa: keys and values for each query head (but for a window of one), a floating mask
            attention = (repeated if width > 1 else 0) + pairs * size
        attention += positions * self.heads * self.value_width * size  # its result
        # of a slab: codes, packed and not, its weights in float32, and in the inputs' dtype where that is another one
        slab = self.tile_weights * (5.5 if size == 4 else 5.5 + size) if int4 and not decodes else 0
        outside = self.position_bytes * positions + self.slot_bytes * batch * slots + slab
        inside = self.attention_position_bytes * positions + self.attention_slot_bytes * batch * slots
        return int(mask + max(outside, inside + max(attention, growth_bytes)))

    def logits_bytes(self, batch: int, width: int, int4: bool) -> int:
        """Logits [B, W, V] in the model's dtype and their float32 copy; beside 4-bit layers the head works in blocks of rows."""
        size, rows = self.dtype.itemsize, batch * width
        if not int4:
            return rows * self.vocab_size * (size + 4)
        block = BLOCK if self.device == "cpu" else CUDA_BLOCK  # a CPU's own kernel fills no block up: up to 7 rows less
        padded = -(-rows // block) * block
        return self.vocab_size * max(padded * size * (2 if padded > block else 1), padded * size + rows * 4)

    def prefill_bytes(self, batch: int, prompt: int, int4: bool) -> int:
        """The most that prefill holds beside weights and cache; the last logits alone are copied."""
        width = prompt if batch * prompt**2 <= PREFILL_MASK else min(prompt, PREFILL_CHUNK)
        made = batch * self.vocab_size * self.dtype.itemsize * (1 if self.keeps_last_logits else width)
        return max(self.forward_bytes(batch, width, prompt, int4), made + batch * self.vocab_size * 4)


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak of a call, by part.

    target_kv_bytes, draft_kv_bytes: the caches at the call's end.
    logits_bytes: logits, processed scores and distributions, of one verification and of the outcome before it.
    workspace_bytes: what the most demanding phase needs beyond these: activations, masks, repeated keys, a slab of weights.
    """

    target_weights_bytes: int
    draft_weights_bytes: int
    target_kv_bytes: int
    draft_kv_bytes: int
    logits_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())


def footprint(
    model: str | Path | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    group_size: int = 128,
) -> Footprint:
    """Measure a model on meta, from a folder, a hub id (its config is all that is fetched) or a config.

    dtype: of all but 4-bit weights. device: "cuda", with the Triton kernels, or "cpu", with its own where they have been built.
    group_size: of the 4-bit form, unless the checkpoint is in four bits already. Raises ValueError, naming the model, where there
    is no config or none that a model can be made of, and for models whose cache is no plain one.
    """
    config, settings, name = _config(model)
    with named_errors(f"no memory can be planned for {name}"):
        return _footprint(config, settings, name, dtype, device, group_size)


def _footprint(
    config: Any, settings: dict[str, Any] | None, name: str, dtype: torch.dtype, device: str, group_size: int
) -> Footprint:
    text = config.get_text_config(decoder=True)
    kinds = attention_kinds(text)
    if config.is_encoder_decoder:
        raise ValueError("it is an encoder-decoder model; only decoders can be planned")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    if kinds - LINEAR_KINDS or skeleton._is_stateful:
        raise ValueError("it has layers that keep more than keys and values by position; only attention can be planned")
    plain_bytes = sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    saved_bytes, tile_weights = _quantized(skeleton, settings, group_size, device)
    return Footprint(
        name=name,
        dtype=dtype,
        device=device,
        plain_bytes=plain_bytes,
        int4_bytes=None if saved_bytes is None else plain_bytes - saved_bytes,
        checkpoint_method=None if settings is None else settings.get("quant_method"),
        vocab_size=int(text.vocab_size),
        context=context_of(skeleton),
        has_kernels=(dtype in cpu.DTYPES and cpu.load()) if device == "cpu" else dtype in DTYPES,
        num_masks=len(kinds),
        tile_weights=tile_weights,
        keeps_last_logits="logits_to_keep" in inspect.signature(skeleton.forward).parameters,
        **_measured(skeleton, text, kinds),
    )


def plan(
    target: Footprint,
    draft: Footprint | None = None,
    *,
    context: int,
    batch: int = 1,
    num_draft_tokens: int = 5,
    prompt: int | None = None,
    sampled: bool = True,
    target_int4: bool = True,
    draft_int4: bool = False,
) -> Plan:
    """Memory of a call whose longest row ends at `context` positions.

    prompt: tokens of the longest row; None for the most demanding, one that fills the context. sampled: with top-p, whose sorting
    holds the most of all usual processors; False for greedy, without any. Raises ValueError for what is out of range.
    """
    for name, value, least in (("batch", batch, 1), ("context", context, 2), ("num_draft_tokens", num_draft_tokens, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
    if target.context is not None and context > target.context:
        raise ValueError(f"context={context} is beyond the {target.context} positions that {target.name} was made for")
    prompt = context if prompt is None else prompt
    if not 1 <= prompt <= context:
        raise ValueError(f"prompt={prompt} must lie in 1 … context={context}")
    width = min(num_draft_tokens, context - 1) + 1

    def cache(model: Footprint, int4: bool) -> tuple[int, int, int]:
        """Its bytes behind prefill and at the end, and those of the last buffer that grows."""
        block = KEY_BLOCK if int4 and model.device == "cpu" else 1
        end = static_capacity(context, model.context) if model.device == "cuda" else context
        first, before, last = _slots(prompt, end, block)
        size = batch * model.token_bytes
        return first * size, last * size, model.growth_bytes(batch, before)

    target_first, target_kv, growth = cache(target, target_int4)
    draft_first, draft_kv, draft_growth = cache(draft, draft_int4) if draft else (0, 0, 0)
    later = target_kv - target_first + draft_kv  # of the caches, what is not there yet while the target prefills

    ids = batch * target.vocab_size * 4  # one float32 distribution a row
    logits, probs = width * ids, (width - 1) * ids if draft and sampled else 0
    if sampled:  # kept: the last outcome's logits, scores and draft probabilities; and this draft's
        kept = 2 * logits + 2 * probs
        sorting = 7.5 * logits  # logits, scores, these sorted, their order (int64), its sums, two masks, the result
        judging = 3 * logits + max(probs, 6 * ids)  # logits, scores, probabilities; their overlap, or a draw in float64
    else:
        kept, sorting, judging = logits, 0.0, logits
    head = target.logits_bytes(batch, width, target_int4)
    logits_bytes = int(kept + max(head, sorting, judging))
    phases = [
        target.prefill_bytes(batch, prompt, target_int4) - later,
        kept + target.forward_bytes(batch, width, context, target_int4, growth),
        logits_bytes,
    ]
    if draft:
        phases.append(draft.prefill_bytes(batch, prompt, draft_int4) - later + draft_first)
        phases.append(kept + draft.forward_bytes(batch, 2, context, draft_int4, draft_growth))
    return Plan(
        target_weights_bytes=target.weights_bytes(target_int4),
        draft_weights_bytes=draft.weights_bytes(draft_int4) if draft else 0,
        target_kv_bytes=target_kv,
        draft_kv_bytes=draft_kv,
        logits_bytes=logits_bytes,
        workspace_bytes=max(phases) - logits_bytes,
    )


def usable_bytes(card_bytes: int) -> int:
    """Of a card's memory, what tensors can have: the CUDA context and a share for fragmentation stay free."""
    return int(card_bytes * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def card_bytes(card: str) -> int:
    """Memory of a card of CARDS, or of a size such as 24GiB."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*gib", card.strip().lower())
    if size:
        return int(float(size[1]) * GIB)
    found = [mib for name, mib in CARDS.items() if name.lower() == card.strip().lower()]
    if not found:
        raise ValueError(f"card {card!r} is not known; give its memory as in 24GiB, or one of {', '.join(CARDS)}")
    return found[0] << 20


def largest_context(
    card_bytes: int, target: Footprint, draft: Footprint | None = None, *, batch: int = 1, **call: Any
) -> int:
    """The longest context that fits a card, up to the target's own; 0 where none does. call: plan's other arguments."""
    limit, usable = target.context or 1 << 20, usable_bytes(card_bytes)

    def fits(context: int) -> bool:
        return plan(target, draft, context=context, batch=batch, **call).total_bytes <= usable

    return _largest(fits, 2, limit, math.isqrt(PREFILL_MASK // max(batch, 1)))


def largest_batch(
    card_bytes: int, target: Footprint, draft: Footprint | None = None, *, context: int, **call: Any
) -> int:
    """The most rows that fit a card at a context; 0 where not even one does. call: plan's other arguments."""
    usable = usable_bytes(card_bytes)

    def fits(batch: int) -> bool:
        return plan(target, draft, context=context, batch=batch, **call).total_bytes <= usable

    limit = usable // (context * target.token_bytes)  # rows of the cache alone
    return _largest(fits, 1, max(limit, 1), PREFILL_MASK // context**2)


def smallest_card(total_bytes: int) -> str | None:
    """The card of CARDS with the least memory that a plan's total fits, None where none does."""
    fitting = [(mib, name) for name, mib in CARDS.items() if usable_bytes(mib << 20) >= total_bytes]
    return min(fitting)[1] if fitting else None


def _largest(fits: Callable[[int], bool], low: int, high: int, dip: int) -> int:
    """The largest of low … high that fits, 0 where none does. Behind `dip` prefill goes by chunks: what did not fit may again."""
    for start, stop in ((max(dip + 1, low), high), (low, min(dip, high))):
        if start <= stop and fits(start):
            return start + bisect.bisect_left(range(start + 1, stop + 1), True, key=lambda value: not fits(value))
    return 0


def _slots(prompt: int, context: int, block: int) -> tuple[int, int, int]:
    """Slots of a buffer behind prefill, before it last grew (0: it has not since) and at the end of a call."""
    prompt, end, limit = (
        -(-slots // block) * block for slots in (prompt, context - 1, context)
    )  # the last id is never fed
    first = last = grown_capacity(0, prompt, limit)
    before = 0
    while last < end:
        before, last = last, grown_capacity(last, last + 1, limit)
    return first, before, last


def _config(model: str | Path | PreTrainedConfig) -> tuple[Any, dict[str, Any] | None, str]:
    """A config of one's own without its quantization, that, and its model's name."""
    if isinstance(model, PreTrainedConfig):
        config = copy.deepcopy(model)
        return config, take_settings(config), model.name_or_path or model.model_type
    with named_errors(f"no config could be read from {str(model)!r}"):
        config, settings, _ = read_config(config_folder(model))
        return config, settings, str(model)


def _quantized(skeleton: Any, settings: dict[str, Any] | None, group_size: int, device: str) -> tuple[int | None, int]:
    """Bytes that four bits save, None where nothing can be in four bits, and the weights of the largest slab."""
    method = None if settings is None else settings.get("quant_method")
    if method == "mxfp4":
        experts = [
            value for name, value in skeleton.named_parameters() if value.ndim == 3 and name.endswith(PROJECTIONS)
        ]
        codebook_bytes = 4 * 16 * len(experts)
        return sum(
            value.nbytes - value.numel() // 2 - value.numel() // MXFP4_GROUP for value in experts
        ) - codebook_bytes, 0
    config, ignored, scheme = Int4Config(group_size), [], None
    if settings is not None and method == METHOD:
        config = Int4Config.from_dict(settings)
    elif settings is not None:
        scheme = scheme_of(settings)
        config = Int4Config(scheme.group_sizes[0], scheme.symmetric, quantize_head=method == "compressed-tensors")
        ignored = [*(settings.get("modules_to_not_convert") or ()), *(settings.get("ignore") or ())]
    try:
        names = layers_to_quantize(skeleton, config)
    except ValueError:  # nothing can be
        return None, 0
    layers, has_kernels = linear_layers(skeleton), device == "cpu" and cpu.load()
    saved_bytes = tile_weights = 0
    for name in names:
        form = (config.group_size, config.symmetric) if scheme is None else _form(scheme.for_layer(name))
        if form is not None and should_convert_module(name, [str(pattern).removeprefix("re:") for pattern in ignored]):
            rows, columns = shape_of(layers[name])
            saved_bytes += layers[name].weight.nbytes - _int4_bytes(rows, columns, *form, device, has_kernels)
            if not has_kernels:
                tile_weights = max(tile_weights, columns * min(rows, max(64, TILE_WEIGHTS // columns // 64 * 64)))
    return saved_bytes, tile_weights


def _form(scheme: Scheme | None) -> tuple[int, bool] | None:
    """The group size and symmetry of a layer of such a checkpoint, None where it is no 4-bit layer."""
    return None if scheme is None or scheme.bits != 4 else (scheme.group_sizes[0], scheme.symmetric)


@functools.cache
def _int4_bytes(rows: int, columns: int, group_size: int, symmetric: bool, device: str, has_kernels: bool) -> int:
    """A 4-bit weight [N, K] behind its first forward: codes and scales as the device's kernel has them, canonical scales.

    has_kernels: those of a CPU.
    """
    size = columns if group_size == -1 else group_size
    op_size = (
        next((op_size for op_size in OP_GROUP_SIZES if size % op_size == 0), None) if row_order() is not None else None
    )
    with torch.device("meta"):
        scale = torch.empty(rows, columns // size, dtype=torch.bfloat16)
        zero = None if symmetric else torch.empty(scale.shape, dtype=torch.uint8)
        int4 = Int4Tensor(torch.empty(rows, columns // 2, dtype=torch.uint8), scale, zero)
        codes = [int4.weight]  # where there is no kernel
        if has_kernels:
            kernel: CpuKernel | TorchKernel = CpuKernel(int4)
            codes = [kernel.weight, kernel.scale]
        elif device == "cpu" and op_size is not None:
            kernel = TorchKernel(int4, op_size)
            codes = [kernel.weight, kernel.scale]
        elif device != "cpu" and (packed := w4a16.prepack(int4.codes(), scale, zero)) is not None:
            codes = [packed.tiles, packed.scale]
    return sum(tensor.nbytes for tensor in (*codes, scale, zero) if tensor is not None)


def _measured(skeleton: Any, text: PreTrainedConfig, kinds: set[str]) -> dict[str, Any]:
    """What a forward writes to its cache and holds: two forwards on meta, one with twice the slots.

    In bfloat16, since mixtures of experts run in nothing else on meta; bytes are scaled to the model's dtype.
    """
    scale = skeleton.dtype.itemsize / 2
    body, implementation = skeleton.to(torch.bfloat16).base_model, text._attn_implementation
    width = min(MEASURED, (context_of(skeleton) or 2 * MEASURED) // 2)
    peaks: list[float] = []
    entries: list[float] = []  # what was held when attention was called
    calls: list[tuple[int, int, int, int]] = []  # heads of queries, of keys; widths of keys, of values

    def probe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append((query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
        entered.append(live.bytes - held)
        return query.new_empty(1, width, query.shape[1], value.shape[3]), None

    AttentionInterface.register(PROBE, probe)
    text._attn_implementation = PROBE
    for slots in (width, 2 * width):
        with torch.inference_mode(), torch.device("meta"):
            cache, ids = RaggedCache(), torch.zeros(1, width, dtype=torch.int64)
            window = cache.window
            window.rows, window.positions, window.first = ids[:, :1], ids, slots - width
            window.end = window.key_length = slots
            masks = attention_masks(ids, slots, text, kinds, torch.bool)
            taken = inspect.signature(body.forward).parameters
            inputs: dict[str, Any] = {
                "input_ids": ids,
                "attention_mask": masks,
                "use_cache": True,
                cache_argument(taken): cache,
            }
            if "position_ids" in taken:
                inputs["position_ids"] = ids
            live: Any = LiveStorages()
            held, entered = 0, list[int]()
            body(**inputs)  # makes the cache's buffers
            buffers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore
            for tensor in (*skeleton.parameters(), *skeleton.buffers(), *tree_leaves((masks, buffers)), ids):
                live.add(tensor)
            held = live.bytes
            entered.clear()
            with live:
                body(**inputs)
        peaks.append(scale * (live.peak_bytes - held))
        entries.append(scale * max(entered, default=0))
    layers = tuple((keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in buffers)
    if not calls:  # attention of its own, whose scores are among the peaks: those of a square window are left in
        peaks = entries = [peaks[0]] * 2
        calls = [(int(text.num_attention_heads), *layers[0])]
    values = (*map(max, zip(*calls, strict=True)), *_line(peaks, width), *_line(entries, width))
    names = (
        "heads", "kv_heads", "key_width", "value_width", "position_bytes", "slot_bytes", "attention_position_bytes",
        "attention_slot_bytes",
    )  # fmt: skip
    is_eager = implementation == "eager" or not entered
    return dict(zip(names, values, strict=True)) | {"layers": layers, "is_eager": is_eager}


def _line(held_bytes: list[float], width: int) -> tuple[float, float]:
    """What was held at W slots and at 2 W -> bytes by position of the window, by slot."""
    by_slot = (held_bytes[1] - held_bytes[0]) / width
    return held_bytes[0] / width - by_slot, by_slot
