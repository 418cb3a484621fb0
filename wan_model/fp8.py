"""Linear layers with fp8 weights and fp8 activations, one scale per row of each.

Owns the quantised linear and which linears of a transformer become one: the large products of the
blocks. Embeddings, time path, modulation, norms, head and the text keys (made once a job) keep
their precision. Format: float8_e4m3fn; products accumulate in float32 and come out in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_model.config import TransformerConfig
from wan_model.row_ops import Quantised, Rows, has_triton, kernels_fit, quantise_rows

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
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.dequantise(), weight, bias).to(self.dtype)
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


def check_fp8(config: TransformerConfig, *, device: str, dtype: torch.dtype) -> None:
    """Raises ValueError, in one sentence, where such a transformer cannot run in fp8.

    A CPU emulates it: the same fp8 numbers, multiplied in float32.
    """
    if not device.startswith("cuda"):
        return
    if dtype != torch.bfloat16:
        raise ValueError("precision fp8 gives bfloat16 results on a GPU: leave out dtype float32")
    if not has_triton():
        raise ValueError("precision fp8 needs Triton on a GPU: pip install triton")
    if not kernels_fit(config.dim, config.ffn_dim, config.head_dim):
        raise ValueError(
            f"precision fp8 has no kernels for dim {config.dim}, ffn_dim {config.ffn_dim},"
            f" head_dim {config.head_dim} on a GPU: use bf16"
        )
    try:
        Fp8Linear(nn.Linear(64, 64, device=device, dtype=dtype).requires_grad_(False))(
            torch.ones(64, 64, device=device, dtype=dtype)
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"precision fp8 cannot run on this GPU: {reason}") from error
