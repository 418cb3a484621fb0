"""The quantised attention on a Hopper GPU: operands laid out by Triton kernels, and the launch.

Owns what runs on a CUDA device (compute capability 9.0) only; what it computes is defined, in
PyTorch, in `quantised_attention`, its only caller. The attention itself is
`attention_fp8_hopper.cu`, loaded and launched by `hopper`.

Operands lie as that kernel's shared memory wants them, so that a block is copied in one piece: rows
of 128 bytes (a head_dim below 128 is filled up with zeros) whose 16-byte pieces are swizzled, piece
c of row r at place c ^ (r % 8). Shapes: G = batch * heads; T blocks of 128 keys; P queries, filled
up to whole groups of 64.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan_model.hopper import Kernel

if TYPE_CHECKING:
    from wan_model.quantised_attention import Means

MAX_HEAD_DIM = 128
KEYS = 128  # with one scale, and one block of the kernel
QUERIES = 64  # of a group of warps
GROUPS, STAGES = 3, 4  # as in attention_fp8_hopper.cu
CHANNELS = MAX_HEAD_DIM + 8  # of the values: the last 8 are 1 for a key that there is
SHARED_BYTES = GROUPS * QUERIES * 128 + STAGES * (KEYS + CHANNELS) * 128 + 8 * (1 + 4 * STAGES)
KERNEL = Kernel(
    who="attention backend fp8", file="attention_fp8_hopper.cu", name="quantised_attention",
    num_threads=128 * (GROUPS + 1), shared_bytes=SHARED_BYTES,
)  # fmt: skip

INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(1e-6)


@triton.jit
def _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H: tl.constexpr, D: tl.constexpr):
    """Some rows of one head of x [B, L, H, D], float32 [rows, 128], and which of them there are.

    Rows and channels that are not there are 0.
    """
    program = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, 128)[None, :]
    inside = (rows < num_rows)[:, None]
    start = x + (program // H) * stride_b + (program % H) * stride_h
    at = rows[:, None].to(tl.int64) * stride_l + cols
    return tl.load(start + at, mask=inside & (cols < D), other=0.0).to(tl.float32), inside


@triton.jit
def _per_channel(x, D: tl.constexpr, other: tl.constexpr):
    cols = tl.arange(0, 128)
    x += tl.program_id(1).to(tl.int64) * D
    return tl.load(x + cols, mask=cols < D, other=other)[None, :]


@triton.jit
def _store_swizzled(out, value, ROWS: tl.constexpr):
    """Rows [ROWS, 128] of bytes: the pieces of 16 to their places."""
    row = tl.arange(0, ROWS)[:, None, None]
    piece = tl.arange(0, 8)[None, :, None] ^ (row % 8)
    at = row * 128 + piece * 16 + tl.arange(0, 16)[None, None, :]
    tl.store(out + at, tl.reshape(value, [ROWS, 8, 16]))


@triton.jit
def _int8_kernel(
    x, mean, out, out_scale, stride_b, stride_l, stride_h, num_rows, factor,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, IS_KEYS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    within = tl.arange(0, ROWS)
    rows = tl.program_id(0) * ROWS + within
    value, inside = _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H, D)
    if IS_KEYS:
        value = tl.where(inside, value - _per_channel(mean, D, 0.0), 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), TINY) / INT8_MAX
        tl.store(out_scale + block, scale)
        value = value * (1.0 / scale)
    else:
        scale = tl.maximum(tl.max(tl.abs(value), 1), TINY) / INT8_MAX
        tl.store(out_scale + block * ROWS + within, scale * factor)
        value = value * (1.0 / scale)[:, None]
    _store_swizzled(out + block * ROWS * 128, tl.floor(value + 0.5).to(tl.int8), ROWS)


@triton.jit
def _values_kernel(
    x, mean, scale, out, stride_b, stride_l, stride_h, num_rows,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """To fp8: a row is a channel, its keys in the order in which a thread holds probabilities."""
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    place = tl.arange(0, ROWS)
    key = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    rows = tl.program_id(0) * ROWS + key
    value, inside = _rows_of(x, stride_b, stride_l, stride_h, num_rows, rows, H, D)
    value = (value - _per_channel(mean, D, 0.0)) * (1.0 / _per_channel(scale, D, 1.0))
    value = tl.where(inside, tl.minimum(tl.maximum(value, -FP8_MAX), FP8_MAX), 0.0)
    out += block * CHANNELS * 128
    _store_swizzled(out, tl.trans(value.to(tl.float8e4nv)), 128)
    ones = tl.broadcast_to(tl.where(rows < num_rows, 1.0, 0.0)[None, :], [8, ROWS])
    _store_swizzled(out + 128 * 128, ones.to(tl.float8e4nv), 8)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """q int8 [G, P, 128], scale [G, P]; k int8 [G, T, 128, 128], scale [G, T]; v fp8 [G, T, 136,
    128]. The queries' scales hold log2(e) / sqrt(D) too."""

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor


def lay_out(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, means: Means) -> Operands:
    """Quantise. D must lie together in all three; ValueError for a head_dim the kernel lacks."""
    b, num_queries, h, d = q_BLHD.shape
    num_keys = k_BSHD.shape[1]
    if d > MAX_HEAD_DIM or d % 2:
        raise ValueError(
            f"attention backend fp8 knows an even head_dim up to {MAX_HEAD_DIM}, not {d}:"
            " use another one"
        )
    groups, blocks = triton.cdiv(num_queries, QUERIES), triton.cdiv(num_keys, KEYS)
    new = functools.partial(q_BLHD.new_empty, dtype=torch.int8)
    made = Operands(
        q=new((b * h, groups * QUERIES, 128)),
        q_scale=new((b * h, groups * QUERIES), dtype=torch.float32),
        k=new((b * h, blocks, KEYS, 128)),
        k_scale=new((b * h, blocks), dtype=torch.float32),
        v=new((b * h, blocks, CHANNELS, 128), dtype=torch.float8_e4m3fn),
    )
    mean_k, mean_v, v_scale = (x.contiguous() for x in (means.k, means.v, means.v_scale))
    to_log2 = math.log2(math.e) / math.sqrt(d)
    with torch.cuda.device_of(q_BLHD):
        _int8_kernel[(groups, b * h)](
            q_BLHD, mean_k, made.q, made.q_scale, *q_BLHD.stride()[:3], num_queries, to_log2,
            H=h, D=d, ROWS=QUERIES, IS_KEYS=False, num_warps=8,
        )  # fmt: skip
        _int8_kernel[(blocks, b * h)](
            k_BSHD, mean_k, made.k, made.k_scale, *k_BSHD.stride()[:3], num_keys, 1.0,
            H=h, D=d, ROWS=KEYS, IS_KEYS=True, num_warps=8,
        )  # fmt: skip
        _values_kernel[(blocks, b * h)](
            v_BSHD, mean_v, v_scale, made.v, *v_BSHD.stride()[:3], num_keys,
            H=h, D=d, ROWS=KEYS, CHANNELS=CHANNELS,
        )  # fmt: skip
    return made


def quantised_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, means: Means) -> Tensor:
    """`quantised_attention.quantised_attention` on a GPU; rounded to bfloat16.

    Raises ValueError for another GPU than Hopper's and for a head_dim the kernel lacks.
    """
    if torch.cuda.get_device_capability(q_BLHD.device) != (9, 0):
        raise ValueError(
            "attention backend fp8 needs a Hopper GPU (compute capability 9.0): use another one"
        )
    operands = lay_out(q_BLHD, k_BSHD, v_BSHD, means)
    b, num_queries, h, d = q_BLHD.shape
    padded_queries, num_blocks = operands.q.shape[1], operands.k.shape[1]
    v_scale, v_mean = means.v_scale.contiguous(), means.v.contiguous()
    out = q_BLHD.new_empty((b, num_queries, h, d), dtype=torch.bfloat16)
    tensors = (
        operands.q, operands.k, operands.v, operands.q_scale, operands.k_scale, v_scale, v_mean,
        out,
    )  # fmt: skip
    numbers = (num_queries, padded_queries, num_blocks, h, d)
    with torch.cuda.device_of(q_BLHD):
        KERNEL.launch(
            (triton.cdiv(padded_queries, GROUPS * QUERIES), b * h),
            (*(x.data_ptr() for x in tensors), *numbers),
            (*(ctypes.c_void_p for _ in tensors), *(ctypes.c_int for _ in numbers)),
        )
    return out.to(q_BLHD.dtype)
