"""Linear layers with fp8 weights and fp8 activations, one scale per row of each.

Owns the quantised linear and which linears of a transformer become one: the large products of the
blocks. Embeddings, time path, modulation, norms, head and the text keys (made once a job) keep
their precision. Format: float8_e4m3fn; products accumulate in float32 and come out in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_model.row_ops import Quantised, Rows, quantise_rows

BLOCK_LINEARS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


class Fp8Linear(nn.Module):
    """x W^T + b for rows [R, in] (quantised here when they are not yet) -> [R, out] in `dtype`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows = quantise_rows(linear.weight)
        self.dtype = linear.weight.dtype
        self.register_buffer("weight", rows.values)
        self.register_buffer("weight_scale", rows.scale)
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Rows) -> Tensor:
        x = x if isinstance(x, Quantised) else quantise_rows(x)
        if not x.values.is_cuda:  # the same numbers, from float32 products
            weight = self.weight.float() * self.weight_scale
            return F.linear(x.dequantise(), weight, self.bias.float()).to(self.dtype)
        return torch._scaled_mm(
            x.values,
            self.weight.t(),
            scale_a=x.scale,
            scale_b=self.weight_scale.t(),
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=USE_FAST_ACCUM,
        )


USE_FAST_ACCUM = True
"""Hopper's fp8 products add up in about 14 bits, or, at half the speed, in 32 every few."""


def quantise_blocks(blocks: nn.ModuleList) -> None:
    """Replace the large linears of every block, one at a time: memory falls as it goes."""
    for block in blocks:
        for name in BLOCK_LINEARS:
            parent_name, _, own_name = name.rpartition(".")
            parent = block.get_submodule(parent_name)
            setattr(parent, own_name, Fp8Linear(getattr(parent, own_name)))
