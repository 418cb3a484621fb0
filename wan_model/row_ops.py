"""What happens to each token's row between the products: norms, rotation, GELU, fp8.

Owns the definition of every such operation, in PyTorch, and the choice of its Triton kernel on a
CUDA device. The arithmetic is float32 and rounds once, where it is stored. Knows nothing about
blocks, ranks or models. For inference: what a docstring says is changed is changed in place.

Shapes: R = B * N rows of D features; B samples, N tokens of this rank, G timestep rows.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Rows in fp8: values [R, D] (float8_e4m3fn) and one float32 scale each, [R, 1]."""

    values: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        return self.values.float() * self.scale


Rows = Tensor | Quantised


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Which token a row is: row r is token r % num_tokens of sample r // num_tokens.

    The first `num_clean` tokens of a sample belong to timestep row 0, the others to the last one.
    """

    num_tokens: int
    num_clean: int = 0

    def spread(self, rows_BGD: Tensor) -> Tensor:
        """[B or 1, G, D] -> what broadcasts against [B, N, D]."""
        if rows_BGD.shape[1] == 1:
            return rows_BGD
        clean, noisy = self.num_clean, self.num_tokens - self.num_clean
        parts = (rows_BGD[:, :1].expand(-1, clean, -1), rows_BGD[:, 1:].expand(-1, noisy, -1))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is added to the residual stream: gate * y; y [R, D], gate [B, G, D]. No gate is 1."""

    y: Tensor
    gate: Tensor | None = None


def add_norm(
    x: Tensor,
    changes: Sequence[Change],
    scale_BGD: Tensor,
    shift_BGD: Tensor,
    layout: RowLayout,
    *,
    eps: float,
    out_dtype: torch.dtype,
    store: bool = True,
) -> Rows:
    """layer_norm(x + changes) * scale + shift in `out_dtype`, after at most two changes.

    x [R, D] float32, the residual stream: it keeps the sum, unless not to `store` saves that pass
    because the next call is given these changes again. `scale` is the whole factor, so a modulated
    norm passes 1 + its own.
    """
    if _uses_kernels(x):
        from wan_model import kernels

        out, out_scale = _output(x, out_dtype)
        kernels.add_norm(
            x, [(c.y, c.gate) for c in changes], scale_BGD, shift_BGD, out, out_scale,
            num_tokens=layout.num_tokens, num_clean=layout.num_clean, eps=eps, store=store,
        )  # fmt: skip
        return out if out_scale is None else Quantised(values=out, scale=out_scale)
    sum_BND = x.view(-1, layout.num_tokens, x.shape[1])
    for change in changes:
        y_BND = change.y.view(sum_BND.shape).float()
        sum_BND = sum_BND + (y_BND if change.gate is None else layout.spread(change.gate) * y_BND)
    if store:
        x.copy_(sum_BND.view(x.shape))
    normed = F.layer_norm(sum_BND, sum_BND.shape[-1:], eps=eps)
    out = (normed * layout.spread(scale_BGD) + layout.spread(shift_BGD)).view(x.shape)
    return quantise_rows(out) if out_dtype == FP8 else out.to(out_dtype)


def norm_rope(
    x: Tensor,
    weights: tuple[Tensor, ...],
    rope: tuple[Tensor, Tensor] | None,
    layout: RowLayout,
    *,
    eps: float,
) -> None:
    """RMSNorm by each of `weights` [D], then rotation, of one D-wide part of x after the other.

    x [R, >= len(weights) * D], changed in place. rope: cos and sin [N, head_dim / 2].
    """
    if _uses_kernels(x):
        from wan_model import kernels

        kernels.norm_rope(x, weights, rope, num_tokens=layout.num_tokens, eps=eps)
        return
    dim = weights[0].shape[0]
    for i, weight in enumerate(weights):
        part = x[:, i * dim : (i + 1) * dim]
        normed = F.rms_norm(part.float(), (dim,), weight.float(), eps)
        if rope is not None:
            cos, sin = (table[:, None] for table in rope)
            half = cos.shape[-1]
            pairs_BNHP2 = normed.view(-1, layout.num_tokens, dim // (2 * half), half, 2)
            even, odd = pairs_BNHP2.unbind(-1)
            turned = (even * cos - odd * sin, even * sin + odd * cos)
            normed = torch.stack(turned, dim=-1).view(normed.shape)
        part.copy_(normed)


def gelu(x: Tensor, *, out_dtype: torch.dtype) -> Rows:
    """GELU (tanh form) of contiguous rows; in place where `out_dtype` is the input's."""
    if out_dtype == FP8:
        return quantise_rows(x, after_gelu=True)
    return x.copy_(F.gelu(x.float(), approximate="tanh"))


def quantise_rows(x: Tensor, *, after_gelu: bool = False) -> Quantised:
    """Every row to fp8 with the scale that makes its largest value FP8_MAX."""
    if _uses_kernels(x):
        from wan_model import kernels

        out, out_scale = _output(x, FP8)
        kernels.quantise(x, out, out_scale, gelu=after_gelu)
        return Quantised(values=out, scale=out_scale)
    wide = F.gelu(x.float(), approximate="tanh") if after_gelu else x.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return Quantised(values=(wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale=scale)


def kernels_fit(dim: int, ffn_dim: int, head_dim: int) -> bool:
    """Whether the kernels cut such rows into at most 64 pieces that hold whole heads."""
    piece = min(dim & -dim, 1024)
    ffn_piece = min(ffn_dim & -ffn_dim, 1024)
    return piece % head_dim == 0 and dim <= 64 * piece and ffn_dim <= 64 * ffn_piece


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _uses_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _output(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32) if dtype == FP8 else None
    return out, scale
