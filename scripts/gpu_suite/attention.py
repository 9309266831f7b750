"""Attention of a decoding window over the KV cache: against float64, then times against sdpa."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from specdec_kernels.attention import attention as attention_op
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gpu_suite.checking import check_case, max_relative_error
from gpu_suite.rows import goal, timing_row
from gpu_suite.suite import Row, Section, Suite

MAX_CHECKED_SLOTS = 1 << 17  # of all rows, in the float64 reference


def attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """The op as a model calls it; without a GPU the interpreted kernel."""
    if query.is_cuda:
        return attention_op(query, key, value, first, last, scale)
    from specdec_kernels.attention import kernel

    return kernel.launch(query, key, value, first, last, scale)


def random_states(suite: Suite, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, W, D], key and value [B, H_kv, S, D], with the strides that a model gives them."""
    heads, kv_heads, dim = suite.sizes.heads
    options = {"device": suite.device, "dtype": suite.dtype}
    query = torch.randn(batch, suite.sizes.width, heads, dim, **options).transpose(1, 2)
    return query, torch.randn(batch, kv_heads, keys, dim, **options), torch.randn(batch, kv_heads, keys, dim, **options)


def reference(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """The formula in float64, one row of the batch at a time: [B, W, H, D]."""
    rows = []
    for q, k, v, low, high in zip(query, key, value, first, last, strict=True):
        slot = torch.arange(int(low.min()), int(high.max()) + 1, device=k.device)
        visible = (slot >= low[:, None]) & (slot <= high[:, None])
        scores = q.double().unflatten(0, (len(k), -1)) @ k[:, None, slot].double().transpose(2, 3) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        rows.append((weights @ v[:, None, slot].double()).flatten(0, 1).transpose(0, 1))
    return torch.stack(rows)


def check(suite: Suite) -> list[Row]:
    """Ragged rows, every second with a sliding window; a query has the same bits alone, over its slots, in any row."""
    width = suite.sizes.width

    def make_inputs(batch: int, keys: int) -> tuple:
        query, key, value = random_states(suite, batch, keys)
        start = torch.randint(keys // 2, keys - width + 1, (batch, 1), device=suite.device)
        last = (start + torch.arange(width, device=suite.device)).int()
        first = (last - keys // 4) * (torch.arange(batch, device=suite.device) % 2)[:, None].int()
        slot = torch.arange(keys, device=suite.device)
        hidden = (slot < first.amin(1, keepdim=True)) | (slot > last.amax(1, keepdim=True))
        for state in (key, value):
            state.masked_fill_(hidden[:, None, :, None], torch.nan)
        return query, key, value, first, last, query.shape[-1] ** -0.5

    def same_bits(result: Tensor, *inputs: Any) -> bool:
        query, key, value, first, last, scale = inputs
        same = attention(*(tensor.roll(1, 0) for tensor in inputs[:-1]), scale).equal(result.roll(1, 0))
        for b in {0, len(query) - 1}:
            for w in range(width):
                row, one, slots = slice(b, b + 1), slice(w, w + 1), slice(int(last[b, w]) + 1)
                alone = query[row, :, one], key[row, :, slots], value[row, :, slots], first[row, one], last[row, one]
                same &= attention(*alone, scale).equal(result[row, one])
        return same

    bound = 2 * torch.finfo(suite.dtype).eps  # the weights are rounded too before they are multiplied
    cases = [(b, s) for b in suite.sizes.attention_batches for s in suite.sizes.keys if b * s <= MAX_CHECKED_SLOTS]
    return [
        check_case(
            suite,
            "attention",
            f"batch {b}, {s} keys",
            partial(make_inputs, b, s),
            attention,
            reference,
            same_bits,
            max_relative_error,
            bound,
        )
        for b, s in cases
    ]


def time_window(suite: Suite, batch: int, keys: int) -> Row:
    """The last positions of full rows, against sdpa with a mask: as transformers calls it, and with grouped heads."""
    heads, kv_heads, dim = suite.sizes.heads
    num_bytes = 2 * batch * kv_heads * keys * dim * suite.dtype.itemsize
    copies = [random_states(suite, batch, keys) for _ in range(suite.num_copies(num_bytes))]
    last = torch.arange(keys - suite.sizes.width, keys, dtype=torch.int32, device=suite.device).repeat(batch, 1)
    first = torch.zeros_like(last)
    mask = (torch.arange(keys, device=suite.device) <= last[..., None])[:, None]
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
    grouped = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    candidates = {
        "attention": [partial(attention, *states, first, last, dim**-0.5) for states in copies],
        "sdpa": [partial(sdpa_attention_forward, module, *states, mask) for states in copies],
        "sdpa_gqa": [partial(grouped, *states) for states in copies],
    }
    return timing_row(suite, suite.timer.measure(candidates), num_bytes, batch=batch, keys=keys)


@torch.inference_mode()
def run(suite: Suite) -> Row:
    results = []
    for batch in suite.sizes.attention_batches:
        for keys in suite.sizes.keys:
            results.append(time_window(suite, batch, keys))
            suite.empty_cache()
    text = "within 1.2 of the time that K and V take once, 8k keys"
    at_goal = [row for row in results if row["keys"] == suite.sizes.goal_keys]
    goals = [goal(text, "ratio_to_bandwidth", max, 1.2, [row]) for row in at_goal]
    return {"bandwidth": suite.bandwidth, "results": results, "goals": goals}


SECTION = Section("attention", run, check)
