"""`python -m wan_model.tiny.train --stage vae --out RUNS --minutes 4`: trains wan-tiny on one GPU.

Stages: vae, t2v (which also trains the text encoder), i2v; vae22, ti2v (after t2v); then `export`
writes the checkpoints and the model card. What they leave under RUNS is described in `run`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from wan_model.tiny.clips import ClipWorkers
from wan_model.tiny.export import export
from wan_model.tiny.networks import MODELS
from wan_model.tiny.run import Run
from wan_model.tiny.stages import TRAINING_SEED, VAE_CONFIGS, run_denoiser, run_vae

# Clips of the pool. A VAE sees raw frames, of which fewer do; I2V encodes each clip twice.
_NUM_CLIPS = {"vae": 6000, "vae22": 6000, "t2v": 24000, "i2v": 12000, "ti2v": 24000}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wan_model.tiny.train", description=__doc__)
    add = parser.add_argument
    add("--stage", required=True, choices=[*VAE_CONFIGS, *MODELS, "export"])
    add("--out", required=True, type=Path, metavar="RUNS", help="one folder for all stages")
    add("--minutes", type=float, help="all in all, rendering and scores included")
    add("--iterations", type=int, help="instead of --minutes")
    add("--resume", type=Path, metavar="DIR", help="the RUNS/<stage> to go on from")
    add(
        "--keep-text-encoder",
        action="store_true",
        help="t2v with --resume: i2v and ti2v were trained with it",
    )
    add("--device", help="default: cuda where there is one")
    add("--dtype", choices=["bfloat16", "float32"], help="default: the faster one")
    add("--pool", type=int, metavar="CLIPS", help="number of training clips")
    add("--evaluate", type=int, metavar="CLIPS", help="number of held-out clips")
    add("--steps", type=int, help="of the sampler, instead of the model's default")
    add("--batch", type=int)
    add("--learning-rate", type=float)
    add("--attention", default="sdpa", help="kernel; it must have a gradient")
    add("--workers", type=int, help="processes that render and judge; 0: none")
    add("--to", type=Path, help="export: where the folders go (default: into the package)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    started_s = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.stage == "export":
        for folder in export(given.out, given.to or Path(__file__).parent / "weights"):
            print(f"wrote {folder}")
        return 0
    if (given.minutes is None) == (given.iterations is None):
        parser.error("give either --minutes or --iterations")
    if given.keep_text_encoder and (given.stage != "t2v" or given.resume is None):
        parser.error("--keep-text-encoder goes with --stage t2v --resume DIR")
    is_vae = given.stage in VAE_CONFIGS
    # The workers are forked, so before anything touches CUDA.
    on_cpu = given.device == "cpu"
    workers = ClipWorkers((0 if on_cpu else 16) if given.workers is None else given.workers)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(
        stage=given.stage,
        out=given.out,
        command=shlex.join(["python", "-m", "wan_model.tiny.train", *arguments]),
        started_s=started_s,
        device=torch.device(device),
        dtype=getattr(torch, given.dtype) if given.dtype else None,
        minutes=given.minutes,
        num_iterations=given.iterations,
        num_clips=given.pool or _NUM_CLIPS[given.stage],
        num_evaluated=given.evaluate or (100 if is_vae else 200),
        num_steps=given.steps,
        batch_size=given.batch,
        learning_rate=given.learning_rate,
        resume=given.resume,
        keep_text_encoder=given.keep_text_encoder,
        attention_backend=given.attention,
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
