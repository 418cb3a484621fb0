"""The layers of the causal 3D VAE, and what they remember of the frames before a chunk.

Owns the cache of earlier frames and the layers that look back at them, in the form that is trained;
`fused_vae` has the quicker order of the same operations. Knows nothing about stages or versions.

Shapes: B videos, C channels, T frames at the depth in question, H and W pixels at that depth;
N = B * T single frames, L = H * W positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from wan_model import fused_vae
from wan_model.convolution import causal_conv3d
from wan_model.pixel_ops import norm_silu
from wan_model.rows import Rows

# -------------------------------------------------------------------------------------- time


class FeatureCache:
    """What causal layers remember of the earlier chunks of ONE encode or decode call.

    Every layer that looks back sees the same frames however the video is cut, so the size of the
    chunks decides memory and speed but never the result. `is_first` and `is_last` say which chunk
    is being run: the very first frame skips all temporal resampling, and nothing is kept after the
    last chunk. `channels_together`: tensors are laid out as [B, T, H, W, C] and nothing is trained,
    so that a norm, its SiLU and the past of the convolution after it are one pass over memory.
    `rows`, if there are any, say which of the picture's rows this rank has.
    """

    def __init__(self, *, channels_together: bool = False, rows: Rows | None = None) -> None:
        self.rows = rows
        self.channels_together = channels_together and not torch.is_grad_enabled()
        self.is_first = True
        self.is_last = False
        self._frames: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, x_BCTHW: Tensor, num_past: int) -> Tensor:
        """`x` behind the `num_past` frames that `layer` saw before it (zeros before the first)."""
        past = self._frames.pop(layer, None)
        if past is None:
            x_BCTHW = functional.pad(x_BCTHW, (0, 0, 0, 0, num_past, 0))
        else:
            x_BCTHW = torch.cat((past, x_BCTHW), dim=2)
        self._remember(layer, x_BCTHW, num_past)
        return x_BCTHW

    def extend_normed(
        self, layer: nn.Module, x_BCTHW: Tensor, norm: RMSNorm, bias: Tensor | None = None
    ) -> Tensor:
        """`extend(layer, silu(norm(x + bias)), 2)` in one pass over memory, channels together."""
        b, c, t, h, w = x_BCTHW.shape
        made_BTHWC = x_BCTHW.new_empty(b, t + 2, h, w, c)
        past = self._frames.pop(layer, None)
        made_BTHWC[:, :2] = 0 if past is None else past.permute(0, 2, 3, 4, 1)
        x_BTHWC, gamma = fused_vae.together(x_BCTHW), norm.gamma.view(c)
        for x_THWC, made_THWC in zip(x_BTHWC, made_BTHWC, strict=True):
            norm_silu(x_THWC.view(-1, c), bias, gamma, made_THWC[2:].view(-1, c))
        made_BCTHW = fused_vae.apart(made_BTHWC)
        self._remember(layer, made_BCTHW, 2)
        return made_BCTHW

    def _remember(self, layer: nn.Module, x_BCTHW: Tensor, num_past: int) -> None:
        if not self.is_last:
            # A clone, because a view would keep the whole chunk's memory alive.
            self._frames[layer] = x_BCTHW[:, :, -num_past:].clone()


def run_in_chunks(
    network: Callable[[Tensor, FeatureCache], Tensor],
    x_BCTHW: Tensor,
    *,
    first: int,
    later: int,
    channels_together: bool = False,
    rows: Rows | None = None,
) -> Iterator[Tensor]:
    """Run `network` on `first` frames, then on `later` at a time, remembering across the cuts."""
    cache = FeatureCache(channels_together=channels_together, rows=rows)
    start, end, num_frames = 0, first, x_BCTHW.shape[2]
    while start < num_frames:
        cache.is_first, cache.is_last = start == 0, end >= num_frames
        yield network(x_BCTHW[:, :, start:end], cache)
        start, end = end, end + later


def per_frame(layer: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """Apply a layer that knows only images to every frame."""
    x_NCHW = x_BCTHW.transpose(1, 2).flatten(0, 1)
    return layer(x_NCHW).unflatten(0, (x_BCTHW.shape[0], -1)).transpose(1, 2)


# ------------------------------------------------------------------------------------ layers


class LooksBack:
    """Marks layers whose forward is `(x, cache)`: they, or their parts, need earlier frames."""


class CausalConv3d(LooksBack, nn.Conv3d):
    """Convolution over 3 frames (this one and the two before it) and a k x k neighbourhood."""

    def __init__(self, in_dim: int, out_dim: int, *, k: int = 3) -> None:
        super().__init__(in_dim, out_dim, (3, k, k), padding=(0, k // 2, k // 2))

    def forward(self, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
        return self.convolve(cache.extend(self, x_BCTHW, 2), cache.rows)

    def convolve(
        self, extended_BCTHW: Tensor, rows: Rows | None, *, with_bias: bool = True
    ) -> Tensor:
        bias, padding_h = self.bias if with_bias else None, 1
        if self.kernel_size[1] == 1:
            return functional.conv3d(extended_BCTHW, self.weight, bias)
        if rows is not None:
            extended_BCTHW, padding_h = rows.with_neighbours(extended_BCTHW), 0
        return causal_conv3d(extended_BCTHW, self.weight, bias, padding_h)


class CausalSequential(LooksBack, nn.Sequential):
    """Layers in a row; those that look back are handed the cache."""

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        for layer in self:
            x = layer(x, cache) if isinstance(layer, LooksBack) else layer(x)
        return x


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels, for videos (4 axes) or images (3 axes)."""

    def __init__(self, dim: int, *, num_axes: int = 4) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * (num_axes - 1)))

    def forward(self, x: Tensor) -> Tensor:
        unit = functional.normalize(x.float(), dim=1).to(x.dtype)
        return unit * (self.gamma * self.gamma.shape[0] ** 0.5)


class ResidualBlock(LooksBack, nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = CausalSequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),  # the reference has a dropout of 0 here; it takes up an index
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if cache.channels_together:
            return fused_vae.residual_block(self, x, cache)
        return self.shortcut(x) + self.residual(x, cache)


class AttentionBlock(LooksBack, nn.Module):
    """One head over the positions of each frame. Frames do not mix; all rows of one do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_axes=3)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
        return x_BCTHW + per_frame(partial(self._attend, rows=cache.rows), x_BCTHW)

    def _attend(self, x_NCHW: Tensor, rows: Rows | None) -> Tensor:
        qkv_NCHW = self.to_qkv(self.norm(x_NCHW))
        qkv_N1LC = qkv_NCHW.flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv_N1LC.chunk(3, dim=-1)
        if rows is not None:
            everywhere_NCHW = rows.gather(qkv_NCHW[:, q.shape[-1] :], dim=2)
            k, v = everywhere_NCHW.flatten(2).transpose(1, 2).unsqueeze(1).chunk(2, dim=-1)
        out_N1LC = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out_N1LC.squeeze(1).transpose(1, 2).reshape(x_NCHW.shape))


class Downsample(LooksBack, nn.Module):
    """Halve H and W, then, if `in_time`, also the frames after the video's first one."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
        x_BCTHW = per_frame(self.resample, x_BCTHW)
        if self.time_conv is None:
            return x_BCTHW
        with_past = cache.extend(self, x_BCTHW, 1)
        if not cache.is_first:
            return self.time_conv(with_past)
        if x_BCTHW.shape[2] == 1:
            return x_BCTHW
        return torch.cat((x_BCTHW[:, :, :1], self.time_conv(x_BCTHW)), dim=2)


class Upsample(LooksBack, nn.Module):
    """If `in_time`, make two frames of each but the video's first, then double H and W."""

    def __init__(self, in_dim: int, out_dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"),
            nn.Conv2d(in_dim, out_dim, 3, padding=1),
        )
        self.time_conv = CausalConv3d(in_dim, in_dim * 2, k=1) if in_time else None

    def forward(self, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
        if cache.channels_together:
            return fused_vae.upsample(self, x_BCTHW, cache)
        if self.time_conv is not None:
            # The first frame is not even history: the second one looks back at zeros.
            num_kept = 1 if cache.is_first else 0
            kept, rest = x_BCTHW[:, :, :num_kept], x_BCTHW[:, :, num_kept:]
            x_BCTHW = torch.cat((kept, self._double(rest, cache)), 2) if rest.shape[2] else kept
        if cache.rows is None:
            return per_frame(self.resample, x_BCTHW)
        return per_frame(self._resample_rows, cache.rows.with_neighbours(x_BCTHW))

    def _resample_rows(self, x_NCHW: Tensor) -> Tensor:
        """Of each neighbour's row, doubled, the convolution sees the nearer half."""
        upsample, conv = self.resample
        x_NCHW = upsample(x_NCHW)[:, :, 1:-1]
        return functional.conv2d(x_NCHW, conv.weight, conv.bias, padding=(0, 1))

    def _double(self, x_BCTHW: Tensor, cache: FeatureCache) -> Tensor:
        """The convolution's first C channels are the even frames, the other C the odd ones."""
        even, odd = self.time_conv(x_BCTHW, cache).chunk(2, dim=1)
        return torch.stack((even, odd), dim=3).flatten(2, 3)
