"""What trained tiny models make of held-out prompts: batched sampling, scores, pictures.

Owns the sampling loop over a batch (the service runs one job at a time) and the contact sheets.
Knows nothing about training; what a clip shows is `judge`'s to say.

Shapes: B videos, Z T H W latents, F frames, h w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5EncoderModel

from wan_model.config import Expert, WanConfig
from wan_model.parallel import SequenceParallel
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.solver import solver_step
from wan_model.state import DenoiseState, draw_noise
from wan_model.text_encoder import PAD_TOKEN_ID
from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.data import Clip
from wan_model.tiny.judge import psnr
from wan_model.tiny.train_denoiser import (
    embed_prompts,
    encode,
    encode_first_frames,
    token_ids,
    with_mask,
)
from wan_model.tiny.train_vae import decode_to_frames
from wan_model.transformer import TextContext, WanTransformer
from wan_model.vae import WanVAE

Experts = Mapping[Expert, WanTransformer]


@dataclass(frozen=True, kw_only=True)
class Models:
    """A complete trained model, in the precision it is served in."""

    config: WanConfig
    experts: Experts
    text_encoder: UMT5EncoderModel
    tokenizer: Tokenizer
    vae: WanVAE
    attention: str = "auto"

    @property
    def device(self) -> torch.device:
        return self.vae.conv1.weight.device


# ------------------------------------------------------------------------------------ sampling


@torch.inference_mode()
def sample(
    models: Models,
    prompts: Sequence[str],
    *,
    first_frames: Tensor | None = None,
    experts: Experts | None = None,
    guidance: float | None = None,
    num_steps: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Latents [B,Z,T,H,W] float32 of one video a prompt, with the model's default numbers.

    first_frames: uint8 [B,h,w,3] for the models that take an image. `experts` may be others than
    the model's own; video i is drawn from `seed + i`.
    """
    config, experts = models.config, experts or models.experts
    params = VideoParams.for_model(config, guidance=guidance, num_steps=num_steps, seed=seed)
    schedule = build_schedule(params)
    shape = params.latent_shape(config)
    noise = torch.stack([draw_noise(shape, seed + i) for i in range(len(prompts))])
    state = DenoiseState(latents=noise.to(models.device))
    images, first = _image_conditioning(models, first_frames, params.num_frames)
    contexts = {name: _contexts(models, expert, prompts) for name, expert in experts.items()}
    guidances = {
        Expert.HIGH_NOISE: params.guidance_high_noise,
        Expert.LOW_NOISE: params.guidance_low_noise,
    }
    sp = SequenceParallel(attention_backend=models.attention)
    for step_index, timestep in enumerate(schedule.timesteps):
        name = schedule.expert_at(step_index)
        state = _with_first_frame(state, first)
        latents = state.latents if images is None else torch.cat([state.latents, images], dim=1)
        rows = [timestep] if first is None else [0.0, timestep]
        timesteps = torch.tensor([rows] * len(prompts), device=models.device)
        cond, uncond = (
            experts[name](latents, timesteps, context, sp) for context in contexts[name]
        )
        noise_pred = uncond + guidances[name] * (cond - uncond)
        state = solver_step(params.solver, state, noise_pred, schedule)
    return _with_first_frame(state, first).latents


def _image_conditioning(
    models: Models, first_frames: Tensor | None, num_frames: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mask and image channels of I2V, clean first latent frame of TI2V)."""
    if first_frames is None:
        return None, None
    frames = first_frames.to(models.device)[:, None]
    if models.config.task == "ti2v":
        return None, encode(models.vae, frames)
    frames = frames.expand(-1, num_frames, -1, -1, -1)
    pieces = [encode_first_frames(models.vae, piece) for piece in frames.split(20)]
    return with_mask(torch.cat(pieces)), None


def _contexts(
    models: Models, expert: WanTransformer, prompts: Sequence[str]
) -> tuple[TextContext, TextContext]:
    """The prompts' and the negative prompt's."""
    rows = [token_ids(models.tokenizer, text) for text in (*prompts, models.config.negative_prompt)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD_TOKEN_ID] * (length - len(row)) for row in rows])
    embeds = embed_prompts(models.text_encoder, ids.to(models.device))
    trimmed = [e[: len(row)] for e, row in zip(embeds, rows, strict=True)]
    return expert.embed_text(trimmed[:-1]), expert.embed_text(trimmed[-1:] * len(prompts))


def _with_first_frame(state: DenoiseState, first: Tensor | None) -> DenoiseState:
    if first is None:
        return state
    return replace(state, latents=torch.cat([first, state.latents[:, :, 1:]], dim=2))


# ------------------------------------------------------------------------------------- scoring


def reconstructions(vae: WanVAE, clips: Sequence[Clip]) -> list[np.ndarray]:
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    device = vae.conv1.weight.device
    latents = torch.cat([encode(vae, piece.to(device)) for piece in frames.split(20)])
    return decode_to_frames(vae, latents)


def score_vae(
    workers: ClipWorkers, clips: Sequence[Clip], videos: Sequence[np.ndarray]
) -> dict[str, float]:
    """Mean PSNR in dB, and the judge's shares right on the reconstructions."""
    mean = np.mean([psnr(clip.frames, video) for clip, video in zip(clips, videos, strict=True)])
    return {"psnr_db": float(mean)} | workers.score([clip.scene for clip in clips], videos)


def expert_variants(experts: Experts) -> dict[str, Experts]:
    """The model as it is, and what shows that its two experts differ."""
    if len(experts) == 1:
        return {"default": experts}
    high, low = experts[Expert.HIGH_NOISE], experts[Expert.LOW_NOISE]
    pairs = {
        "default": (high, low),
        "swapped": (low, high),
        "high noise only": (high, high),
        "low noise only": (low, low),
    }
    return {name: dict(zip(experts, pair, strict=True)) for name, pair in pairs.items()}


def score_model(
    models: Models,
    workers: ClipWorkers,
    clips: Sequence[Clip],
    *,
    with_images: bool,
    experts: Experts | None = None,
    guidance: float | None = None,
    num_steps: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
) -> tuple[dict[str, float], list[np.ndarray]]:
    """(shares right, and with images the mean PSNR of the first frame; the videos)."""
    videos: list[np.ndarray] = []
    for start in range(0, len(clips), batch_size):
        piece = clips[start : start + batch_size]
        first = torch.from_numpy(np.stack([clip.frames[0] for clip in piece]))
        latents = sample(
            models,
            [clip.caption for clip in piece],
            first_frames=first if with_images else None,
            experts=experts,
            guidance=guidance,
            num_steps=num_steps,
            seed=seed + start,
        )
        videos += decode_to_frames(models.vae, latents)
    scores = workers.score([clip.scene for clip in clips], videos)
    if with_images:
        pairs = zip(clips, videos, strict=True)
        scores["first_frame_psnr_db"] = float(np.mean([psnr(c.frames[0], v[0]) for c, v in pairs]))
    return scores, videos


# ------------------------------------------------------------------------------------ pictures


def contact_sheet(
    path: Path,
    captions: Sequence[str],
    videos: Sequence[np.ndarray],
    *,
    num_columns: int = 2,
    num_shown: int = 5,
) -> None:
    """A PNG: each video's first, last and some frames between, its caption above them."""
    line, gap = 14, 6
    num_frames, height, width, _ = videos[0].shape
    shown = np.linspace(0, num_frames - 1, num_shown).astype(int)
    cell = (num_shown * width + gap, height + line + gap)
    num_rows = math.ceil(len(videos) / num_columns)
    sheet = Image.new("RGB", (num_columns * cell[0], num_rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, video) in enumerate(zip(captions, videos, strict=True)):
        row, column = divmod(number, num_columns)
        left, top = column * cell[0], row * cell[1]
        draw.text((left + 2, top + 1), text[: num_shown * width // 6], fill="black")
        strip = np.concatenate(list(video[shown]), axis=1)
        sheet.paste(Image.fromarray(strip), (left, top + line))
    sheet.quantize(256).save(path, optimize=True)  # a third of the bytes
