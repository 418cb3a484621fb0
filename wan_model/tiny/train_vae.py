"""Training of the tiny VAEs: reconstruct clips, first in small crops, then whole.

Owns the reconstruction loss and the measured statistics of the latents. Knows nothing about time
limits, checkpoints or what the latents will be used for.

Shapes: B clips, C channels, F frames, H height, W width, Z latent channels, N clips of the pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from wan_model.config import VAEConfig
from wan_model.tiny.clips import CLIP_SHAPE, ClipWorkers
from wan_model.tiny.loop import Loss
from wan_model.vae import WanVAE

PARTS = ("l1", "mse", "chroma", "kl")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training that ends at `until` of it: random crops of this many pixels."""

    until: float
    num_frames: int
    side: int
    batch_size: int


# The same number of pixels an iteration: many small crops teach colours and edges soonest, whole
# clips the attention over a whole frame and the later chunks of time.
PHASES = (
    Phase(until=0.45, num_frames=9, side=64, batch_size=64),
    Phase(until=1.0, num_frames=17, side=128, batch_size=8),
)
LEARNING_RATE = 1e-3

# Objects cover a twentieth of a frame, and L1 alone is content to leave such a minority out:
# measured on small clips, colours are not learned at all with a weight of 4, soon with 10.
_SATURATION_WEIGHT = 10.0  # of a fully saturated pixel, beside the 1 of a grey one
_CHROMA_WEIGHT = 3.0
_KL_WEIGHT = 1e-6
_LATENT_NOISE = 0.05  # of each channel's deviation: the decoder will be fed predicted latents
_FIRST_LOG_VARIANCE = -6.0
_FIRST_BRANCH_GAIN = 0.1


def build_vae(config: VAEConfig, *, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """With fresh weights. On a GPU convolutions run channels-last: there bfloat16 is fast.

    Every convolution keeps the size of its input, and residual branches begin small: PyTorch's
    defaults halve the signal at every layer without a norm and take twice as long to learn.
    """
    vae = WanVAE(config)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                gain = _FIRST_BRANCH_GAIN if name.endswith("residual.6") else 1.0
                module.weight.normal_(std=gain / math.sqrt(module.weight[0].numel()))
                module.bias.zero_()
        vae.conv1.bias[config.z_dim :] = _FIRST_LOG_VARIANCE
    vae = vae.to(device, dtype)
    if device.type == "cuda":
        keep_channels_last(vae)
    return vae


def keep_channels_last(network: nn.Module) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def frame_pool(workers: ClipWorkers, num_clips: int, *, seed: int, device: torch.device) -> Tensor:
    """Rendered clips, uint8 [N,F,H,W,3] on the device."""
    pool = torch.empty((num_clips, *CLIP_SHAPE), dtype=torch.uint8, device=device)
    for start, frames, _ in workers.render(num_clips, seed=seed):
        pool[start : start + len(frames)].copy_(frames)
    return pool


def to_pixels(frames_BFHWC: Tensor) -> Tensor:
    """uint8 [B,F,H,W,3] -> float32 [B,3,F,H,W] in [-1,1], laid out channels last."""
    return frames_BFHWC.float().div(127.5).sub(1.0).permute(0, 4, 1, 2, 3)


def reconstruction_loss(vae: WanVAE, pool: Tensor, phase: Phase) -> Loss:
    """L1 + 2 MSE + 3 L1 of the chroma + 1e-6 KL on random crops, coloured pixels weighted."""

    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        target = to_pixels(_random_crops(pool, phase, generator))
        mean, log_variance = vae.encode_moments(target)
        log_variance = log_variance.clamp(-30.0, 20.0)
        z = mean + (0.5 * log_variance).exp() * _normal_like(mean, generator)
        deviation = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        z = z + _LATENT_NOISE * deviation * _normal_like(mean, generator)
        error = vae.decode_unclamped(z) - target
        saturation = (target.amax(1, keepdim=True) - target.amin(1, keepdim=True)) / 2
        weight = 1 + _SATURATION_WEIGHT * saturation
        weight = weight / weight.mean()
        parts = torch.stack(
            [
                (weight * error.abs()).mean(),
                (weight * error.square()).mean(),
                (weight * (error - error.mean(1, keepdim=True)).abs()).mean(),
                0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
            ]
        )
        total = parts[0] + 2 * parts[1] + _CHROMA_WEIGHT * parts[2] + _KL_WEIGHT * parts[3]
        return total, parts

    return loss


def _normal_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, device=x.device, generator=generator)


def _random_crops(pool: Tensor, phase: Phase, generator: torch.Generator) -> Tensor:
    """uint8 [B,F,H,W,3]: consecutive frames of random clips, cut at random places."""
    num_clips, num_frames, height, width, _ = pool.shape
    sizes = (phase.num_frames, phase.side, phase.side)

    def offsets(size: int, cut: int) -> Tensor:
        return torch.randint(
            size - cut + 1, (phase.batch_size, 1), device=pool.device, generator=generator
        ) + torch.arange(cut, device=pool.device)

    clip_B = torch.randint(num_clips, (phase.batch_size,), device=pool.device, generator=generator)
    t_BF, y_BH, x_BW = (
        offsets(size, cut) for size, cut in zip((num_frames, height, width), sizes, strict=True)
    )
    return pool[
        clip_B[:, None, None, None],
        t_BF[:, :, None, None],
        y_BH[:, None, :, None],
        x_BW[:, None, None, :],
    ]


# -------------------------------------------------------------------------------- trained VAEs


@torch.no_grad()
def measure_statistics(vae: WanVAE, pool: Tensor, *, num_clips: int = 512) -> VAEConfig:
    """The VAE's config with the mean and deviation of each channel of its own latents."""
    means = [vae.encode_moments(to_pixels(frames))[0] for frames in pool[:num_clips].split(32)]
    z_ZN = torch.cat(means).transpose(0, 1).flatten(1).double()
    mean, deviation = z_ZN.mean(1), z_ZN.std(1)
    # A channel that carries nothing must not be blown up to carry noise.
    deviation = deviation.clamp(min=0.01 * float(deviation.max()))
    return replace(
        vae.config,
        latents_mean=tuple(round(v, 6) for v in mean.tolist()),
        latents_std=tuple(round(v, 6) for v in deviation.tolist()),
    )


@torch.no_grad()
def decode_to_frames(vae: WanVAE, latents: Tensor, *, batch_size: int = 20) -> list[np.ndarray]:
    """Normalised latents [B,Z,T,h,w] -> uint8 [F,H,W,3] each, as the service makes them."""
    videos = []
    for piece in latents.split(batch_size):
        frames = (vae.decode(piece, chunk=None) + 1) / 2 * 255
        videos += list(frames.to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy())
    return videos
