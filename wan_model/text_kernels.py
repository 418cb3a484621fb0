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

ROWS, KEYS = 128, 64


@triton.jit(do_not_specialize=["num_keys"])
def _text_attention_kernel(
    q, k, v, log_counts, out, num_tokens, num_keys,
    q_b, q_n, q_h, k_b, k_l, k_h, v_b, v_l, v_h, factor,
    H: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)[None, :]
    inside = (rows < num_tokens)[:, None] & (cols < D)
    start = q + sample * q_b + head * q_h
    queries = tl.load(start + rows[:, None].to(tl.int64) * q_n + cols, mask=inside, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    made = tl.zeros([ROWS, COLS], tl.float32)
    for block in range(NUM_BLOCKS):
        keys = block * KEYS + tl.arange(0, KEYS)
        there = (keys < num_keys)[:, None] & (cols < D)
        k_at = sample * k_b + head * k_h + keys[:, None] * k_l + cols
        key_rows = tl.load(k + k_at, mask=there, other=0.0)
        counts = tl.load(
            log_counts + sample * num_keys + keys, mask=keys < num_keys, other=float("-inf")
        )
        scores = tl.dot(queries, tl.trans(key_rows)) * factor + (counts * 1.4426950408889634)[None]
        now = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(highest - now)
        highest = now
        total = total * shrink + tl.sum(p, 1)
        v_at = sample * v_b + head * v_h + keys[:, None] * v_l + cols
        values = tl.load(v + v_at, mask=there, other=0.0)
        made = made * shrink[:, None] + tl.dot(p.to(values.dtype), values)
    at = ((sample * num_tokens + rows[:, None]) * H + head) * D + cols
    tl.store(out + at, (made / total[:, None]).to(out.dtype.element_ty), mask=inside)


def text_attention(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, log_counts_BL: Tensor) -> Tensor:
    """`text_attention.text_attention`. D must lie together in q, k and v."""
    b, n, h, d = q_BNHD.shape
    num_keys = k_BLHD.shape[1]
    out = torch.empty(q_BNHD.shape, dtype=q_BNHD.dtype, device=q_BNHD.device)
    with torch.cuda.device_of(q_BNHD):
        _text_attention_kernel[(triton.cdiv(n, ROWS), b * h)](
            q_BNHD, k_BLHD, v_BLHD, log_counts_BL.contiguous(), out, n, num_keys,
            *q_BNHD.stride()[:3], *k_BLHD.stride()[:3], *v_BLHD.stride()[:3],
            math.log2(math.e) / math.sqrt(d),
            H=h, D=d, COLS=max(16, triton.next_power_of_2(d)),
            ROWS=ROWS, KEYS=KEYS, NUM_BLOCKS=triton.cdiv(num_keys, KEYS), num_warps=8,
        )  # fmt: skip
    return out
