"""Attention of a video's tokens to its prompt.

Owns the definition, in PyTorch, and the choice of its kernel on a CUDA device: our own on Hopper,
else Triton's. A prompt is padded to text_len with zero rows that are attended to, as the model was
trained; all of them have the same key and the same value, so a few rows stand for all, each counted
as often as needed: a score more by log(count). Exact, and with 120 tokens a quarter of the keys.
Every rank holds the whole text: no exchange.

Shapes: B batch, N tokens of this rank, L text rows, H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_model import hopper_attention
from wan_model.config import TransformerConfig
from wan_model.row_ops import has_triton


class TextKeys(NamedTuple):
    """What the cross-attention of one block looks at: k, v [B, L, H, D]; log_counts [B, L] float32,
    the logarithm of how many text rows each of them stands for."""

    k: Tensor
    v: Tensor
    log_counts: Tensor


def text_attention(q_BNHD: Tensor, text: TextKeys) -> Tensor:
    """softmax(q k^T / sqrt(D) + log_counts) v -> [B, N, H, D] in q's dtype."""
    if _uses_kernels(q_BNHD):
        if hopper_attention.fits_text(q_BNHD, text.k.shape[1]):
            return hopper_attention.text_attention(q_BNHD, *text)
        from wan_model import text_kernels

        return text_kernels.text_attention(q_BNHD, *text)
    dtype = torch.promote_types(q_BNHD.dtype, torch.float32)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q_BNHD, text.k, text.v))
    bias_B11L = text.log_counts.to(dtype)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11L)
    return out.transpose(1, 2).to(q_BNHD.dtype)


def count_rows(lengths: Sequence[int], text_len: int, device: torch.device) -> Tensor:
    """The log_counts [B, L] of prompts of so many tokens, padded to L rows: one more than the
    longest has, or text_len. The rows that pad a prompt share its padding evenly."""
    num_rows = min(text_len, max(lengths) + 1)
    log_counts = torch.zeros(len(lengths), num_rows, device=device, dtype=torch.float32)
    for row_L, length in zip(log_counts, lengths, strict=True):
        if length < num_rows:
            row_L[length:].fill_(math.log((text_len - length) / (num_rows - length)))
    return log_counts


def warm_up(config: TransformerConfig, device: str, dtype: torch.dtype) -> None:
    """Compiles what prompts of every length need, before there is one."""
    heads = (config.num_heads, config.head_dim)
    q = torch.zeros(1, 1, *heads, device=device, dtype=dtype)
    for num_rows in range(128, config.text_len + 128, 128):
        k = torch.zeros(1, min(num_rows, config.text_len), *heads, device=device, dtype=dtype)
        text_attention(q, TextKeys(k, k, torch.zeros(k.shape[:2], device=device)))


def _uses_kernels(q: Tensor) -> bool:
    quick = q.is_cuda and q.dtype != torch.float32 and not torch.is_grad_enabled()
    return quick and has_triton()
