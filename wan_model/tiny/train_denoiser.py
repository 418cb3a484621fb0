"""Training of the tiny experts: velocities of noised latents, each expert on its own noise range.

Owns the pool of encoded clips, the flow-matching loss and where fresh weights come from. Knows
nothing about time limits, checkpoints or judging.

An expert is trained on exactly what inference shows it: whole timesteps on the model's own shift,
prompts padded to `text_len` with attended zero rows, and, for one clip in ten, the prompt that
guidance subtracts. That is the default negative prompt ("<unk> </s>" to this tokenizer) or, half of
the time, an empty one.

Shapes: B clips of a batch, N clips of the pool, Z T H W latents, L tokens of the longest prompt,
D text_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from wan_model.config import NUM_TRAIN_TIMESTEPS, Expert, WanConfig
from wan_model.parallel import SequenceParallel
from wan_model.text_encoder import PAD_TOKEN_ID, build_umt5, clean_prompt
from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.loop import Loss
from wan_model.tiny.train_vae import to_pixels
from wan_model.transformer import TextContext, WanTransformer, is_float32_island
from wan_model.vae import WanVAE

LEARNING_RATE = 1.5e-3
BATCH_SIZES = {"t2v": 128, "i2v": 128, "ti2v": 256}
"""Per expert. A clip is 320 tokens."""

DROPPED_PROMPTS = 0.1
CLEAN_FIRST_FRAMES = 0.6
"""Share of TI2V's clips whose first latent frame is given; the others are text only."""


@dataclass(frozen=True, kw_only=True)
class LatentPool:
    """Encoded clips on the device: all that the loss reads.

    latents [N,Z,T,H,W] float16, token_ids [N,L], dropped_ids [2,L]: what stands for no prompt;
    image_latents as latents, the first image followed by grey frames, or None.
    """

    latents: Tensor
    token_ids: Tensor
    dropped_ids: Tensor
    image_latents: Tensor | None = None


def fill_pool(
    workers: ClipWorkers,
    vae: WanVAE,
    tokenizer: Tokenizer,
    config: WanConfig,
    *,
    num_clips: int,
    seed: int,
    device: torch.device,
) -> LatentPool:
    """Renders and encodes `num_clips` training clips."""
    num_frames = config.num_frames
    shape = config.latent_shape(width=config.width, height=config.height, num_frames=num_frames)
    latents = torch.empty((num_clips, *shape), dtype=torch.float16, device=device)
    images = torch.empty_like(latents) if config.needs_image else None
    captions = [""] * num_clips
    for start, frames, texts in workers.render(num_clips, seed=seed):
        part = slice(start, start + len(texts))
        frames = frames.to(device)
        latents[part] = encode(vae, frames)
        if images is not None:
            images[part] = encode_first_frames(vae, frames)
        captions[part] = texts
    dropped = [config.negative_prompt, ""]
    rows = [token_ids(tokenizer, text) for text in (*captions, *dropped)]
    # One row beyond the longest, so that the last one is padding; eights suit the kernels.
    length = -(-(max(map(len, rows)) + 1) // 8) * 8
    ids = torch.tensor([row + [PAD_TOKEN_ID] * (length - len(row)) for row in rows], device=device)
    return LatentPool(
        latents=latents,
        token_ids=ids[:num_clips],
        dropped_ids=ids[num_clips:],
        image_latents=images,
    )


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(clean_prompt(text)).ids


@torch.no_grad()
def encode(vae: WanVAE, frames: Tensor) -> Tensor:
    """uint8 [B,F,H,W,3] -> normalised latents [B,Z,T,h,w]."""
    return vae.encode(to_pixels(frames), chunk=None)


@torch.no_grad()
def encode_first_frames(vae: WanVAE, frames: Tensor) -> Tensor:
    """Latents of the first frame followed by zeros, which are grey: what an I2V expert is shown."""
    pixels = to_pixels(frames)
    pixels[:, :, 1:] = 0
    return vae.encode(pixels, chunk=None)


def with_mask(image_latents: Tensor) -> Tensor:
    """[B,Z,T,H,W] -> [B,4+Z,T,H,W]: the mask that says that the first frame alone is given."""
    mask = torch.zeros_like(image_latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, image_latents], dim=1)


# ------------------------------------------------------------------------------------ networks


def build_expert(config: WanConfig, *, device: torch.device, dtype: torch.dtype) -> WanTransformer:
    """Fresh weights, with which the velocity is about the noised latents themselves.

    That is the noise, most of the velocity: the head undoes the patch embedding. (The reference
    begins with a head of zeros and spends the first hundreds of iterations on learning this.)
    """
    expert = WanTransformer(config.transformer)
    for module in expert.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for layer in (*expert.text_embedding, *expert.time_embedding):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    patches = expert.patch_embedding.weight  # [D, C, pt, ph, pw]; tokens have C last
    nn.init.zeros_(expert.patch_embedding.bias)
    nn.init.orthogonal_(patches.flatten(1))
    noise = patches.detach()[:, : config.vae.z_dim].permute(2, 3, 4, 1, 0).flatten(0, 3)
    stream_rms = (noise.shape[0] / noise.shape[1]) ** 0.5
    with torch.no_grad():
        expert.head.head.weight.copy_(stream_rms * noise)
    return to_precision(expert, device=device, dtype=dtype)


def to_precision(
    expert: WanTransformer, *, device: torch.device, dtype: torch.dtype
) -> WanTransformer:
    """As a checkpoint is loaded for inference: `dtype`, the float32 islands kept."""
    for name, parameter in expert.named_parameters():
        kept = torch.float32 if is_float32_island(name) else dtype
        parameter.data = parameter.data.to(device, kept)
    return expert


def num_stacked(name: str, parameter: Tensor) -> int:
    """How many matrices `Muon` is to see in a weight of an expert: a fused q, k, v is three.

    Embeddings, the head, everything of one dimension and the text encoder are AdamW's.
    """
    if ".blocks." not in name or parameter.dim() != 2:
        return 0
    return {"qkv": 3, "kv": 2}.get(name.split(".")[-2], 1)


def compile_blocks(experts: Iterable[WanTransformer]) -> None:
    """Fuses the float32 parts between the matrix products: half the time of an iteration."""
    for expert in experts:
        for block in expert.blocks:
            block.compile(dynamic=False)


def widen_for_images(weights: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """A T2V expert's weights for an I2V expert, which at first ignores the new channels."""
    widened = dict(weights)
    old = weights["patch_embedding.weight"]
    new = old.new_zeros(old.shape[0], in_channels, *old.shape[2:])
    new[:, : old.shape[1]] = old
    widened["patch_embedding.weight"] = new
    return widened


def with_trunk_of(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A T2V expert's weights for a network with another VAE: only its latents' ways in and out
    (the patch embedding and the head) are `fresh`."""
    own = ("patch_embedding.", "head.")
    return {name: fresh[name] if name.startswith(own) else t for name, t in weights.items()}


def embed_prompts(text_encoder: UMT5EncoderModel, ids_BL: Tensor) -> Tensor:
    """[B,L,D] float32, rows of padding zero.

    The encoder's own forward, less what cannot be in a CUDA graph: transformers makes its mask
    from numbers in host memory.
    """
    is_token_BL = ids_BL != PAD_TOKEN_ID
    x = text_encoder.shared(ids_BL)
    mask = torch.zeros_like(is_token_BL, dtype=torch.float32)
    mask = mask.masked_fill(~is_token_BL, torch.finfo(torch.float32).min)[:, None, None]
    for block in text_encoder.encoder.block:
        attention_layer, ffn_layer = block.layer
        x = x + _attend(attention_layer.SelfAttention, attention_layer.layer_norm(x), mask)
        x = ffn_layer(x)
    hidden = text_encoder.encoder.final_layer_norm(x)
    return hidden.float() * is_token_BL[..., None]


def _attend(layer: nn.Module, x_BLD: Tensor, mask_B11L: Tensor) -> Tensor:
    """UMT5's attention: not divided by the root of d_kv, a learned bias by distance."""
    length = x_BLD.shape[1]
    q, k, v = (
        project(x_BLD).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
        for project in (layer.q, layer.k, layer.v)
    )
    bias = layer.compute_bias(length, length, device=x_BLD.device)
    scores = (q @ k.transpose(2, 3) + bias).float() + mask_B11L
    return layer.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------- loss


def noise_ranges(config: WanConfig) -> dict[Expert, tuple[float, float]]:
    """Per expert the range of u whose sigma = k u / (1 + (k - 1) u), k the shift, it denoises."""
    if config.boundary_ratio is None:
        return {Expert.HIGH_NOISE: (0.0, 1.0)}
    sigma, k = config.boundary_ratio, config.shift
    middle = sigma / (k - (k - 1) * sigma)
    return {Expert.HIGH_NOISE: (middle, 1.0), Expert.LOW_NOISE: (0.0, middle)}


def denoising_loss(
    experts: Mapping[Expert, WanTransformer],
    text_encoder: UMT5EncoderModel,
    pool: LatentPool,
    config: WanConfig,
    *,
    batch_size: int,
    attention_backend: str = "sdpa",
) -> Loss:
    """Mean squared error of the velocity, noise - x0; the parts are the experts'.

    Of the attention kernels, PyTorch's own has a gradient on every device.
    """
    sp = SequenceParallel(None, attention_backend)
    ranges = noise_ranges(config)

    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draw = _Draws(pool.latents.device, generator)
        num_clips = len(pool.latents)
        chosen = [draw.integers(num_clips, batch_size) for _ in experts]
        ids = torch.cat([_drop_prompts(pool, clip_B, draw) for clip_B in chosen])
        embeds = embed_prompts(text_encoder, ids).split(batch_size)
        parts = [
            _expert_loss(expert, ranges[name], pool, clip_B, embeds_BLD, config, sp, draw)
            for (name, expert), clip_B, embeds_BLD in zip(
                experts.items(), chosen, embeds, strict=True
            )
        ]
        return torch.stack(parts).sum(), torch.stack(parts)

    return loss


class _Draws:
    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        self._where = {"device": device, "generator": generator}

    def integers(self, high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), **self._where)

    def uniform(self, size: int) -> Tensor:
        return torch.rand(size, **self._where)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, **self._where)


def _drop_prompts(pool: LatentPool, clip_B: Tensor, draw: _Draws) -> Tensor:
    """[B,L]: the clips' prompts, some replaced by what guidance subtracts."""
    size = len(clip_B)
    is_dropped = draw.uniform(size) < DROPPED_PROMPTS
    instead = pool.dropped_ids[draw.integers(len(pool.dropped_ids), size)]
    return torch.where(is_dropped[:, None], instead, pool.token_ids[clip_B])


def _expert_loss(
    expert: WanTransformer,
    noise_range: tuple[float, float],
    pool: LatentPool,
    clip_B: Tensor,
    embeds_BLD: Tensor,
    config: WanConfig,
    sp: SequenceParallel,
    draw: _Draws,
) -> Tensor:
    x0 = pool.latents[clip_B].float()
    batch_size = len(x0)
    low, high = noise_range
    # One u in each of B equal parts of the range: the batch always covers it all.
    places = torch.arange(batch_size, device=x0.device)
    u = low + (high - low) * (places + draw.uniform(batch_size)) / batch_size
    sigma = config.shift * u / (1 + (config.shift - 1) * u)
    timestep = (sigma * NUM_TRAIN_TIMESTEPS).floor()
    sigma = sigma.view(-1, 1, 1, 1, 1)
    noise = draw.normal(x0.shape)
    latents = (1 - sigma) * x0 + sigma * noise
    # The last row is padding, which is attended to as often as text_len wants.
    context = expert.embed_text(list(embeds_BLD[:, :-1]))
    if config.task == "ti2v":
        is_clean = draw.uniform(batch_size) < CLEAN_FIRST_FRAMES
        return _first_frame_loss(expert, latents, x0, noise, timestep, is_clean, context, sp)
    if pool.image_latents is not None:
        latents = torch.cat([latents, with_mask(pool.image_latents[clip_B].float())], dim=1)
    velocity = expert(latents, timestep[:, None], context, sp)
    return (velocity - (noise - x0)).square().mean()


def _first_frame_loss(
    expert: WanTransformer,
    latents: Tensor,
    x0: Tensor,
    noise: Tensor,
    timestep: Tensor,
    is_clean: Tensor,
    context: TextContext,
    sp: SequenceParallel,
) -> Tensor:
    """TI2V: where `is_clean`, the first latent frame is the image's, at time 0, and no target."""
    clean_B1111 = is_clean.view(-1, 1, 1, 1, 1)
    first = torch.where(clean_B1111, x0[:, :, :1], latents[:, :, :1])
    latents = torch.cat([first, latents[:, :, 1:]], dim=2)
    first_timestep = torch.where(is_clean, 0.0, timestep)
    velocity = expert(latents, torch.stack([first_timestep, timestep], dim=1), context, sp)
    error = (velocity - (noise - x0)).square()
    counts = torch.ones_like(error[:, :1, :, :1, :1])
    counts[:, :, :1] = (~clean_B1111).float()
    return (error * counts).sum() / (counts.expand_as(error).sum())


def build_text_encoder(
    config: WanConfig, *, device: torch.device, dtype: torch.dtype
) -> UMT5EncoderModel:
    """Fresh weights, without dropout."""
    return build_umt5(config.text_encoder).to(device, dtype).eval()
