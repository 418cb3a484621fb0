"""Triton kernels for the row-wise work between the matrix products of a block.

Owns what runs on a CUDA device only: each kernel reads a row once, keeps it in registers in float32
and writes the result once. What they compute is defined, in PyTorch, in `row_ops`, their only
caller. Knows nothing about blocks or models.

Shapes: R rows (batch * tokens), D features. A row is cut into D / CHUNK pieces of a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHUNK = 1024
NORM_WARPS = 8  # 4 features a thread: 16 bytes of the float32 stream, 8 of a bfloat16 one
QUANTISE_WARPS = 4  # 8 took 1.5 times as long on an H200
FP8_MAX = tl.constexpr(448.0)  # the largest float8_e4m3fn


def chunk_of(dim: int) -> int:
    """The largest power of two, at most MAX_CHUNK, that divides `dim`."""
    return min(dim & -dim, MAX_CHUNK)


@triton.jit
def _store_row(
    row, out, out_scale, values, D: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr
):
    cols = tl.arange(0, CHUNK)
    factor = 1.0
    if FP8:
        largest = tl.abs(values[0])
        for i in tl.static_range(1, D // CHUNK):
            largest = tl.maximum(largest, tl.abs(values[i]))
        scale = tl.maximum(tl.max(largest, 0), 1e-12) / FP8_MAX
        tl.store(out_scale + row, scale)
        factor = 1.0 / scale
    for i in tl.static_range(D // CHUNK):
        value = values[i]
        if FP8:
            value = tl.minimum(tl.maximum(value * factor, -FP8_MAX), FP8_MAX)
        tl.store(out + row * D + i * CHUNK + cols, value.to(out.dtype.element_ty))


@triton.jit
def _change(y, gate, at, cols, HAS_GATE: tl.constexpr):
    change = tl.load(y + at).to(tl.float32)
    if HAS_GATE:
        change *= tl.load(gate + cols)
    return change


@triton.jit(do_not_specialize=["num_tokens", "num_clean"])
def _add_norm_kernel(
    x, y1, gate1, y2, gate2, scale, shift, out, out_scale,
    num_tokens, num_clean, gate1_b, gate1_g, gate2_b, gate2_g,
    scale_b, scale_g, shift_b, shift_g, eps,
    D: tl.constexpr, CHUNK: tl.constexpr, NUM_CHANGES: tl.constexpr,
    HAS_GATE1: tl.constexpr, HAS_GATE2: tl.constexpr,
    STORE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // num_tokens
    group = ((row - sample * num_tokens) >= num_clean).to(tl.int64)
    cols = tl.arange(0, CHUNK)
    gate1 += sample * gate1_b + group * gate1_g
    gate2 += sample * gate2_b + group * gate2_g
    scale += sample * scale_b + group * scale_g
    shift += sample * shift_b + group * shift_g
    values = ()
    total = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(D // CHUNK):
        col = i * CHUNK + cols
        at = row * D + col
        value = tl.load(x + at)
        if NUM_CHANGES > 0:
            value += _change(y1, gate1, at, col, HAS_GATE1)
        if NUM_CHANGES > 1:
            value += _change(y2, gate2, at, col, HAS_GATE2)
        if STORE:
            tl.store(x + at, value)
        total += value
        values = values + (value,)
    mean = tl.sum(total, 0) / D
    squares = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(D // CHUNK):
        squares += (values[i] - mean) * (values[i] - mean)
    inverse = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    normed = ()
    for i in tl.static_range(D // CHUNK):
        factor = tl.load(scale + i * CHUNK + cols)
        offset = tl.load(shift + i * CHUNK + cols)
        normed = normed + ((values[i] - mean) * inverse * factor + offset,)
    _store_row(row, out, out_scale, normed, D, CHUNK, FP8)


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_rope_kernel(
    x, weight_q, weight_k, cos, sin, num_tokens, row_stride, eps,
    D: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    NUM_PARTS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CHUNK)
    if ROPE:
        angle = (row % num_tokens) * HALF + tl.arange(0, CHUNK // 2) % HALF
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
    for part in tl.static_range(NUM_PARTS):
        start = x + row * row_stride + part * D
        weight = weight_q
        if part == 1:
            weight = weight_k
        values = ()
        squares = tl.zeros([CHUNK], tl.float32)
        for i in tl.static_range(D // CHUNK):
            value = tl.load(start + i * CHUNK + cols).to(tl.float32)
            squares += value * value
            values = values + (value,)
        inverse = tl.rsqrt(tl.sum(squares, 0) / D + eps)
        for i in tl.static_range(D // CHUNK):
            value = values[i] * inverse * tl.load(weight + i * CHUNK + cols)
            if ROPE:
                even, odd = tl.split(tl.reshape(value, [CHUNK // 2, 2]))
                value = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [CHUNK])
            tl.store(start + i * CHUNK + cols, value.to(x.dtype.element_ty))


@triton.jit
def _gelu_tanh(x):
    """x / 2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _quantise_kernel(
    x, out, out_scale, row_stride, D: tl.constexpr, CHUNK: tl.constexpr, GELU: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, CHUNK)
    values = ()
    for i in tl.static_range(D // CHUNK):
        value = tl.load(x + row * row_stride + i * CHUNK + cols).to(tl.float32)
        if GELU:
            value = _gelu_tanh(value)
        values = values + (value,)
    _store_row(row, out, out_scale, values, D, CHUNK, True)


# ------------------------------------------------------------------------------------- calls


def add_norm(
    x: Tensor,
    changes: Sequence[tuple[Tensor, Tensor | None]],
    scale_BGD: Tensor,
    shift_BGD: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    *,
    num_tokens: int,
    num_clean: int,
    eps: float,
    store: bool,
) -> None:
    """`row_ops.add_norm` into `out` (and `out_scale` where it is fp8).

    `changes` are at most two of (y, gate); what is None, or not there, is not read.
    """
    num_rows, dim = x.shape
    arguments: list[Tensor] = []
    gate_strides: list[int] = []
    both = (*changes, *[(x, None)] * (2 - len(changes)))
    for y, gate in both:
        gate_BGD = scale_BGD if gate is None else gate
        arguments += [y, gate_BGD]
        gate_strides += _row_strides(gate_BGD)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(num_rows,)](
            x, *arguments, scale_BGD, shift_BGD, out, x if out_scale is None else out_scale,
            num_tokens, num_clean, *gate_strides,
            *_row_strides(scale_BGD), *_row_strides(shift_BGD), eps,
            D=dim, CHUNK=chunk_of(dim), NUM_CHANGES=len(changes),
            HAS_GATE1=both[0][1] is not None, HAS_GATE2=both[1][1] is not None,
            STORE=store, FP8=out_scale is not None, num_warps=NORM_WARPS,
        )  # fmt: skip


def norm_rope(
    x: Tensor,
    weights: tuple[Tensor, ...],
    rope: tuple[Tensor, Tensor] | None,
    *,
    num_tokens: int,
    eps: float,
) -> None:
    """RMSNorm, then rotation, of the first len(weights) * D features of every row, in place."""
    dim = weights[0].shape[0]
    cos, sin = rope or (weights[0], weights[0])
    with torch.cuda.device_of(x):
        _norm_rope_kernel[(x.shape[0],)](
            x, weights[0], weights[-1], cos, sin, num_tokens, x.stride(0), eps,
            D=dim, CHUNK=chunk_of(dim), HALF=cos.shape[-1] if rope else 1,
            NUM_PARTS=len(weights), ROPE=rope is not None, num_warps=NORM_WARPS,
        )  # fmt: skip


def quantise(x: Tensor, out: Tensor, out_scale: Tensor, *, gelu: bool) -> None:
    """Rows of `x` (after GELU, if asked) to fp8 with one scale each."""
    num_rows, dim = x.shape
    # A whole row stays in registers.
    num_warps = QUANTISE_WARPS if dim <= 8192 else 2 * QUANTISE_WARPS
    with torch.cuda.device_of(x):
        _quantise_kernel[(num_rows,)](
            x, out, out_scale, x.stride(0),
            D=dim, CHUNK=chunk_of(dim), GELU=gelu, num_warps=num_warps,
        )  # fmt: skip


def _row_strides(rows_BGD: Tensor) -> tuple[int, int]:
    """Elements from one sample, and from one timestep row, to the next; 0 where there is one."""
    b, g, _ = rows_BGD.shape
    return rows_BGD.stride(0) if b > 1 else 0, rows_BGD.stride(1) if g > 1 else 0
