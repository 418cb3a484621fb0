"""What a lower precision or step reuse changes in the videos of a trained model, beside float32.

Owns the precisions and thresholds that are compared and the measures: relative error of a forward
and of a whole trajectory, PSNR and SSIM of the frames, and what the judge sees. The noise is the
same everywhere.
Runs on a CPU, where fp8 is emulated: the same fp8 numbers, multiplied in float32.

    python -m benchmarks.quality --output benchmarks/results/quality.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.errors import relative_rms
from benchmarks.gpu_timing import machine
from wan_model.engine import ExpertEngine, TextEncoderEngine
from wan_model.fp8 import quantise_blocks
from wan_model.parallel import SequenceParallel
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.data import Clip
from wan_model.tiny.evaluate import Models, sample
from wan_model.tiny.score import load_models
from wan_model.tiny.train_vae import decode_to_frames

PRECISIONS = ("float32", "bf16", "fp8", "fp8-attention")
CACHES = (0.03, 0.07)  # reuse about a quarter and a half of 40 steps
SEED = 3 << 32


def models_in(checkpoint: str, precision: str, device: str) -> Models:
    """Only the experts are in `precision`: what is before and after them stays float32."""
    models = load_models(checkpoint, device=device, dtype=torch.float32)
    if precision == "float32":
        return models
    experts = load_models(checkpoint, device=device, dtype=torch.bfloat16).experts
    if precision.startswith("fp8"):
        for expert in experts.values():
            quantise_blocks(expert.blocks)
    attention = "fp8" if precision == "fp8-attention" else "auto"
    return replace(models, experts=experts, attention=attention)


# ----------------------------------------------------------------------------------- measures


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Of 8-bit videos, over all frames; those that are equal count as one value off by one."""
    mse = max(np.square(a.astype(np.float64) - b).mean(), 1 / a.size)
    return float(10 * np.log10(255**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of the luma of 8-bit videos [F, H, W, 3], mean over all windows.

    Wang et al. 2004: Gaussian windows of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    x, y = (torch.from_numpy(v).double() @ weights for v in (a, b))
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blurred(frames_FHW: Tensor) -> Tensor:
        return F.conv2d(frames_FHW[:, None], window)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def compare_videos(videos: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> dict[str, float]:
    pairs = list(zip(videos, exact, strict=True))
    psnrs, ssims = [psnr_db(*pair) for pair in pairs], [ssim(*pair) for pair in pairs]
    return {
        "psnr_db": float(np.mean(psnrs)), "lowest_psnr_db": min(psnrs),
        "ssim": float(np.mean(ssims)), "lowest_ssim": min(ssims),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- runs


@torch.inference_mode()
def one_forward(models: Models, prompt_embeds: Sequence[Tensor], latents: Tensor) -> Tensor:
    """What every expert predicts at its first timestep, for the same latents."""
    schedule = build_schedule(VideoParams.for_model(models.config))
    predictions = []
    for name, expert in models.experts.items():
        step = next(i for i in range(schedule.num_steps) if schedule.expert_at(i) is name)
        timesteps = torch.full((len(latents), 1), schedule.timesteps[step])
        text = expert.embed_text(list(prompt_embeds))
        sp = SequenceParallel(attention_backend=models.attention)
        predictions.append(expert(latents, timesteps, text, sp))
    return torch.stack(predictions)


def sample_with_cache(
    checkpoint: str, prompts: Sequence[str], num_steps: int, threshold: float, device: str
) -> tuple[Tensor, float]:
    """(latents [B, Z, T, H, W] float32, share of the steps that were reused), by the engines of the
    service one video after another: each decides for itself."""
    where = {"checkpoint": checkpoint, "device": device, "dtype": "float32"}
    text = TextEncoderEngine(**where)
    config = load_models(checkpoint, device=device, dtype=torch.float32).config
    experts = {expert: ExpertEngine(**where, expert=expert.value) for expert in config.experts}
    latents, num_reused = [], 0
    for i, prompt in enumerate(prompts):
        embeds = text.encode([prompt, config.negative_prompt])
        conditioning = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
        params = VideoParams.for_model(config, num_steps=num_steps, seed=SEED + i, cache=threshold)
        schedule, state = build_schedule(params), None
        while state is None or int(state["step_index"]) < num_steps:
            step = 0 if state is None else int(state["step_index"])
            engine = experts[schedule.expert_at(step)]
            engine.open("v", params=asdict(params), conditioning=conditioning, state=state)
            for _ in range(step, schedule.end_of(step)):
                num_reused += engine.step("v")["reused"]
            state = engine.export("v")
        latents.append(torch.from_numpy(state["latents"]))
    return torch.stack(latents).to(device), num_reused / (num_steps * len(prompts))


def measure(checkpoint: str, clips: Sequence[Clip], num_steps: int, device: str) -> list[dict]:
    """A row per precision and per threshold of step reuse; the last is the decoder in bfloat16 on
    the exact latents."""
    workers, rows = ClipWorkers(0), []
    exact: dict[str, object] = {}
    prompts, scenes = [clip.caption for clip in clips], [clip.scene for clip in clips]
    for precision in PRECISIONS:
        models = models_in(checkpoint, precision, device)
        text_dim = models.config.transformer.text_dim
        draw = torch.Generator().manual_seed(0)
        embeds = torch.randn(4, 8, text_dim, generator=draw).to(device)
        shape = VideoParams.for_model(models.config).latent_shape(models.config)
        noise = torch.randn(4, *shape, generator=draw).to(device)
        started = time.perf_counter()
        latents = sample(models, prompts, num_steps=num_steps, seed=SEED)
        seconds = time.perf_counter() - started
        videos = decode_to_frames(models.vae, latents)
        forward = one_forward(models, embeds, noise)
        exact = exact or {"latents": latents, "videos": videos, "forward": forward}
        row = {"precision": precision, "num_steps": num_steps, "seconds": seconds}
        row["forward_error"] = relative_rms(forward, exact["forward"])
        row["trajectory_error"] = relative_rms(latents, exact["latents"])
        rows.append(row | compare_videos(videos, exact["videos"]) | workers.score(scenes, videos))
    vae = load_models(checkpoint, device=device, dtype=torch.float32).vae
    for threshold in CACHES:
        started = time.perf_counter()
        latents, reused = sample_with_cache(checkpoint, prompts, num_steps, threshold, device)
        row = {"precision": "float32", "cache": threshold, "num_steps": num_steps}
        row |= {"seconds": time.perf_counter() - started, "reused": reused}
        row["trajectory_error"] = relative_rms(latents, exact["latents"])
        videos = decode_to_frames(vae, latents)
        rows.append(row | compare_videos(videos, exact["videos"]) | workers.score(scenes, videos))
    vae = vae.to(torch.bfloat16)
    videos = decode_to_frames(vae.hold_channels_together(), exact["latents"])
    row = {"precision": "float32, VAE bf16", "num_steps": num_steps}
    rows.append(row | compare_videos(videos, exact["videos"]) | workers.score(scenes, videos))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--checkpoint", default="wan-tiny", help="a packaged model for text")
    parser.add_argument("--clips", type=int, default=12, help="held-out prompts")
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 40])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    clips = ClipWorkers(0).held_out(args.clips, seed=3)
    content = {**machine(args.device), "checkpoint": args.checkpoint, "clips": args.clips}
    content["rows"] = []
    for num_steps in args.steps:
        rows = measure(args.checkpoint, clips, num_steps, args.device)
        content["rows"] += rows
        args.output.write_text(json.dumps(content, indent=1) + "\n")
        for row in rows:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
