"""Triton kernels for the work on each pixel between the VAE's convolutions.

Owns what runs on a CUDA device only. What they compute is defined, in PyTorch, in `pixel_ops`,
their only caller. Knows nothing about layers.

Shapes as in `pixel_ops`; a program takes ROWS pixels of COLS >= C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
ELEMENTS = 4096  # of a program: 32 a thread


@triton.jit
def _norm_silu_kernel(
    x, bias, gamma, out, num_rows,
    C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    at = rows * C + cols
    inside = (rows < num_rows) & (cols < C)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))[:, None]
    weight = tl.load(gamma + cols, mask=cols < C, other=0.0).to(tl.float32)
    normed = value / tl.maximum(length, 1e-12) * (weight * tl.sqrt(C * 1.0))
    result = normed * tl.sigmoid(normed)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(
    h, x, bias, num_rows, C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    at = rows * C + cols
    inside = (rows < num_rows) & (cols < C)
    value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _join_phases_kernel(
    phases, bias, source, out, num_rows, height, width, num_dropped,
    C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    SOURCE_C: tl.constexpr, FRAMES: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = (rows < num_rows) & (cols < C)
    x = rows % (2 * width)
    y = (rows // (2 * width)) % (2 * height)
    frame = rows // (4 * height * width)
    phase = 2 * (y % 2) + x % 2
    # Window (h + a, w + b) of pixel (2 h + a, 2 w + b).
    window = (frame * (height + 1) + (y + 1) // 2) * (width + 1) + (x + 1) // 2
    value = tl.load(phases + (window * 4 + phase) * C + cols, mask=inside, other=0.0)
    value = value.to(tl.float32)
    value += tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    if SOURCE_C > 0:
        whole = frame + num_dropped
        pixel = (whole // FRAMES * height + y // 2) * width + x // 2
        channel = ((cols * FRAMES + whole % FRAMES) * 4 + phase) // REPEATS
        value += tl.load(source + pixel * SOURCE_C + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows * C + cols, value.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- calls


def norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, out: Tensor) -> None:
    num_rows, dim = x.shape
    grid, blocks = _blocks(num_rows, dim)
    with torch.cuda.device_of(x):
        _norm_silu_kernel[grid](
            x, gamma if bias is None else bias, gamma, out, num_rows,
            C=dim, HAS_BIAS=bias is not None, **blocks,
        )  # fmt: skip


def add(h: Tensor, x: Tensor, bias: Tensor) -> None:
    num_rows, dim = h.shape
    grid, blocks = _blocks(num_rows, dim)
    with torch.cuda.device_of(h):
        _add_kernel[grid](h, x, bias, num_rows, C=dim, **blocks)


def join_phases(
    phases: Tensor,
    bias: Tensor,
    source: Tensor | None,
    out: Tensor,
    frames_per_source: int,
    num_dropped: int,
) -> None:
    n, height, width, dim = out.shape
    grid, blocks = _blocks(n * height * width, dim)
    source_dim = 0 if source is None else source.shape[-1]
    repeats = 4 * dim * frames_per_source // source_dim if source_dim else 1
    with torch.cuda.device_of(out):
        _join_phases_kernel[grid](
            phases, bias, phases if source is None else source, out,
            n * height * width, height // 2, width // 2, num_dropped,
            C=dim, SOURCE_C=source_dim, FRAMES=frames_per_source, REPEATS=repeats, **blocks,
        )  # fmt: skip


def _blocks(num_rows: int, dim: int) -> tuple[tuple[int], dict[str, int]]:
    cols = triton.next_power_of_2(dim)
    rows = max(1, ELEMENTS // cols)
    return (triton.cdiv(num_rows, rows),), {"COLS": cols, "ROWS": rows, "num_warps": NUM_WARPS}
