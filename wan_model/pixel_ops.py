"""What happens to each pixel between the VAE's convolutions: biases, norm, SiLU, sums, doubling.

Owns the definition of every such operation, in PyTorch, and the choice of its Triton kernel on a
CUDA device. The arithmetic is float32 and rounds once, where it is stored. Knows no layers.

Shapes: P pixels of C channels, channels together; N frames of H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_model.row_ops import has_triton


def norm_silu(x_PC: Tensor, bias_C: Tensor | None, gamma_C: Tensor, out_PC: Tensor) -> None:
    """silu(x / ||x|| * sqrt(C) * gamma) into `out`; the bias is added to x first."""
    if _uses_kernels(x_PC):
        from wan_model import pixel_kernels

        pixel_kernels.norm_silu(x_PC, bias_C, gamma_C, out_PC)
        return
    x = x_PC.float() if bias_C is None else x_PC.float() + bias_C.float()
    unit = F.normalize(x, dim=1)
    out_PC.copy_(F.silu(unit * (gamma_C.float() * x.shape[1] ** 0.5)))


def add(h_PC: Tensor, x_PC: Tensor, bias_C: Tensor) -> None:
    """h += x + bias, in place."""
    if _uses_kernels(h_PC):
        from wan_model import pixel_kernels

        pixel_kernels.add(h_PC, x_PC, bias_C)
        return
    h_PC.copy_(h_PC.float() + x_PC.float() + bias_C.float())


def join_phases(
    phases_NHWC: Tensor,
    bias_C: Tensor,
    source_NHWC: Tensor | None,
    *,
    frames_per_source: int = 1,
    num_dropped: int = 0,
) -> Tensor:
    """[N, H + 1, W + 1, 4 C] -> [N, 2 H, 2 W, C] with the bias, and `duplicate_up` of a source.

    Pixel (2 h + a, 2 w + b) is phase 2 a + b of window (h + a, w + b). `source` [N', H, W, C'] is
    repeated along its channels, which are then read as (channel, frame, a, b); the first
    `num_dropped` of the `frames_per_source` N' frames are left out.
    """
    n, h, w, c4 = phases_NHWC.shape
    h, w, c = h - 1, w - 1, c4 // 4
    out = torch.empty(n, 2 * h, 2 * w, c, dtype=phases_NHWC.dtype, device=phases_NHWC.device)
    if _uses_kernels(out):
        from wan_model import pixel_kernels

        pixel_kernels.join_phases(
            phases_NHWC, bias_C, source_NHWC, out, frames_per_source, num_dropped
        )
        return out
    repeated_NHWC4 = None
    if source_NHWC is not None:
        num_repeats = 4 * c * frames_per_source // source_NHWC.shape[-1]
        wide = source_NHWC.repeat_interleave(num_repeats, dim=-1)
        wide = wide.unflatten(-1, (c, frames_per_source, 4)).permute(0, 4, 1, 2, 3, 5)
        repeated_NHWC4 = wide.flatten(0, 1)[num_dropped:].float()
    for a in (0, 1):
        for b in (0, 1):
            phase = 2 * a + b
            part = phases_NHWC[:, a : a + h, b : b + w, phase * c : (phase + 1) * c].float()
            part = part + bias_C.float()
            if repeated_NHWC4 is not None:
                part = part + repeated_NHWC4[..., phase]
            out[:, a::2, b::2] = part.to(out.dtype)
    return out


def _uses_kernels(x: Tensor) -> bool:
    return x.is_cuda and has_triton()
