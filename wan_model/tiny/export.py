"""Trained stages -> the packaged checkpoints and their model card.

Owns which folder holds what and what is shared. Knows nothing about training or file formats:
`checkpoint_writer` does, and report.json says how it went.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from wan_model.checkpoint_writer import save_checkpoint
from wan_model.config import NEGATIVE_PROMPT
from wan_model.tiny.networks import MODELS, VAE_STAGES, caption_tokenizer
from wan_model.tiny.run import part

# In each task's folder what the released models share is a reference to the T2V model's.
_SHARED = {
    "t2v": (),
    "i2v": ("vae", "text_encoder", "tokenizer"),
    "ti2v": ("text_encoder", "tokenizer"),
}


def export(runs: Path, root: Path) -> list[Path]:
    """Writes root/<name> for every model whose stages are trained, and root/MODEL_CARD.md."""
    written = []
    for task, row in MODELS.items():
        if not all(_weights_path(runs, stage).is_file() for stage in (task, "t2v")):
            continue
        vae = load_file(_weights_path(runs, VAE_STAGES[task]))
        statistics = {name: tuple(vae[name].tolist()) for name in ("latents_mean", "latents_std")}
        config = replace(row, vae=replace(row.vae, **statistics))
        experts = load_file(_weights_path(runs, task))
        text_encoder = part(load_file(_weights_path(runs, "t2v")), "text_encoder")
        shared = {name: f"../{MODELS['t2v'].name}" for name in _SHARED[task]}
        save_checkpoint(
            root / row.name,
            layout="diffusers",
            config=config,
            transformers={name: part(experts, name.value) for name in config.experts},
            vae=None if "vae" in shared else part(vae, "vae"),
            text_encoder=None if "text_encoder" in shared else text_encoder,
            tokenizer=None if "tokenizer" in shared else caption_tokenizer().to_str(pretty=True),
            dtype=torch.bfloat16,
            vae_dtype=torch.bfloat16,
            row=row.name,
            shared=shared or None,
        )
        written.append(root / row.name)
    (root / "MODEL_CARD.md").write_text(model_card(runs, root), "utf-8")
    return written


def _weights_path(runs: Path, stage: str) -> Path:
    return runs / stage / "weights.safetensors"


# ---------------------------------------------------------------------------------- model card

_CARD = """# wan-tiny

Small models with the structure of Wan2.2, trained from scratch on synthetic clips: a UMT5-style
text encoder, a causal 3D VAE of version 2.1 and one of version 2.2, two experts each for text and
for image to video (noise above and below 0.875), and one network for both with a time per token.
They show whether a sampler, a cache or a parallel layout keeps the meaning of a prompt. They know
nothing of the world but what is listed here.

- Data: drawn by `wan_model/tiny/data.py`, no images or videos of others. 17 frames of 128x128 at
  8 frames a second: 4 shapes, 8 colours, 8 motions, 5 backgrounds, sometimes a second object or a
  moving camera, with English captions of {num_words} different words. One in seven combinations of
  shape, colour and motion is never trained on; all scores are on those.
- Size: {size_mb:.1f} MB of bfloat16 safetensors in the Diffusers layout; `wan-tiny-i2v` and
  `wan-tiny-ti2v` refer to `wan-tiny` for what they share.
- Prompts: other words than those of the captions are unknown to the tokenizer and ignored. The
  experts were trained to have "{negative}..." and the empty prompt subtracted.
- License: that of this repository.

## Training

| stage | parameters | iterations | clips | seconds | device | command |
|---|---|---|---|---|---|---|
{training}

Seconds are of the whole command: rendering, training and scoring.

## Scores on held-out combinations

Shares right as the analytic judge (`wan_model/tiny/judge.py`) sees them; "all" is shape, colour and
motion at once. Default steps, solver and guidance unless said otherwise.

| model | asked | shape | colour | motion | background | all | PSNR |
|---|---|---|---|---|---|---|---|
{scores}
"""


def model_card(runs: Path, root: Path) -> str:
    reports = [
        json.loads(path.read_text("utf-8"))
        for stage in ("vae", "vae22", *MODELS)
        if (path := runs / stage / "report.json").is_file()
    ]
    training = [
        f"| {r['stage']} | {r['parameters'] / 1e6:.2f} M | {r['iterations']} | {r['clips']} "
        f"| {r['seconds']:.0f} | {r['device']} | `{r['command']}`{_before(r)} |"
        for r in reports
    ]
    scores = [
        _score_row(report["stage"], name, figures)
        for report in reports
        for name, figures in report["scores"].items()
    ]
    size_mb = sum(path.stat().st_size for path in root.rglob("*.safetensors")) / 1e6
    return _CARD.format(
        num_words=caption_tokenizer().get_vocab_size() - 3,
        size_mb=size_mb,
        negative=NEGATIVE_PROMPT[:4],
        training="\n".join(training),
        scores="\n".join(scores),
    )


def _before(report: Mapping[str, str]) -> str:
    """What `--resume` continued, where somebody wrote it into the report."""
    return f", after {report['before']}" if "before" in report else ""


def _score_row(stage: str, name: str, figures: Mapping[str, float]) -> str:
    shares = " | ".join(
        f"{100 * figures[key]:.1f} %" for key in ("shape", "colour", "motion", "background", "all")
    )
    psnr = figures.get("psnr_db", figures.get("first_frame_psnr_db"))
    return f"| {stage} | {name} | {shares} | {f'{psnr:.1f} dB' if psnr is not None else ''} |"
