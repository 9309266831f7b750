"""Attention of a verification window over a ragged KV cache: split over the keys, summed in the order of the keys."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.configuration import Configuration, interpreting
from specdec_kernels.counters import counters

ROWS = 32  # (query, query head) pairs of one key head in a block, for any number of them
CHUNK = 256  # slots that a block reads
GROUP = 16  # chunks that are summed together
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Triton compiles no variants for values of these: a window of one position runs the same code as any other.
UNSPECIALIZED = ["first_row", "last_row", "width", "heads_per_key", "kv_heads", "length"]
INTERVALS = ["first_ptr", "last_ptr"]  # rows of one tensor, at any address
STRIDES = ["q_batch", "q_head", "q_query", "k_batch", "k_head", "k_slot", "v_batch", "v_head", "v_slot"]


@triton.jit
def _store_part(max_ptr, sum_ptr, acc_ptr, part, rows, row, value_dim, maximum, total, acc, DV: tl.constexpr):
    """Store a block's partial results for its rows in one part of the scratch."""
    at = part * rows
    is_row = row < rows
    tl.store(max_ptr + at + row, maximum, mask=is_row)
    tl.store(sum_ptr + at + row, total, mask=is_row)
    mask = is_row[:, None] & (value_dim < DV)[None, :]
    tl.store(acc_ptr + at * DV + row[:, None] * DV + value_dim[None, :], acc, mask=mask)


@triton.jit
def _is_last(counter, count):
    """Whether this is the last of `count` blocks, which can read the others' stores; the counter is 0 again."""
    tl.debug_barrier()  # all stores of the block precede the counter
    last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _sum_parts(
    max_ptr, sum_ptr, acc_ptr, base, begin, end, rows, row, value_dim,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum parts base + begin … base + end - 1 of the scratch in order: -> maximum, sum [ROWS], acc [ROWS, BLOCK_DV]."""
    is_row = row < rows
    mask = is_row[:, None] & (value_dim < DV)[None, :]
    offset = row[:, None] * DV + value_dim[None, :]
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for index in tl.range(begin, end, num_stages=3):  # stages: the next parts are prefetched
        at = (base + index) * rows
        # .cg reads from L2, where the other blocks' stores are
        part_max = tl.load(max_ptr + at + row, mask=is_row, other=float("-inf"), cache_modifier=".cg")
        part_total = tl.load(sum_ptr + at + row, mask=is_row, other=0.0, cache_modifier=".cg")
        part_acc = tl.load(acc_ptr + at * DV + offset, mask=mask, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(maximum, part_max)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        rescale = tl.exp2(maximum - shift)
        part_rescale = tl.exp2(part_max - shift)
        total = total * rescale + part_total * part_rescale
        acc = acc * rescale[:, None] + part_acc * part_rescale[:, None]
        maximum = larger
    return maximum, total, acc


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=INTERVALS)
def _attention_kernel(
    q_ptr,  # [B, H, W, D]; of any strides, the last 1
    k_ptr,  # [B, H', S, D]; of any strides, the last 1
    v_ptr,  # [B, H', S, DV]; of any strides, the last 1
    first_ptr,  # [B, W] int32, the first slot that a query attends to; any stride between rows
    last_ptr,  # [B, W] int32, the last slot; any stride between rows
    out_ptr,  # [B, W, H, DV]
    max_ptr,  # [B * H', P, R] float32 scratch: a part's largest score of each row, times log2 e; R = W * H / H'
    sum_ptr,  # [B * H', P, R] float32 scratch: a part's sum of exp2(score - maximum); P = CHUNKS + GROUPS
    acc_ptr,  # [B * H', P, R, DV] float32 scratch: a part's sum of exp2(score - maximum) * v
    counter_ptr,  # [B * H', ROW_BLOCKS, GROUPS + 1] int32 zeros, reset to zeros
    q_batch, q_head, q_query, k_batch, k_head, k_slot, v_batch, v_head, v_slot,  # strides in elements
    first_row, last_row,
    width,  # W
    heads_per_key,  # H / H'
    kv_heads,  # H'
    length,  # S
    scale,  # of the scores, times log2 e
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """out[b, w, h] = softmax(scale * q[b, h, w] . k[b, h', s] for s = first[b, w] … last[b, w]) @ v[b, h', s], else 0.

    Grid: (ROW_BLOCKS = cdiv(R, ROWS), CHUNKS = cdiv(S, CHUNK), B * H'). Row r of a key head is query r // (H / H') of
    query head h' * H / H' + r % (H / H'). A block computes ROWS rows over one chunk of the slots, KEYS slots at a time,
    and stores its partial results in the scratch. The last block of a group of GROUP chunks sums them in order; the
    last group's block sums the groups. A block whose chunk no row attends to ends at once. Bound by reading K and V
    once, from first to last.

    A row's result does not depend on W, S, the batch or the other rows, bit for bit. Groups, chunks and steps of KEYS
    slots begin at multiples of their lengths, so a row's sums have one order; slots that it does not attend to change
    nothing: the sums are multiplied by exp2(0) = 1, and 0 is added.
    """
    row_block = tl.program_id(0)
    chunk = tl.program_id(1)
    pair = tl.program_id(2)
    b = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)

    rows = width * heads_per_key
    row = row_block * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    query = row // heads_per_key
    first = tl.maximum(tl.load(first_ptr + b * first_row + query, mask=is_row, other=1), 0)
    last = tl.minimum(tl.load(last_ptr + b * last_row + query, mask=is_row, other=0), length - 1)
    has_slots = first <= last
    high = tl.max(tl.where(has_slots, last, -1))
    low = tl.minimum(tl.min(tl.where(has_slots, first, length)), tl.maximum(high, 0))
    low_chunk = low // CHUNK
    high_chunk = tl.maximum(high, 0) // CHUNK  # if no row attends to any slot, the first chunk's block writes zeros

    if (chunk < low_chunk) | (chunk > high_chunk):
        return

    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_DV)
    q_ptr += b * q_batch + kv_head * heads_per_key * q_head
    q_offset = (query * q_query + row % heads_per_key * q_head)[:, None] + dim[None, :]
    q = tl.load(q_ptr + q_offset, mask=is_row[:, None] & (dim < D)[None, :], other=0.0)
    if FLOAT32:
        q = q.to(tl.float32)
    k_ptr += b * k_batch + kv_head * k_head
    v_ptr += b * v_batch + kv_head * v_head
    k_offset = tl.arange(0, KEYS)[None, :] * k_slot + dim[:, None]
    v_offset = tl.arange(0, KEYS)[:, None] * v_slot + value_dim[None, :]
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    # Summed over the keys at the end, since a sum across warps costs barriers
    totals = tl.zeros([ROWS, KEYS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    begin = tl.maximum(low // KEYS * KEYS, chunk * CHUNK)
    end = tl.minimum(high + 1, (chunk + 1) * CHUNK)
    for start in range(begin, end, KEYS):
        slot = start + tl.arange(0, KEYS)
        is_visible = (slot >= low) & (slot <= high)  # other slots are not read: they may be NaN, and NaN times 0 is NaN
        at = tl.cast(start, tl.int64)
        k = tl.load(k_ptr + at * k_slot + k_offset, mask=is_visible[None, :] & (dim < D)[:, None], other=0.0)
        v = tl.load(v_ptr + at * v_slot + v_offset, mask=is_visible[:, None] & (value_dim < DV)[None, :], other=0.0)
        if FLOAT32:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        score = tl.dot(q, k) * scale
        score = tl.where((slot[None, :] >= first[:, None]) & (slot[None, :] <= last[:, None]), score, float("-inf"))
        larger = tl.maximum(maximum, tl.max(score, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf minus -inf is NaN
        rescale = tl.exp2(maximum - shift)
        weight = tl.exp2(score - shift[:, None])
        totals = totals * rescale[:, None] + weight
        acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None])
        maximum = larger

    total = tl.sum(totals, 1)
    groups = tl.cdiv(tl.num_programs(1), GROUP)
    base = pair.to(tl.int64) * (tl.num_programs(1) + groups)
    counter = counter_ptr + (pair * tl.num_programs(0) + row_block) * (groups + 1)
    group = chunk // GROUP
    begin = tl.maximum(group * GROUP, low_chunk)
    end = tl.minimum((group + 1) * GROUP, high_chunk + 1)
    _store_part(max_ptr, sum_ptr, acc_ptr, base + chunk, rows, row, value_dim, maximum, total, acc, DV)
    if not _is_last(counter + group, end - begin):
        return
    maximum, total, acc = _sum_parts(
        max_ptr, sum_ptr, acc_ptr, base, begin, end, rows, row, value_dim, DV, BLOCK_DV, ROWS
    )

    begin = low_chunk // GROUP
    end = high_chunk // GROUP + 1
    if end - begin > 1:
        base += tl.num_programs(1)
        _store_part(max_ptr, sum_ptr, acc_ptr, base + group, rows, row, value_dim, maximum, total, acc, DV)
        if not _is_last(counter + groups, end - begin):
            return
        maximum, total, acc = _sum_parts(
            max_ptr, sum_ptr, acc_ptr, base, begin, end, rows, row, value_dim, DV, BLOCK_DV, ROWS
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # rows without slots: zeros
    out_ptr += (b * width * kv_heads + kv_head) * heads_per_key * DV
    # Computed again: kept in registers it spills
    query = (row.to(tl.uint32) // heads_per_key.to(tl.uint32)).to(tl.int32)
    out_offset = (query * (kv_heads - 1) * heads_per_key + row)[:, None] * DV + value_dim[None, :]
    tl.store(out_ptr + out_offset, acc, mask=is_row[:, None] & (value_dim < DV)[None, :])


@functools.cache
def configuration(dtype: torch.dtype, dim: int, value_dim: int) -> Configuration:
    """The configuration for heads with keys of `dim` and values of `value_dim`, up to 256."""
    type_ = TYPES[dtype]
    block_d, block_dv = (max(triton.next_power_of_2(size), 16) for size in (dim, value_dim))
    wide = max(block_d, block_dv) > 128
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{type_}")
    signature |= dict.fromkeys(("first_ptr", "last_ptr", "counter_ptr"), "*i32")
    signature |= dict.fromkeys(("max_ptr", "sum_ptr", "acc_ptr"), "*fp32")
    return Configuration(
        op="attention",
        name=f"{type_}_d{dim}" if dim == value_dim else f"{type_}_d{dim}_dv{value_dim}",
        kernel=_attention_kernel,
        signature=signature | dict.fromkeys((*STRIDES, *UNSPECIALIZED), "i32") | {"scale": "fp32"},
        constants={
            "D": dim, "DV": value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "ROWS": ROWS, "CHUNK": CHUNK, "GROUP": GROUP, "KEYS": 32 if wide else 64, "FLOAT32": interpreting(),
        },
        divisible=tuple(name for name in (*signature, *STRIDES) if name not in INTERVALS),
        num_warps=8 if wide else 4,
        num_stages=3,
        barriers=6,  # two of them for a row's largest score, as several warps share its keys
        ordered=True,
    )  # fmt: skip


CONFIGURATIONS = [configuration(dtype, dim, dim) for dim in (128, 64, 256) for dtype in TYPES]


def launch(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """Launch the kernel on the arguments of attention(), which has checked them: -> [B, W, H, DV]."""
    batch, heads, width, dim = query.shape
    kv_heads, length, value_dim = value.shape[1:]
    out = torch.empty(batch, width, heads, value_dim, dtype=query.dtype, device=query.device)
    if not out.numel() or not length:
        return out.zero_()
    rows, pairs = width * (heads // kv_heads), batch * kv_heads
    row_blocks, chunks = triton.cdiv(rows, ROWS), triton.cdiv(length, CHUNK)
    groups = triton.cdiv(chunks, GROUP)
    scratch = pairs * (chunks + groups) * rows
    acc, maximum, total = (
        torch.empty(scratch * size, dtype=torch.float32, device=query.device) for size in (value_dim, 1, 1)
    )
    chosen = configuration(query.dtype, dim, value_dim)
    with torch.cuda.device_of(query):
        chosen.kernel[row_blocks, chunks, pairs](
            query, key, value, first, last, out, maximum, total, acc,
            counters(pairs * row_blocks * (groups + 1), query.device),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            first.stride(0), last.stride(0), width, heads // kv_heads, kv_heads, length, scale * math.log2(math.e),
            **chosen.constants, **chosen.options,
        )  # fmt: skip
    return out
