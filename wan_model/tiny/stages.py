"""The five stages: from rendered clips to averaged weights, scores and a picture.

Owns what each stage needs of the others and what it leaves behind. Losses are in `train_vae` and
`train_denoiser`, iterations in `loop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
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
from wan_model.tiny.loop import Loop
from wan_model.tiny.networks import MODELS, VAE_STAGES, caption_tokenizer
from wan_model.tiny.run import Run, load_rounded, part
from wan_model.vae import WanVAE

VAE_CONFIGS: dict[str, VAEConfig] = {stage: MODELS[task].vae for task, stage in VAE_STAGES.items()}
TRAINING_SEED = 1
HELD_OUT_SEED = 2
_NUM_SHOWN = 16
_GUIDANCES = (1.0, 2.0, 6.0)


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
    run.resume_into(loop)
    # More minutes for a VAE that is trained already are for the last phase.
    is_continued = run.resume is not None and run.num_iterations is None
    for phase in train_vae.PHASES[-1:] if is_continued else train_vae.PHASES:
        if run.batch_size:
            phase = replace(phase, batch_size=run.batch_size)
        run.log(f"{phase}")
        loss = train_vae.reconstruction_loss(vae, pool, phase)
        loop.run(loss, until=phase.until, checkpoint=run.checkpoint)

    averaged = part(loop.averaged(), "vae")
    measured = train_vae.measure_statistics(served_vae(averaged, config, run.device), pool)
    statistics = {
        "latents_mean": torch.tensor(measured.latents_mean),
        "latents_std": torch.tensor(measured.latents_std),
    }
    run.save_weights({f"vae.{name}": t for name, t in averaged.items()} | statistics)
    clips = workers.held_out(run.num_evaluated, seed=HELD_OUT_SEED)
    videos = reconstructions(served_vae(averaged, measured, run.device), clips)
    scores = score_vae(workers, clips, videos)
    run.log(f"held out: {scores}")
    pairs = [(clip.frames, video) for clip, video in zip(clips, videos, strict=True)]
    captions = [text for clip in clips for text in (clip.caption, "(reconstructed)")]
    contact_sheet(
        run.folder / "samples.png",
        captions[:_NUM_SHOWN],
        [video for pair in pairs for video in pair][:_NUM_SHOWN],
    )
    run.report(loop, {"held out": scores})


def _faster_dtype(run: Run, config: VAEConfig, pool: Tensor) -> torch.dtype:
    """Small 3D convolutions are faster in bfloat16 or in TF32, depending on cuDNN's version."""
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


def served_vae(weights: Mapping[str, Tensor], config: VAEConfig, device: torch.device) -> WanVAE:
    """As it will be served: float32, its weights rounded to the bfloat16 of the files."""
    vae = WanVAE(config)
    load_rounded(vae, weights)
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
    return served_vae(part(weights, "vae"), config, run.device)


# ----------------------------------------------------------------------------------- denoisers


def run_denoiser(run: Run, workers: ClipWorkers) -> None:
    vae = trained_vae(run, VAE_STAGES[run.stage])
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
    experts, text_encoder, trained = _networks(run, config)
    loop = Loop(
        trained,
        run.schedule(train_denoiser.LEARNING_RATE, betas=(0.9, 0.99)),
        part_names=tuple(expert.value for expert in experts),
        device=run.device,
        num_stacked=train_denoiser.num_stacked,
    )
    run.resume_into(loop)
    loss = train_denoiser.denoising_loss(
        experts,
        text_encoder,
        pool,
        config,
        batch_size=run.batch_size or train_denoiser.BATCH_SIZES[run.stage],
        attention_backend=run.attention_backend,
    )
    if run.device.type == "cuda":
        train_denoiser.compile_blocks(experts.values())
    loop.run(loss, checkpoint=run.checkpoint)
    averaged = loop.averaged()
    run.save_weights(averaged | _kept_text_encoder(run))
    for name, network in trained.items():
        load_rounded(network, part(averaged, name))
        network.eval().requires_grad_(False)
    models = Models(
        config=config, experts=experts, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
    )
    # The batches of sampling have other sizes: each would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        run.report(loop, _score(run, models, workers))


def _networks(
    run: Run, config: WanConfig
) -> tuple[dict[Expert, nn.Module], nn.Module, dict[str, nn.Module]]:
    """(experts, text encoder, what of them is trained). Only T2V trains the text encoder."""
    by_device = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    where = {"device": run.device, "dtype": run.dtype or by_device}
    experts = {name: train_denoiser.build_expert(config, **where) for name in config.experts}
    text_encoder = train_denoiser.build_text_encoder(config, **where)
    trained: dict[str, nn.Module] = {name.value: expert for name, expert in experts.items()}
    if run.stage == "t2v" and not run.keep_text_encoder:
        return experts, text_encoder, trained | {"text_encoder": text_encoder}
    weights = run.weights_of("t2v")
    load_rounded(text_encoder, part(weights, "text_encoder"))
    text_encoder.requires_grad_(False)
    if run.stage == "t2v":
        return experts, text_encoder, trained
    for name, expert in experts.items():
        from_t2v = part(weights, name.value)
        if run.stage == "i2v":
            channels = config.transformer.in_channels
            start = train_denoiser.widen_for_images(from_t2v, channels)
        else:
            start = train_denoiser.with_trunk_of(from_t2v, expert.state_dict())
        load_rounded(expert, start)
    return experts, text_encoder, trained


def _kept_text_encoder(run: Run) -> dict[str, Tensor]:
    """What T2V's file must still hold when its text encoder was not trained again."""
    if not run.keep_text_encoder:
        return {}
    weights = run.weights_of("t2v")
    return {name: t for name, t in weights.items() if name.startswith("text_encoder.")}


def _score(run: Run, models: Models, workers: ClipWorkers) -> dict[str, dict[str, float]]:
    """Scores by way of asking; the first way's videos are also shown."""
    clips = workers.held_out(run.num_evaluated, seed=HELD_OUT_SEED)
    ways: dict[str, dict] = {}
    if run.stage == "ti2v":
        ways["image and text"] = {"with_images": True}
    for name, experts in expert_variants(models.experts).items():
        ways[name] = {"with_images": run.stage == "i2v", "experts": experts}
    for guidance in _GUIDANCES if run.num_steps is None else ():
        way = {"with_images": run.stage == "i2v", "guidance": guidance}
        ways[f"guidance {guidance:g}"] = way
    scores: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        scores[name], videos = score_model(models, workers, clips, num_steps=run.num_steps, **way)
        run.log(f"{name}: {scores[name]}")
        if len(scores) == 1:
            captions = [clip.caption for clip in clips]
            contact_sheet(run.folder / "samples.png", captions[:_NUM_SHOWN], videos[:_NUM_SHOWN])
    return scores
