"""The VAE's layers with channels together: convolutions, and one pass over memory between two.

Owns the order of the operations when nothing is trained: what the layers' own `forward` computes,
with every bias added by the pass that follows its convolution, and with doubling H and W turned
into a smaller convolution of the picture as it is. Knows no chunks beyond its cache.

Shapes as in `vae_layers`; tensors are [B, C, T, H, W] views of memory laid out as [B, T, H, W, C].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_model.pixel_ops import add, join_phases

if TYPE_CHECKING:
    from wan_model.vae import NormedConv
    from wan_model.vae_layers import FeatureCache, ResidualBlock, Upsample


def together(x_BCTHW: Tensor) -> Tensor:
    """[B, T, H, W, C], contiguous: no copy where the memory is laid out so already."""
    return x_BCTHW.permute(0, 2, 3, 4, 1).contiguous()


def apart(x_BTHWC: Tensor) -> Tensor:
    """The view [B, C, T, H, W] of the same memory."""
    return x_BTHWC.permute(0, 4, 1, 2, 3)


def normed_conv(layers: NormedConv, x: Tensor, cache: FeatureCache) -> Tensor:
    norm, _, conv = layers
    return conv.convolve(cache.extend_normed(conv, x, norm), cache.rows)


def residual_block(block: ResidualBlock, x: Tensor, cache: FeatureCache) -> Tensor:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    h = conv1.convolve(cache.extend_normed(conv1, x, norm1), cache.rows, with_bias=False)
    h = cache.extend_normed(conv2, h, norm2, conv1.bias)
    h_BTHWC = together(conv2.convolve(h, cache.rows, with_bias=False))
    x_BTHWC, bias = together(x), conv2.bias
    if isinstance(block.shortcut, nn.Conv3d):
        x_BTHWC = F.linear(x_BTHWC, block.shortcut.weight.flatten(1))
        bias = bias.float() + block.shortcut.bias.float()
    num_channels = h_BTHWC.shape[-1]
    add(h_BTHWC.view(-1, num_channels), x_BTHWC.view(-1, num_channels), bias)
    return apart(h_BTHWC)


def upsample(
    layer: Upsample, x: Tensor, cache: FeatureCache, stage_input: Tensor | None = None
) -> Tensor:
    """`layer(x)`, plus `duplicate_up` of what went into its stage (version 2.2)."""
    if layer.time_conv is not None:
        x = _double_frames(layer, x, cache)
    padding = (1, 1)
    if cache.rows is not None:
        x, padding = cache.rows.with_neighbours(x), (0, 1)
    conv = layer.resample[1]
    in_time = layer.time_conv is not None
    videos = []
    for i, x_THWC in enumerate(together(x)):
        phases_NCHW = F.conv2d(x_THWC.permute(0, 3, 1, 2), layer.phase_weights, padding=padding)
        videos.append(
            join_phases(
                phases_NCHW.permute(0, 2, 3, 1).contiguous(),
                conv.bias,
                None if stage_input is None else together(stage_input[i : i + 1])[0],
                frames_per_source=1 + in_time,
                num_dropped=int(in_time and cache.is_first),
            )
        )
    return apart(videos[0][None] if len(videos) == 1 else torch.stack(videos))


def _double_frames(layer: Upsample, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
    """Two frames of each but the video's first one, which is not even history."""
    num_kept = 1 if cache.is_first else 0
    rest_BCTHW = x_BCTHW[:, :, num_kept:]
    num_doubled = rest_BCTHW.shape[2]
    if num_doubled == 0:
        return x_BCTHW
    x_BTHWC = together(x_BCTHW)
    b, t, h, w, c = x_BTHWC.shape
    conv = layer.time_conv
    pairs = together(conv.convolve(cache.extend(conv, rest_BCTHW, 2), cache.rows, with_bias=False))
    made = x_BTHWC.new_empty(b, num_kept + 2 * num_doubled, h, w, c)
    made[:, :num_kept] = x_BTHWC[:, :num_kept]
    pairs = pairs.unflatten(-1, (2, c)).permute(0, 1, 4, 2, 3, 5)  # B T 2 H W C
    torch.add(
        pairs, conv.bias.view(2, 1, 1, c), out=made[:, num_kept:].unflatten(1, (num_doubled, 2))
    )
    return apart(made)


def phase_weights(weight_OIKK: Tensor) -> Tensor:
    """Of a 3 x 3 convolution after doubling: [O, I, 3, 3] -> [4 O, I, 2, 2] on the picture before.

    Doubled, neighbours are equal in pairs, so of three taps two fall on one pixel: for even rows
    (phase 0) taps 1 and 2, for odd ones (phase 1) taps 0 and 1. The same for columns; phase 2 a + b
    is row phase a, column phase b. 16 products a pixel instead of 36. Added in float32.
    """
    pick = torch.tensor(
        [[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight_OIKK.device
    )  # [phase, tap of 2, tap of 3]
    weights = torch.einsum("aiy,bjx,ocyx->abocij", pick, pick, weight_OIKK.float())
    return weights.flatten(0, 2).to(weight_OIKK.dtype)
