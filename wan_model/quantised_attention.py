"""Attention with quantised operands: int8 queries and keys, fp8 probabilities and values.

Owns the definition, in PyTorch, and the choice of the kernels on a CUDA device. As in
SageAttention (2410.02367) the mean key is taken off before the keys are quantised: it adds the same
to every score of a query, so the softmax does not see it. The mean value is taken off and added to
the output. One scale per query (which holds log2(e) / sqrt(D) too), per block of keys and per
channel of the values. Probabilities are rounded before they are summed for the softmax.

Shapes: B batch, L queries, S keys, H heads, D head_dim, P the keys padded to whole blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_KEYS = 128
INT8_MAX = 127.0
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
PROBABILITY_BITS = 8
"""Probabilities are stored times 2^8: the least that is not 0 is 2^-17."""
SLACK = 0.75
"""The score that stands for a row's highest is replaced by one that lies so far above it, in
powers of two: sums are seldom multiplied, and no probability exceeds 2^8.75 = 431 of fp8's 448."""
TINY = 1e-6
MEAN_STEP = 17
"""A prime, so that rows of a picture do not line up with it."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Of keys and values over tokens, and the values' scales: float32 [B, H, D]."""

    k: Tensor
    v: Tensor
    v_scale: Tensor


def quantised_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, L, H, D] in q's dtype, about 4 % off on random numbers.

    Raises ValueError on a GPU for a head_dim its kernels do not know.
    """
    means = _means(k_BSHD, v_BSHD)
    if not _uses_kernels(q_BLHD):
        return _definition(q_BLHD, k_BSHD, v_BSHD, means)
    from wan_model import quantised_attention_kernels

    return quantised_attention_kernels.quantised_attention(q_BLHD, k_BSHD, v_BSHD, means)


def _uses_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _means(k_BSHD: Tensor, v_BSHD: Tensor) -> Means:
    """Of many tokens, means of a 17th: whatever is taken off cancels out, near the mean or not."""
    step = MEAN_STEP if k_BSHD.shape[1] >= 256 * MEAN_STEP else 1
    mean_k, mean_v = (x[:, ::step].mean(1, dtype=torch.float32) for x in (k_BSHD, v_BSHD))
    least, most = (x.float() for x in v_BSHD.aminmax(dim=1))
    farthest = torch.maximum(most - mean_v, mean_v - least)
    return Means(k=mean_k, v=mean_v, v_scale=farthest.clamp_min(TINY) / FP8_MAX)


def _definition(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, means: Means) -> Tensor:
    """The same numbers as the kernels': quantised operands, block after block of keys."""
    num_keys = k_BSHD.shape[1]
    q_BHLD, k_BHSD, v_BHSD = (x.float().transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    q_scale = q_BHLD.abs().amax(-1, keepdim=True).clamp_min(TINY) / INT8_MAX
    q = (q_BHLD / q_scale).round()
    q_scale = q_scale * (math.log2(math.e) / math.sqrt(q.shape[-1]))
    k_BHPD = F.pad(k_BHSD - means.k[:, :, None], (0, 0, 0, -num_keys % BLOCK_KEYS))
    values = ((v_BHSD - means.v[:, :, None]) / means.v_scale[:, :, None]).to(FP8).float()
    highest = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(highest), torch.zeros_like(q)
    for start in range(0, num_keys, BLOCK_KEYS):
        k = k_BHPD[:, :, start : start + BLOCK_KEYS]
        k_scale = k.abs().amax((-1, -2), keepdim=True).clamp_min(TINY) / INT8_MAX
        scores = q @ (k / k_scale).round().transpose(-1, -2) * (q_scale * k_scale)
        scores = scores[..., : num_keys - start]
        before, found = highest, scores.amax(-1, keepdim=True)
        highest = torch.where(found > before + SLACK, found, before)
        p = torch.exp2(scores - highest + PROBABILITY_BITS).to(FP8).float()
        shrink = torch.exp2(before - highest)
        total = total * shrink + p.sum(-1, keepdim=True)
        out = out * shrink + p @ values[:, :, start : start + BLOCK_KEYS]
    out = out / total * means.v_scale[:, :, None] + means.v[:, :, None]
    return out.transpose(1, 2).to(q_BLHD.dtype)
