"""`python -m wan_model.tiny.score wan-tiny`: how often a packaged model shows what was asked for.

Reads checkpoints as the service does, samples held-out prompts in batches, and lets the judge look.
With --sheet also a contact sheet. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import sys

import torch

from wan_model.checkpoint_keys import CheckpointError
from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.evaluate import Models, contact_sheet, expert_variants, score_model
from wan_model.weights import PACKAGED, open_checkpoint

_SEED = 3  # of the clips; training scored those of 2


def load_models(checkpoint: str, *, device: str, dtype: torch.dtype) -> Models:
    """Raises CheckpointError."""
    opened = open_checkpoint(checkpoint)
    where = {"device": device, "dtype": dtype}
    encoder = opened.load_text_encoder(**where)
    return Models(
        config=opened.config,
        experts={name: opened.load_transformer(name, **where) for name in opened.config.experts},
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        vae=opened.load_vae(device=device, dtype=torch.float32),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wan_model.tiny.score", description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="*", default=PACKAGED, help="default: all packaged models")
    add("--clips", type=int, default=200, help="held-out prompts of each (200)")
    add("--seed", type=int, default=_SEED, help="of the choice of prompts and of the noise")
    add("--steps", type=int, help="instead of the model's default")
    add("--guidance", type=float, help="instead of the model's default")
    add("--experts", action="store_true", help="also with experts swapped and alone")
    add("--batch", type=int, default=16, help="videos at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--sheet", metavar="PNG", help="a contact sheet of the first 16")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    workers = ClipWorkers(0)
    clips = workers.held_out(given.clips, seed=given.seed)
    sheet: list[tuple[str, object]] = []
    print("| model | shape | colour | motion | background | all | first frame |")
    print("|---|---|---|---|---|---|---|")
    for checkpoint in given.checkpoint:
        try:
            models = load_models(checkpoint, device=given.device, dtype=torch.float32)
        except CheckpointError as error:
            parser.error(str(error))
        variants = expert_variants(models.experts)
        for way in variants if given.experts else ["default"]:
            images = [True, False] if models.config.task == "ti2v" else [models.config.needs_image]
            for with_images in images:
                scores, videos = score_model(
                    models,
                    workers,
                    clips,
                    with_images=with_images,
                    experts=variants[way],
                    guidance=given.guidance,
                    num_steps=given.steps,
                    batch_size=given.batch,
                    seed=given.seed << 32,
                )
                asked = ", image" if with_images and models.config.task == "ti2v" else ""
                name = f"{models.config.name}{asked}" + (f", {way}" if given.experts else "")
                print(_row(name, scores), flush=True)
                if way == "default":
                    sheet += zip((clip.caption for clip in clips), videos, strict=True)
    if given.sheet:
        captions, videos = zip(*sheet[:16], strict=True)
        contact_sheet(given.sheet, captions, videos)
    return 0


def _row(name: str, scores: dict[str, float]) -> str:
    keys = ("shape", "colour", "motion", "background", "all")
    shares = " | ".join(f"{100 * scores[key]:.1f} %" for key in keys)
    first = scores.get("first_frame_psnr_db")
    return f"| {name} | {shares} | {f'{first:.1f} dB' if first is not None else ''} |"


if __name__ == "__main__":
    sys.exit(main())
