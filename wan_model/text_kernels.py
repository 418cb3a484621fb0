"""Triton kernel for the attention to a text's few keys: each query is read once.

Owns what runs on a CUDA device only; what it computes is defined, in PyTorch, in `text_attention`,
its only caller. Shapes as there. A program takes ROWS tokens of one head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, KEYS = 64, 128
NUM_WARPS, NUM_STAGES = 4, 2  # so few that two blocks share a multiprocessor
TILES = 16  # of ROWS tokens of one head, one after another: a short text is read once for them


@triton.jit(do_not_specialize=["num_tokens", "num_keys"])
def _text_attention_kernel(
    q, k, v, log_counts, out, num_tokens, num_keys,
    q_b, q_n, q_h, k_b, k_l, k_h, v_b, v_l, v_h, factor,
    H: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    q += sample * q_b + head * q_h
    k += sample * k_b + head * k_h
    v += sample * v_b + head * v_h
    log_counts += sample * num_keys
    out += (sample * num_tokens * H + head) * D
    cols = tl.arange(0, COLS)[None, :]
    within = tl.arange(0, KEYS)
    if NUM_BLOCKS == 1:
        there = (within < num_keys)[:, None] & (cols < D)
        keys = tl.load(k + within[:, None] * k_l + cols, mask=there, other=0.0)
        values = tl.load(v + within[:, None] * v_l + cols, mask=there, other=0.0)
        counts = tl.load(log_counts + within, mask=within < num_keys, other=float("-inf"))
        counts *= 1.4426950408889634
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_tokens)[:, None] & (cols < D)
        at = rows[:, None].to(tl.int64)
        queries = tl.load(q + at * q_n + cols, mask=inside, other=0.0)
        if NUM_BLOCKS == 1:
            scores = tl.dot(queries, tl.trans(keys)) * factor + counts[None]
            p = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(p, 1)
            made = tl.dot(p.to(values.dtype), values)
        else:
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            made = tl.zeros([ROWS, COLS], tl.float32)
            for block in range(NUM_BLOCKS):
                key = block * KEYS + within
                there = (key < num_keys)[:, None] & (cols < D)
                keys = tl.load(k + key[:, None] * k_l + cols, mask=there, other=0.0)
                values = tl.load(v + key[:, None] * v_l + cols, mask=there, other=0.0)
                counts = tl.load(log_counts + key, mask=key < num_keys, other=float("-inf"))
                scores = tl.dot(queries, tl.trans(keys)) * factor
                scores += (counts * 1.4426950408889634)[None]
                now = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2(scores - now[:, None])
                shrink = tl.exp2(highest - now)
                highest = now
                total = total * shrink + tl.sum(p, 1)
                made = made * shrink[:, None] + tl.dot(p.to(values.dtype), values)
        made *= (1.0 / total)[:, None]
        tl.store(out + at * H * D + cols, made.to(out.dtype.element_ty), mask=inside)


def text_attention(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, log_counts_BL: Tensor) -> Tensor:
    """`text_attention.text_attention`. D must lie together in q, k and v."""
    b, n, h, d = q_BNHD.shape
    num_keys = k_BLHD.shape[1]
    out = torch.empty(q_BNHD.shape, dtype=q_BNHD.dtype, device=q_BNHD.device)
    with torch.cuda.device_of(q_BNHD):
        _text_attention_kernel[(triton.cdiv(n, TILES * ROWS), b * h)](
            q_BNHD, k_BLHD, v_BLHD, log_counts_BL.contiguous(), out, n, num_keys,
            *q_BNHD.stride()[:3], *k_BLHD.stride()[:3], *v_BLHD.stride()[:3],
            math.log2(math.e) / math.sqrt(d),
            H=h, D=d, COLS=max(16, triton.next_power_of_2(d)), TILES=TILES,
            ROWS=ROWS, KEYS=KEYS, NUM_BLOCKS=triton.cdiv(num_keys, KEYS),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return out
