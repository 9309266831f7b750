"""The footprint of a model before it is loaded, from its config alone.

A skeleton on the meta device has every shape and no memory. Weights are its tensors, 4-bit ones in the layout of the
device's kernel; caches are what its forward writes into a `RaggedCache`; activations are what that forward holds. A
compiled forward is counted as the eager one.
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from specdec_kernels import cpu, w4a16
from specdec_kernels.attention import DTYPES
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from specdec.drafters.head_checkpoint import is_head, make_head
from specdec.drafters.heads import DraftHead
from specdec.planning.formulas import ModelFootprint
from specdec.planning.peak_memory import LiveStorages
from specdec.quant.checkpoints import config_folder, named_errors, read_config, take_settings
from specdec.quant.config import METHOD, Int4Config
from specdec.quant.cpu import OP_GROUP_SIZES, CpuKernel, TorchKernel, row_order
from specdec.quant.experts import PROJECTIONS
from specdec.quant.formats import FP8, scheme_of
from specdec.quant.formats.layer import Scheme
from specdec.quant.heads import head_name
from specdec.quant.int4 import Int4Tensor
from specdec.quant.int8 import tile_rows
from specdec.quant.layers import layers_to_quantize, linear_layers, shape_of
from specdec.quant.linear import TILE_WEIGHTS
from specdec.runtime.kv_cache.masks import attention_kinds, attention_masks
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import cache_argument
from specdec.runtime.runner import SCORE_BYTES, context_of
from specdec.runtime.support import LINEAR_KINDS

MXFP4_GROUP = 32
MXFP4_CODEBOOK_BYTES = 4 * 16
SCORES_WITH_SINKS = 4  # copies in the model's dtype: scores, these and sinks, their softmax, its scores alone
MEASURED_POSITIONS = 16  # of the forwards on meta
MEASURING_ATTENTION = "specdec_planning"  # replaces attention in transformers' AttentionInterface


def measure_footprint(
    model: str | Path | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    group_size: int = 128,
) -> ModelFootprint:
    """Measure a model on meta, from a folder, a hub id (only its config is fetched) or a config.

    dtype: of all but 4-bit weights. device: "cuda", with the Triton kernels, or "cpu", with its own where they have
    been built.
    group_size: of 4-bit weights, unless the checkpoint is in four bits already. An fp8 checkpoint is measured as the
    copy in full precision that it is loaded from. Raises ValueError, naming the model, where there is no config, where
    no model can be made of it, and for models whose cache holds more than keys and values by position.
    """
    config, settings, name = _read_config(model)
    with named_errors(f"no memory can be planned for {name}"):
        return _measure(config, settings, name, dtype, device, group_size)


def measure_draft_footprint(
    path: str,
    target: str | Path | PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    group_size: int = 128,
) -> ModelFootprint:
    """Measure a draft model or a draft head on meta, for the target of this config; see measure_footprint.

    path: a folder or hub id, "mtp" for the MTP layer in the target's own checkpoint.
    """
    target_config, _, _ = _read_config(target)
    with named_errors(f"no memory can be planned for {path}"):
        if is_head(path, target_config):
            return footprint_of_head(make_head(path, target_config), path, dtype, device, group_size)
    return measure_footprint(path, dtype=dtype, device=device, group_size=group_size)


def footprint_of_head(
    head: DraftHead, name: str, dtype: torch.dtype, device: str, group_size: int = 128
) -> ModelFootprint:
    """Measure a draft head on meta. What it shares with the target is not counted."""
    settings, config = head.settings, copy.deepcopy(head.config)  # measuring replaces its attention
    with torch.device("meta"):
        skeleton: Any = type(head)(config, settings)
        own: Any = type(head)(config, settings, head.owns_embedding, head.owns_output)
    skeleton.to(dtype)
    own.to(dtype)
    plain_bytes = sum(tensor.nbytes for tensor in own.parameters())
    saved_bytes, tile_weights, head_tile_weights = _quantized(own, None, group_size, device)
    own_states = config.hidden_size if head.keeps_states else 0
    return ModelFootprint(
        name=name,
        dtype=dtype,
        device=device,
        plain_bytes=plain_bytes,
        int4_bytes=None if saved_bytes is None else plain_bytes - saved_bytes,
        checkpoint_method=None,
        vocab_size=int(config.vocab_size),
        context=context_of(skeleton),
        has_kernels=(dtype in cpu.DTYPES and cpu.load()) if device == "cpu" else dtype in DTYPES,
        num_masks=1,
        tile_weights=tile_weights,
        head_tile_weights=head_tile_weights,
        keeps_last_logits=True,
        feature_width=len(settings.feature_layers) * settings.target_hidden_size + own_states,
        **_measured_forward(skeleton, config, attention_kinds(config)),
    )


def _measure(
    config: Any, settings: dict[str, Any] | None, name: str, dtype: torch.dtype, device: str, group_size: int
) -> ModelFootprint:
    text = config.get_text_config(decoder=True)
    kinds = attention_kinds(text)
    if config.is_encoder_decoder:
        raise ValueError("it is an encoder-decoder model; only decoders can be planned")
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    if kinds - LINEAR_KINDS or skeleton._is_stateful:
        raise ValueError("it has layers that keep more than keys and values by position; only attention can be planned")
    plain_bytes = sum(tensor.nbytes for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    method = None if settings is None else settings.get("quant_method")
    saved_bytes, tile_weights, head_tile_weights = _quantized(skeleton, settings, group_size, device)
    return ModelFootprint(
        name=name,
        dtype=dtype,
        device=device,
        plain_bytes=plain_bytes,
        int4_bytes=None if saved_bytes is None else plain_bytes - saved_bytes,
        checkpoint_method=method,
        vocab_size=int(text.vocab_size),
        context=context_of(skeleton),
        has_kernels=(dtype in cpu.DTYPES and cpu.load()) if device == "cpu" else dtype in DTYPES,
        num_masks=len(kinds),
        tile_weights=tile_weights,
        head_tile_weights=head_tile_weights,
        keeps_last_logits="logits_to_keep" in inspect.signature(skeleton.forward).parameters,
        expert_bytes=0 if method == "mxfp4" else sum(value.nbytes for value in _experts(skeleton)),
        **_measured_forward(skeleton, text, kinds),
    )


def _read_config(model: str | Path | PreTrainedConfig) -> tuple[Any, dict[str, Any] | None, str]:
    """A copy of the config without its quantization, the quantization, and the model's name."""
    if isinstance(model, PreTrainedConfig):
        config = copy.deepcopy(model)
        return config, take_settings(config), model.name_or_path or model.model_type
    with named_errors(f"no config could be read from {str(model)!r}"):
        config, settings, _ = read_config(config_folder(model))
        return config, settings, str(model)


# Weights in four bits


def _quantized(
    skeleton: Any, settings: dict[str, Any] | None, group_size: int, device: str
) -> tuple[int | None, int, int]:
    """Bytes that quantization saves, None where no layer can be in four bits; and the number of weights of the largest
    tile of a 4-bit layer, and of an 8-bit head.
    """
    method = None if settings is None else settings.get("quant_method")
    if method == FP8:  # loaded from its copy in full precision
        settings = None
    if method == "mxfp4":
        return _saved_by_mxfp4(skeleton), 0, 0
    config, ignored, scheme = Int4Config(group_size), [], None
    if settings is not None and method == METHOD:
        config = Int4Config.from_dict(settings)
    elif settings is not None:
        scheme = scheme_of(settings)
        config = Int4Config(
            scheme.group_sizes[0], scheme.symmetric, head="int4" if method == "compressed-tensors" else None
        )
        ignored = [*(settings.get("modules_to_not_convert") or ()), *(settings.get("ignore") or ())]
    try:
        names = layers_to_quantize(skeleton, config)
    except ValueError:  # no layer can be
        return None, 0, 0
    layers, has_kernels = linear_layers(skeleton), device == "cpu" and cpu.load()
    head = head_name(skeleton)
    ignored_names = [str(pattern).removeprefix("re:") for pattern in ignored]
    saved_bytes = tile_weights = head_tile_weights = 0
    for name in names:
        groups = (config.group_size, config.symmetric) if scheme is None else _groups_of(scheme, name)
        if groups is not None and should_convert_module(name, ignored_names):
            rows, columns = shape_of(layers[name])
            if name == head and config.head == "int8":
                saved_bytes += layers[name].weight.nbytes - rows * (columns + torch.bfloat16.itemsize)
                if device == "cpu" and not has_kernels:
                    head_tile_weights = columns * min(rows, tile_rows(columns))
                continue
            saved_bytes += layers[name].weight.nbytes - _int4_bytes(rows, columns, *groups, device, has_kernels)
            if not has_kernels:
                tile_weights = max(tile_weights, columns * min(rows, max(64, TILE_WEIGHTS // columns // 64 * 64)))
    return saved_bytes, tile_weights, head_tile_weights


def _saved_by_mxfp4(skeleton: Any) -> int:
    """Bytes that four bits save in the experts: half a byte a weight, one byte of scale a group, a codebook."""
    experts = _experts(skeleton)
    int4_bytes: int = sum(value.numel() // 2 + value.numel() // MXFP4_GROUP + MXFP4_CODEBOOK_BYTES for value in experts)
    plain_bytes: int = sum(value.nbytes for value in experts)
    return plain_bytes - int4_bytes


def _experts(skeleton: Any) -> list[Tensor]:
    """The weights of experts that are in one tensor for all, [E, N, K] or [E, K, N]."""
    return [value for name, value in skeleton.named_parameters() if value.ndim == 3 and name.endswith(PROJECTIONS)]


def _groups_of(scheme: Scheme, name: str) -> tuple[int, bool] | None:
    """The group size and symmetry of a checkpoint's layer, None where it is not in four bits."""
    layer = scheme.for_layer(name)
    return None if layer is None or layer.bits != 4 else (layer.group_sizes[0], layer.symmetric)


@functools.cache
def _int4_bytes(rows: int, columns: int, group_size: int, symmetric: bool, device: str, has_kernels: bool) -> int:
    """A 4-bit weight [N, K] after its first forward: the kernel's codes and scales, and the canonical scales.

    has_kernels: the CPU kernels have been built.
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
            kernel: CpuKernel | TorchKernel = CpuKernel(int4, int8_inputs=True)
            codes = [kernel.weight, kernel.scale]
        elif device == "cpu" and op_size is not None:
            kernel = TorchKernel(int4, op_size)
            codes = [kernel.weight, kernel.scale]
        elif device != "cpu" and (packed := w4a16.prepack(int4.codes(), scale, zero)) is not None:
            codes = [packed.tiles, packed.scale]
    return sum(tensor.nbytes for tensor in (*codes, scale, zero) if tensor is not None)


# A forward on meta


@dataclass(frozen=True)
class _Forward:
    """One forward on meta. calls: (query heads, key heads, key width, value width) of each attention call.

    peak_bytes: the most it held, without weights, masks and cache. attention_bytes: the most when attention was called.
    has_sinks: attention normalizes with a learned score of each head besides. buffers: each layer's keys and values.
    """

    peak_bytes: float
    attention_bytes: float
    calls: list[tuple[int, int, int, int]]
    has_sinks: bool
    buffers: list[tuple[Tensor, Tensor]]


def _measured_forward(skeleton: Any, text: PreTrainedConfig, kinds: set[str]) -> dict[str, Any]:
    """The fields of a footprint that two forwards on meta show, the second with twice the slots.

    In bfloat16, since mixtures of experts run in nothing else on meta; bytes are scaled to the model's dtype.
    """
    scale = skeleton.dtype.itemsize / 2
    body, implementation = skeleton.to(torch.bfloat16).base_model, text._attn_implementation
    width = min(MEASURED_POSITIONS, (context_of(skeleton) or 2 * MEASURED_POSITIONS) // 2)
    forwards = [_forward_on_meta(skeleton, body, text, kinds, width, slots) for slots in (width, 2 * width)]
    calls, buffers = forwards[0].calls, forwards[0].buffers
    layers = tuple((keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in buffers)
    peaks = [scale * forward.peak_bytes for forward in forwards]
    attention = [scale * forward.attention_bytes for forward in forwards]
    is_eager = implementation == "eager" or not calls
    if (
        not calls
    ):  # attention of the model's own: its scores are in the peak, and stay there as those of a square window
        peaks = attention = [peaks[0]] * 2
        calls = [(int(text.num_attention_heads), *layers[0])]
    heads, kv_heads, key_width, value_width = map(max, zip(*calls, strict=True))
    position_bytes, slot_bytes = _by_position_and_slot(peaks, width)
    attention_position_bytes, attention_slot_bytes = _by_position_and_slot(attention, width)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "key_width": key_width,
        "value_width": value_width,
        "position_bytes": position_bytes,
        "slot_bytes": slot_bytes,
        "attention_position_bytes": attention_position_bytes,
        "attention_slot_bytes": attention_slot_bytes,
        "layers": layers,
        "is_eager": is_eager,
        "score_bytes": SCORES_WITH_SINKS * int(2 * scale) if forwards[0].has_sinks else SCORE_BYTES,
    }


@torch.inference_mode()
def _forward_on_meta(
    skeleton: Any, body: Any, text: PreTrainedConfig, kinds: set[str], width: int, slots: int
) -> _Forward:
    """Run a window [1, W] over S slots, with an attention that returns its result's shape and holds nothing."""
    live = LiveStorages()
    calls: list[tuple[int, int, int, int]] = []
    bytes_at_calls: list[int] = []
    sinks: list[Any] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        calls.append((query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
        bytes_at_calls.append(live.bytes)
        sinks.append(kwargs.get("s_aux"))
        return query.new_empty(1, width, query.shape[1], value.shape[3]), None

    AttentionInterface.register(MEASURING_ATTENTION, attention)
    text._attn_implementation = MEASURING_ATTENTION
    with torch.device("meta"):
        cache, ids = RaggedCache(), torch.zeros(1, width, dtype=torch.int64)
        window = cache.window
        window.rows, window.positions, window.first = ids[:, :1], ids, slots - width
        window.end = window.key_length = slots
        masks = attention_masks(ids, slots, text, kinds, torch.bool)
        parameters = inspect.signature(body.forward).parameters
        inputs = {"input_ids": ids, "attention_mask": masks, "use_cache": True, cache_argument(parameters): cache}
        if "position_ids" in parameters:
            inputs["position_ids"] = ids
        body(**inputs)  # makes the cache's buffers
        buffers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore
        for tensor in (*skeleton.parameters(), *skeleton.buffers(), *tree_leaves((masks, buffers)), ids):
            live.add(tensor)
        held = live.bytes
        bytes_at_calls.clear()
        with live:
            body(**inputs)
    has_sinks = any(values is not None for values in sinks)
    return _Forward(live.peak_bytes - held, max(bytes_at_calls, default=held) - held, calls, has_sinks, buffers)


def _by_position_and_slot(held_bytes: list[float], width: int) -> tuple[float, float]:
    """Bytes at W slots and at 2 W -> bytes by position of the window, by slot."""
    by_slot = (held_bytes[1] - held_bytes[0]) / width
    return held_bytes[0] / width - by_slot, by_slot
