"""`python -m wan_model.tiny.train --stage vae --out RUNS --minutes 4`: trains wan-tiny on one GPU.

Owns the five stages, what each needs of the others, and their files under RUNS/<stage>. Knows
nothing about losses or loops. The order is vae, t2v, i2v and vae22, ti2v (which takes t2v's text
encoder); then `--stage export` writes the checkpoints and the model card.

    weights.safetensors   running average of the weights, float32: what later stages read
    report.json           losses, seconds, the command, scores on held-out clips
    samples.png           some of those clips
    training.pt           for --resume
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan_model.config import Expert, VAEConfig, WanConfig
from wan_model.tiny import train_denoiser, train_vae
from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.evaluate import (
    Models,
    contact_sheet,
    expert_variants,
    reconstructions,
    score_model,
    score_vae,
)
from wan_model.tiny.export import export
from wan_model.tiny.loop import Loop, Schedule
from wan_model.tiny.networks import MODELS, caption_tokenizer
from wan_model.transformer import is_float32_island
from wan_model.vae import WanVAE

State = dict[str, Tensor]

TRAINING_SEED = 1
HELD_OUT_SEED = 2
NUM_SHOWN = 16

VAE_OF = {"t2v": "vae", "i2v": "vae", "ti2v": "vae22"}
VAE_CONFIGS = {"vae": MODELS["t2v"].vae, "vae22": MODELS["ti2v"].vae}
# What is left of --minutes for scores and files.
EVALUATION_S = {"vae": 15.0, "vae22": 15.0, "t2v": 50.0, "i2v": 50.0, "ti2v": 40.0}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One stage as it was asked for."""

    stage: str
    out: Path
    device: torch.device
    dtype: torch.dtype | None
    started_s: float
    minutes: float | None
    num_iterations: int | None
    num_clips: int
    num_evaluated: int
    num_steps: int | None
    batch_size: int | None
    learning_rate: float | None
    resume: Path | None
    attention_backend: str
    command: str

    @property
    def folder(self) -> Path:
        return self.out / self.stage

    def schedule(self, learning_rate: float, **numbers) -> Schedule:
        """What remains of the minutes now, less the time for the evaluation."""
        rate = self.learning_rate or learning_rate
        if self.num_iterations is not None:
            return Schedule(learning_rate=rate, num_iterations=self.num_iterations, **numbers)
        elapsed_s = time.monotonic() - self.started_s
        seconds = self.minutes * 60 - EVALUATION_S[self.stage] - elapsed_s
        if seconds < 1:
            raise ValueError(f"--minutes {self.minutes:g} leaves no time to train {self.stage}")
        return Schedule(learning_rate=rate, seconds=seconds, **numbers)

    def log(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {self.stage}: {message}", flush=True)

    def weights_of(self, stage: str) -> State:
        path = self.out / stage / "weights.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run --stage {stage} first")
        return load_file(path)

    def finish(self, loop: Loop, scores: dict) -> None:
        """Writes the report; the weights were written before the evaluation."""
        report = {
            "stage": self.stage,
            "command": self.command,
            "device": _device_name(self.device),
            "seconds": round(time.monotonic() - self.started_s, 1),
            "iterations": loop.iteration,
            "clips": self.num_clips,
            "parameters": loop.weights.numel(),
            "scores": scores,
            "losses": loop.history,
        }
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        self.log(f"scores {json.dumps(scores)}")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# --------------------------------------------------------------------------------------- VAEs


def run_vae(run: Run, workers: ClipWorkers) -> None:
    config = VAE_CONFIGS[run.stage]
    pool = train_vae.frame_pool(workers, run.num_clips, seed=TRAINING_SEED, device=run.device)
    run.log(f"{run.num_clips} clips rendered")
    dtype = run.dtype or _faster_dtype(run, config, pool)
    vae = train_vae.build_vae(config, device=run.device, dtype=dtype)
    loop = Loop(
        {"vae": vae},
        run.schedule(train_vae.LEARNING_RATE),
        part_names=train_vae.PARTS,
        device=run.device,
    )
    _resume(run, loop)
    for phase in train_vae.PHASES:
        if run.batch_size:
            phase = replace(phase, batch_size=run.batch_size)
        run.log(f"{phase}")
        loss = train_vae.reconstruction_loss(vae, pool, phase)
        loop.run(loss, until=phase.until, checkpoint=run.folder / "training.pt")

    averaged = _part(loop.averaged(), "vae")
    served = load_vae(averaged, config, run.device)
    measured = train_vae.measure_statistics(served, pool)
    statistics = {
        "latents_mean": torch.tensor(measured.latents_mean),
        "latents_std": torch.tensor(measured.latents_std),
    }
    save_file({f"vae.{k}": t for k, t in averaged.items()} | statistics, _weights_path(run))
    clips = workers.held_out(run.num_evaluated, seed=HELD_OUT_SEED)
    videos = reconstructions(load_vae(averaged, measured, run.device), clips)
    shown = [
        video for clip, made in zip(clips, videos, strict=True) for video in (clip.frames, made)
    ]
    captions = [text for clip in clips for text in (clip.caption, "(reconstructed)")]
    contact_sheet(run.folder / "samples.png", captions[:NUM_SHOWN], shown[:NUM_SHOWN])
    run.finish(loop, {"held out": score_vae(workers, clips, videos)})


def _faster_dtype(run: Run, config: VAEConfig, pool: Tensor) -> torch.dtype:
    """Whether cuDNN's small 3D convolutions are faster in bfloat16 or in TF32 differs by version."""
    if run.device.type != "cuda":
        return torch.float32
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        vae = train_vae.build_vae(config, device=run.device, dtype=dtype)
        loss = train_vae.reconstruction_loss(vae, pool, train_vae.PHASES[-1])
        schedule = run.schedule(train_vae.LEARNING_RATE)
        loop = Loop({"vae": vae}, schedule, part_names=train_vae.PARTS, device=run.device)
        seconds[dtype] = loop.measure_s(loss)
    run.log(", ".join(f"{dtype} {1e3 * s:.1f} ms" for dtype, s in seconds.items()))
    return min(seconds, key=seconds.__getitem__)


def load_vae(weights: Mapping[str, Tensor], config: VAEConfig, device: torch.device) -> WanVAE:
    """As it will be served: float32, its weights rounded to the bfloat16 of the files."""
    vae = WanVAE(config)
    vae.load_state_dict({name: t.bfloat16().float() for name, t in weights.items()})
    vae = vae.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        train_vae.keep_channels_last(vae)
    return vae


def trained_vae(run: Run, stage: str) -> WanVAE:
    weights = run.weights_of(stage)
    config = replace(
        VAE_CONFIGS[stage],
        latents_mean=tuple(weights["latents_mean"].tolist()),
        latents_std=tuple(weights["latents_std"].tolist()),
    )
    return load_vae(_part(weights, "vae"), config, run.device)


# ------------------------------------------------------------------------------------ denoisers


def run_denoiser(run: Run, workers: ClipWorkers) -> None:
    if run.device.type == "cuda":
        train_denoiser.require_trainable_attention(run.device)
    vae = trained_vae(run, VAE_OF[run.stage])
    config = replace(MODELS[run.stage], vae=vae.config)
    tokenizer = caption_tokenizer()
    pool = train_denoiser.fill_pool(
        workers,
        vae,
        tokenizer,
        config,
        num_clips=run.num_clips,
        seed=TRAINING_SEED,
        device=run.device,
    )
    run.log(f"{run.num_clips} clips encoded, prompts of up to {pool.token_ids.shape[1]} tokens")
    experts, text_encoder, trained = _denoiser_networks(run, config)
    loop = Loop(
        trained,
        run.schedule(train_denoiser.LEARNING_RATE, betas=(0.9, 0.99)),
        part_names=tuple(expert.value for expert in experts),
        device=run.device,
    )
    _resume(run, loop)
    loss = train_denoiser.denoising_loss(
        experts,
        text_encoder,
        pool,
        config,
        batch_size=run.batch_size or train_denoiser.BATCH_SIZES[run.stage],
        attention_backend=run.attention_backend,
    )
    loop.run(loss, checkpoint=run.folder / "training.pt")
    averaged = loop.averaged()
    save_file(averaged, _weights_path(run))

    models = Models(
        config=config,
        experts={name: _served(expert, averaged, name) for name, expert in experts.items()},
        text_encoder=_served(text_encoder, averaged, "text_encoder"),
        tokenizer=tokenizer,
        vae=vae,
    )
    run.finish(loop, _score_denoiser(run, models, workers))


def _denoiser_networks(
    run: Run, config: WanConfig
) -> tuple[dict[Expert, nn.Module], nn.Module, dict[str, nn.Module]]:
    """(experts, text encoder, what of them is trained). Only T2V trains the text encoder."""
    by_device = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    where = {"device": run.device, "dtype": run.dtype or by_device}
    experts = {name: train_denoiser.build_expert(config, **where) for name in config.experts}
    text_encoder = train_denoiser.build_text_encoder(config, **where)
    trained: dict[str, nn.Module] = {name.value: expert for name, expert in experts.items()}
    if run.stage == "t2v":
        return experts, text_encoder, trained | {"text_encoder": text_encoder}
    weights = run.weights_of("t2v")
    _load(text_encoder, _part(weights, "text_encoder"))
    text_encoder.requires_grad_(False)
    if run.stage == "i2v":
        for name, expert in experts.items():
            part = _part(weights, name.value)
            channels = config.transformer.in_channels
            _load(expert, train_denoiser.widen_for_images(part, channels))
    return experts, text_encoder, trained


def _score_denoiser(run: Run, models: Models, workers: ClipWorkers) -> dict:
    """Scores by way of asking; the first way's videos are also shown."""
    clips = workers.held_out(run.num_evaluated, seed=HELD_OUT_SEED)
    ways: dict[str, dict] = {}
    if run.stage == "ti2v":
        ways["image and text"] = {"with_images": True}
    for name, experts in expert_variants(models.experts).items():
        ways[name] = {"with_images": run.stage == "i2v", "experts": experts}
    if run.num_steps is None:
        for guidance in (1.0, 2.0, 6.0):
            ways[f"guidance {guidance:g}"] = {
                "with_images": run.stage == "i2v",
                "guidance": guidance,
            }
    scores: dict[str, dict] = {}
    for name, way in ways.items():
        scores[name], videos = score_model(models, workers, clips, num_steps=run.num_steps, **way)
        run.log(f"{name}: {scores[name]}")
        if len(scores) == 1:
            captions = [clip.caption for clip in clips]
            contact_sheet(run.folder / "samples.png", captions[:NUM_SHOWN], videos[:NUM_SHOWN])
    return scores


def _served(network: nn.Module, averaged: State, name: str) -> nn.Module:
    """The network with its running average, rounded as the checkpoint will be."""
    part = _part(averaged, name)
    if part:
        _load(network, part)
    return network.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- files


def _part(weights: Mapping[str, Tensor], name: str) -> State:
    return {
        key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")
    }


@torch.no_grad()
def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into the parameters' own dtypes, by way of the bfloat16 of the files."""
    parameters = dict(network.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"weights do not fit: {sorted(parameters.keys() ^ weights.keys())[:5]}")
    for name, parameter in parameters.items():
        rounded = weights[name] if is_float32_island(name) else weights[name].bfloat16()
        parameter.copy_(rounded)


def _weights_path(run: Run) -> Path:
    return run.folder / "weights.safetensors"


def _resume(run: Run, loop: Loop) -> None:
    """From training.pt, or where that was not kept, from the averaged weights."""
    if run.resume is None:
        return
    if (path := run.resume / "training.pt").is_file():
        loop.load(path)
    else:
        loop.start_from(load_file(run.resume / "weights.safetensors"))
    run.log(f"continuing from {run.resume}, iteration {loop.iteration}")


# ------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    started_s = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m wan_model.tiny.train", description=__doc__)
    parser.add_argument("--stage", required=True, choices=[*VAE_CONFIGS, *MODELS, "export"])
    parser.add_argument("--out", required=True, type=Path, help="RUNS: a folder for all stages")
    parser.add_argument("--minutes", type=float, help="all in all, files and scores included")
    parser.add_argument("--iterations", type=int, help="instead of --minutes")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="RUNS/<stage> to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: the faster")
    parser.add_argument("--pool", type=int, help="number of training clips")
    parser.add_argument("--evaluate", type=int, help="number of held-out clips")
    parser.add_argument("--steps", type=int, help="of the sampler, if not the model's default")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--attention", default="auto", help="kernel of the self-attention")
    parser.add_argument("--workers", type=int, help="processes that render clips; 0: none")
    parser.add_argument("--to", type=Path, help="export: where the checkpoint folders go")
    given = parser.parse_args(arguments)
    if given.stage == "export":
        for folder in export(given.out, given.to or Path(__file__).parent / "weights"):
            print(f"wrote {folder}")
        return 0
    if (given.minutes is None) == (given.iterations is None):
        parser.error("give either --minutes or --iterations")
    is_vae = given.stage in VAE_CONFIGS
    on_gpu = given.device.startswith("cuda")
    # Before anything touches CUDA: the workers are forked.
    workers = ClipWorkers((16 if on_gpu else 0) if given.workers is None else given.workers)
    run = Run(
        stage=given.stage,
        out=given.out,
        device=torch.device(given.device),
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        started_s=started_s,
        minutes=given.minutes,
        num_iterations=given.iterations,
        num_clips=given.pool or (6000 if is_vae else 24000),
        num_evaluated=given.evaluate or (100 if is_vae else 200),
        num_steps=given.steps,
        batch_size=given.batch,
        learning_rate=given.learning_rate,
        resume=given.resume,
        attention_backend=given.attention,
        command=shlex.join(["python", "-m", "wan_model.tiny.train", *arguments]),
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(TRAINING_SEED)
    try:
        (run_vae if is_vae else run_denoiser)(run, workers)
    except ValueError as error:
        parser.error(str(error))
    finally:
        workers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
