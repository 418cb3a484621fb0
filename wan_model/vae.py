"""The causal 3D VAE of Wan 2.1 and 2.2: frames in [-1, 1] <-> normalised latents.

Owns both networks, under the parameter names of the released checkpoints, and the cutting of a
video into chunks; their layers are in `vae_layers`. Knows nothing about checkpoint files, mp4, or
what the latents are for. Numbers follow the reference's `wan/modules/vae2_1.py` and `vae2_2.py`.

Shapes: B videos, C channels, T frames at the depth in question, H and W pixels at that depth, Z
latent channels. F counts the video's own frames: the first latent frame stands for one of them and
every later one for `stride[0]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from wan_model import fused_vae
from wan_model.config import VAEConfig
from wan_model.rows import Rows
from wan_model.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    CausalSequential,
    Downsample,
    FeatureCache,
    LooksBack,
    ResidualBlock,
    RMSNorm,
    Upsample,
    run_in_chunks,
)

# ----------------------------------------------------------- what only version 2.2 has


def patchify(x_BCTHW: Tensor, p: int) -> Tensor:
    """[B,C,T,H,W] -> [B,C*p*p,T,H/p,W/p]; new channel = (c * p + column) * p + row."""
    x = x_BCTHW.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B C T H/p row W/p column
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x_BCTHW: Tensor, p: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x_BCTHW.unflatten(1, (-1, p, p))  # B C column row T H W
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def average_down(x_BCTHW: Tensor, *, out_dim: int, in_time: bool, in_space: bool) -> Tensor:
    """Fold the halved axes into channels, offsets in (t, h, w) order; average to `out_dim` groups.

    An odd number of frames, which only the first chunk has, gets a zero frame in front.
    """
    ft, fs = 1 + in_time, 1 + in_space
    x = functional.pad(x_BCTHW, (0, 0, 0, 0, -x_BCTHW.shape[2] % ft, 0))
    x = x.unflatten(4, (-1, fs)).unflatten(3, (-1, fs)).unflatten(2, (-1, ft))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # B C*ft*fs*fs T/ft H/fs W/fs
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def duplicate_up(x_BCTHW: Tensor, *, out_dim: int, in_time: bool, is_first: bool) -> Tensor:
    """Repeat channels, then unfold them into doubled axes, offsets in (t, h, w) order.

    The first chunk drops the extra frame that doubling gives the video's first one.
    """
    ft = 1 + in_time
    x = x_BCTHW.repeat_interleave(out_dim * ft * 4 // x_BCTHW.shape[1], dim=1)
    x = x.unflatten(1, (out_dim, ft, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, ft - 1 :] if is_first else x


class DownStage(LooksBack, nn.Module):
    """A stage of the 2.2 encoder: its layers plus the averaged stage input."""

    def __init__(
        self, layers: list[nn.Module], *, out_dim: int, in_time: bool, in_space: bool
    ) -> None:
        super().__init__()
        self.downsamples = CausalSequential(*layers)
        self._shortcut = partial(average_down, out_dim=out_dim, in_time=in_time, in_space=in_space)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.downsamples(x, cache) + self._shortcut(x)


class UpStage(LooksBack, nn.Module):
    """A stage of the 2.2 decoder: its layers plus, where it doubles, the repeated stage input."""

    def __init__(
        self, layers: list[nn.Module], *, out_dim: int, in_time: bool, in_space: bool
    ) -> None:
        super().__init__()
        self.upsamples = CausalSequential(*layers)
        self._shortcut = (
            partial(duplicate_up, out_dim=out_dim, in_time=in_time) if in_space else None
        )

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if self._shortcut is None:
            return self.upsamples(x, cache)
        if cache.channels_together:
            *layers, last = self.upsamples
            h = x
            for layer in layers:
                h = layer(h, cache)
            return fused_vae.upsample(last, h, cache, stage_input=x)
        return self.upsamples(x, cache) + self._shortcut(x, is_first=cache.is_first)


# ---------------------------------------------------------------------------------- networks


def _middle(dim: int) -> CausalSequential:
    return CausalSequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class NormedConv(CausalSequential):
    """RMSNorm, SiLU, convolution."""

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if not cache.channels_together:
            return super().forward(x, cache)
        return fused_vae.normed_conv(self, x, cache)


def _head(dim: int, out_dim: int) -> NormedConv:
    return NormedConv(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim))


def _residual_blocks(in_dim: int, out_dim: int, num_blocks: int) -> list[nn.Module]:
    dims = [in_dim] + [out_dim] * num_blocks
    return [ResidualBlock(*pair) for pair in zip(dims, dims[1:], strict=False)]


class Encoder(LooksBack, nn.Module):
    """[B, 3*p*p, F, H/p, W/p] -> [B, 2*Z, T, h, w], mean and log-variance before `conv1`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.encoder_dim * m for m in (1, *config.dim_mult)]
        halves_time = [*config.temporal_downsample, False]
        last = len(config.dim_mult) - 1
        self.conv1 = CausalConv3d(3 * config.patch_size**2, dims[0])
        stages: list[nn.Module] = []
        for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:], strict=False)):
            layers = _residual_blocks(in_dim, out_dim, config.num_res_blocks)
            if i < last:
                layers.append(Downsample(out_dim, in_time=halves_time[i]))
            if config.version == "2.2":
                layers = [
                    DownStage(layers, out_dim=out_dim, in_time=halves_time[i], in_space=i < last)
                ]
            stages += layers
        self.downsamples = CausalSequential(*stages)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], config.z_dim * 2)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.conv1(x, cache)
        x = self.downsamples(x, cache)
        return self.head(self.middle(x, cache), cache)


class Decoder(LooksBack, nn.Module):
    """[B, Z, T, h, w] after `conv2` -> [B, 3*p*p, F, H/p, W/p], not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        mult = config.dim_mult[::-1]
        dims = [config.decoder_dim * m for m in (mult[0], *mult)]
        doubles_time = [*config.temporal_downsample[::-1], False]
        last = len(mult) - 1
        self.conv1 = CausalConv3d(config.z_dim, dims[0])
        self.middle = _middle(dims[0])
        stages: list[nn.Module] = []
        carried = dims[0]
        for i, out_dim in enumerate(dims[1:]):
            layers = _residual_blocks(carried, out_dim, config.num_res_blocks + 1)
            # Upsampling halves the channels in 2.1 and keeps them in 2.2.
            carried = out_dim if config.version == "2.2" else out_dim // 2
            if i < last:
                layers.append(Upsample(out_dim, carried, in_time=doubles_time[i]))
            if config.version == "2.2":
                layers = [
                    UpStage(layers, out_dim=out_dim, in_time=doubles_time[i], in_space=i < last)
                ]
            stages += layers
        self.upsamples = CausalSequential(*stages)
        self.head = _head(dims[-1], 3 * config.patch_size**2)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.middle(self.conv1(x, cache), cache)
        return self.head(self.upsamples(x, cache), cache)


def _chunk_size(chunk: int | None, num_latent_frames: int) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of latent frames, at least 1, or None: {chunk}")
    return chunk or num_latent_frames


class WanVAE(nn.Module):
    """Both versions. Computes in the dtype of its weights; takes and returns float32.

    `chunk` is the number of latent frames run at a time, None for all of them: more is quicker and
    takes more memory, the result is the same. No call leaves anything behind on the module.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.channels_together = False

    def hold_channels_together(self) -> WanVAE:
        """Lay the weights out, and so all that is computed, as [T, H, W, C]: quick on a GPU.

        For weights that no longer change. Training still takes the layers' own forward.
        """
        for module in self.modules():
            if isinstance(module, Upsample):
                weights = fused_vae.phase_weights(module.resample[1].weight.detach())
                weights = weights.contiguous(memory_format=torch.channels_last)
                module.register_buffer("phase_weights", weights, persistent=False)
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
            elif isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        self.channels_together = True
        return self

    def encode(self, frames: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Frames [B,3,F,H,W] in [-1,1] -> normalised mean latents [B,Z,T,h,w], float32.

        F must be `n * stride[0] + 1` and H, W multiples of the stride, else ValueError.
        """
        return self.normalise(self.encode_moments(frames, chunk=chunk)[0])

    def encode_moments(self, frames: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Frames as in `encode` -> (mean, log-variance), each [B,Z,T,h,w], not normalised."""
        stride_t, stride_h, stride_w = self.config.stride
        _, _, num_frames, height, width = frames.shape
        if (num_frames - 1) % stride_t or height % stride_h or width % stride_w:
            raise ValueError(
                f"cannot encode {num_frames} frames of {width}x{height}: frames must be "
                f"{stride_t}n + 1, width a multiple of {stride_w}, height of {stride_h}"
            )
        pixels = patchify(frames.to(self.conv1.weight.dtype), self.config.patch_size)
        later = stride_t * _chunk_size(chunk, (num_frames - 1) // stride_t + 1)
        pieces = run_in_chunks(
            self.encoder, pixels, first=later - stride_t + 1, later=later,
            channels_together=self.channels_together,
        )  # fmt: skip
        moments = self.conv1(torch.cat(list(pieces), dim=2))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor, *, chunk: int | None = 1) -> Tensor:
        """Normalised latents [B,Z,T,h,w] -> frames [B,3,F,H,W] in [-1,1], float32."""
        return torch.cat(list(self.decode_chunks(latents, chunk=chunk)), dim=2)

    def decode_chunks(
        self, latents: Tensor, *, chunk: int | None = 1, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        """`decode`, piece by piece as they are ready: 1 frame, then `stride[0]` at a time.

        With `rows`, `latents` and the pieces are this rank's rows; every rank decodes its own.
        """
        for piece in self._decode_pieces(self.denormalise(latents), chunk, rows):
            yield piece.clamp(-1, 1)

    def decode_unclamped(self, z: Tensor, *, chunk: int | None = None) -> Tensor:
        """Latents as `encode_moments` gives them -> frames, float32: clamping stops gradients."""
        return torch.cat(list(self._decode_pieces(z, chunk)), dim=2)

    def _decode_pieces(
        self, z: Tensor, chunk: int | None, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        size = _chunk_size(chunk, z.shape[2])
        hidden = self.conv2(z.to(self.conv2.weight.dtype))
        pieces = run_in_chunks(
            self.decoder, hidden, first=size, later=size,
            channels_together=self.channels_together, rows=rows,
        )  # fmt: skip
        for piece in pieces:
            yield unpatchify(piece, self.config.patch_size).float()

    def normalise(self, z: Tensor) -> Tensor:
        """The VAE's own latents -> the transformer's: (z - mean) / std per channel, float32."""
        mean, std = self._statistics(z)
        return (z.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The transformer's latents -> the VAE's own: latents * std + mean per channel."""
        mean, std = self._statistics(latents)
        return latents.float() * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Made at each call: buffers would be lost by building on the meta device, and rounded by
        # `.to(bfloat16)`.
        numbers = (self.config.latents_mean, self.config.latents_std)
        pair = torch.tensor(numbers, dtype=torch.float32, device=like.device)
        mean, std = pair.view(2, 1, -1, 1, 1, 1)
        return mean, std
