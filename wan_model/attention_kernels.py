"""Triton kernels of the quantised attention.

Owns what runs on a CUDA device (compute capability 9.0) only; what they compute is defined, in
PyTorch, in `quantised_attention`, their only caller.

Two tricks save work that the tensor cores would wait for. The int32 products start at the bits of
1.5 * 2^23, so that the sum's bits, read as a float32, are 1.5 * 2^23 + sum: no conversion (|sum| <=
127^2 * 128 < 2^22). And the keys of the values are in another order, in each 16, so that a thread's
probabilities are already where the second product wants them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from wan_model.quantised_attention import Means

BLOCK = 128  # rows that are quantised at once; keys with one scale
QUERIES = 64  # of a program; with these and 4 warps the fastest of 14 tried on an H200
HEAD_DIMS = (32, 64, 128)

MAGIC = tl.constexpr(0x4B400000)  # the bits of MAGIC_FLOAT
MAGIC_FLOAT = tl.constexpr(12582912.0)
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
PROBABILITY_BITS = tl.constexpr(8.0)
TINY = tl.constexpr(1e-6)


@triton.jit
def _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H: tl.constexpr, D: tl.constexpr):
    """Some rows of one head of x [B, L, H, D] in float32, and which of them there are."""
    program = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, D)
    inside = (rows < num_rows)[:, None]
    start = x + (program // H) * stride_b + (program % H) * stride_h
    at = rows[:, None].to(tl.int64) * stride_l + cols[None, :]
    return tl.load(start + at, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _int8_kernel(
    x, mean, out, out_scale, stride_b, stride_l, stride_h, num_rows, factor,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, D)
    value, inside = _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H, D)
    padded = tl.num_programs(0) * BLOCK
    if IS_KEYS:
        value = tl.where(inside, value - tl.load(mean + program * D + cols)[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), TINY) / INT8_MAX
        tl.store(out_scale + program * tl.num_programs(0) + tl.program_id(0), scale)
        value = value / scale
    else:
        scale = tl.maximum(tl.max(tl.abs(value), 1), TINY) / INT8_MAX
        tl.store(out_scale + program * padded + rows, scale * factor)
        value = value / scale[:, None]
    at = (program * padded + rows[:, None]) * D + cols[None, :]
    tl.store(out + at, tl.floor(value + 0.5).to(tl.int8))


@triton.jit
def _values_kernel(
    x, mean, scale, out, stride_b, stride_l, stride_h, num_rows,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """To fp8 [B, H, D, P]: the keys of a channel lie together, in the order of `_tile`."""
    program = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    key = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    rows = tl.program_id(0) * BLOCK + key
    cols = tl.arange(0, D)
    value, inside = _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H, D)
    value = value - tl.load(mean + program * D + cols)[None, :]
    value = tl.where(inside, value / tl.load(scale + program * D + cols)[None, :], 0.0)
    value = tl.minimum(tl.maximum(value, -FP8_MAX), FP8_MAX)
    padded = tl.num_programs(0) * BLOCK
    at = (program * D + cols[:, None]) * padded + tl.program_id(0) * BLOCK + place[None, :]
    tl.store(out + at, tl.trans(value.to(tl.float8e4nv)))


@triton.jit
def _tile(
    q, k, v, out, highest, total, scale, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """One block of keys; scores in powers of two. `out` [M, D] grows by the block's share."""
    sums = tl.dot(q, k.T, tl.full([M, N], MAGIC, tl.int32), out_dtype=tl.int32)
    shifted = sums.to(tl.float32, bitcast=True)
    before = highest
    highest = tl.maximum(before, (tl.max(shifted, 1) - MAGIC_FLOAT) * scale)
    shrink = tl.math.exp2(before - highest)
    offset = highest + MAGIC_FLOAT * scale - PROBABILITY_BITS
    p = tl.math.exp2(shifted * scale[:, None] - offset[:, None])
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None]
    p = tl.reshape(p.to(tl.float8e4nv), [M, N // 16, 2, 4, 2])
    p = tl.reshape(tl.permute(p, [0, 1, 3, 2, 4]), [M, N])
    return tl.dot(p, v.T, out), highest, total


@triton.jit
def _attention_kernel(
    q_rows, k_rows, v_columns, q_scale, k_scale, v_scale, v_mean, out,
    num_queries, num_keys, stride_b, stride_l, stride_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    first_query = program * (tl.cdiv(num_queries, BLOCK) * BLOCK)
    num_blocks = tl.cdiv(num_keys, BLOCK)
    first_key = program * num_blocks * BLOCK
    q = q_rows.load([first_query + tl.program_id(0) * M, 0])
    row_scale = tl.load(q_scale + first_query + rows)
    highest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, D], tl.float32)
    for i in range(num_blocks):
        k = k_rows.load([first_key + i * BLOCK, 0])
        v = v_columns.load([program * D, i * BLOCK])
        scale = row_scale * tl.load(k_scale + program * num_blocks + i)
        sums, highest, total = _tile(q, k, v, sums, highest, total, scale, M, BLOCK)
    # The keys that fill up the last block are 0, and so are their scores and their values.
    num_filled = num_blocks * BLOCK - num_keys
    total -= num_filled * tl.math.exp2(PROBABILITY_BITS - highest)
    cols = tl.arange(0, D)
    value = sums / total[:, None] * tl.load(v_scale + program * D + cols)[None, :]
    value += tl.load(v_mean + program * D + cols)[None, :]
    sample, head = (program // H).to(tl.int64), program % H
    at = rows[:, None].to(tl.int64) * stride_l + cols[None, :]
    start = out + sample * stride_b + head * stride_h
    tl.store(start + at, value.to(out.dtype.element_ty), mask=(rows < num_queries)[:, None])


def quantised_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, means: Means) -> Tensor:
    """`quantised_attention.quantised_attention`. D must lie together in all three.

    Raises ValueError for a head_dim that is not in HEAD_DIMS.
    """
    b, num_queries, h, d = q_BLHD.shape
    num_keys = k_BSHD.shape[1]
    if d not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"attention backend fp8 knows head_dim {known}, not {d}: use another one")
    query_blocks, key_blocks = triton.cdiv(num_queries, BLOCK), triton.cdiv(num_keys, BLOCK)
    q = q_BLHD.new_empty((b * h * query_blocks * BLOCK, d), dtype=torch.int8)
    k = q.new_empty((b * h * key_blocks * BLOCK, d))
    v = q.new_empty((b * h * d, key_blocks * BLOCK), dtype=torch.float8_e4m3fn)
    q_scale = q.new_empty(q.shape[0], dtype=torch.float32)
    k_scale = q.new_empty(b * h * key_blocks, dtype=torch.float32)
    out = torch.empty((b, num_queries, h, d), dtype=q_BLHD.dtype, device=q.device)
    mean_k, mean_v, v_scale = (x.contiguous() for x in (means.k, means.v, means.v_scale))
    shape = {"H": h, "D": d, "BLOCK": BLOCK}
    to_log2 = math.log2(math.e) / math.sqrt(d)
    with torch.cuda.device_of(q):
        _int8_kernel[(query_blocks, b * h)](
            q_BLHD, mean_k, q, q_scale, *q_BLHD.stride()[:3], num_queries, to_log2,
            IS_KEYS=False, **shape,
        )  # fmt: skip
        _int8_kernel[(key_blocks, b * h)](
            k_BSHD, mean_k, k, k_scale, *k_BSHD.stride()[:3], num_keys, 1.0,
            IS_KEYS=True, **shape,
        )  # fmt: skip
        _values_kernel[(key_blocks, b * h)](
            v_BSHD, mean_v, v_scale, v, *v_BSHD.stride()[:3], num_keys, **shape
        )
        _attention_kernel[(triton.cdiv(num_queries, QUERIES), b * h)](
            TensorDescriptor.from_tensor(q, [QUERIES, d]),
            TensorDescriptor.from_tensor(k, [BLOCK, d]),
            TensorDescriptor.from_tensor(v, [d, BLOCK]),
            q_scale, k_scale, v_scale, mean_v, out,
            num_queries, num_keys, *out.stride()[:3],
            M=QUERIES, num_warps=4, num_stages=2, maxnreg=168, **shape,
        )  # fmt: skip
    return out
