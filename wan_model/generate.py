"""The reference: a whole video in one process, and the command line around it.

Owns the order of the stages and nothing else: it opens the same engines the service runs in its
workers, one after another, and loops over `step`. Every other way of running a job must give these
latents. Knows no Ray, no jobs, no HTTP.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from wan_model import media, pictures
from wan_model.backends import ATTENTION_BACKENDS, PARALLEL_BACKENDS, PRECISIONS
from wan_model.config import Expert, WanConfig
from wan_model.engine import ExpertEngine, TextEncoderEngine, VAEEngine
from wan_model.image_file import open_image
from wan_model.params import MAX_SEED, SOLVERS, VideoParams
from wan_model.schedule import build_schedule
from wan_model.state import Arrays
from wan_model.torchrun import Processes
from wan_model.weights import open_checkpoint

OUTPUT_SUFFIXES = (".mp4", ".png", ".npy", ".safetensors")
LoRAFiles = Sequence[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make: a checkpoint, words, images (encoded file bytes) and the numbers.

    `negative_prompt` "" is the model's own.
    """

    checkpoint: str
    prompt: str
    params: VideoParams
    negative_prompt: str = ""
    image: bytes | None = None
    last_image: bytes | None = None
    loras_high_noise: LoRAFiles = ()
    loras_low_noise: LoRAFiles = ()
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how precisely to compute it: the same video but for rounding.

    With fp8 (`precision` or `attention`) that is sure for one layout and number of threads: another
    may tip some values to the next fp8 number, which moves the latents by percents.
    """

    device: str = "cpu"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_parallel: bool = False
    attention: str = "auto"
    parallel_backend: str = "own"
    shard_weights: bool = False
    offload: bool = False
    precision: str = "bf16"


def generate(
    request: Request,
    placement: Placement | None = None,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Arrays:
    """The final state of the job: `latents` [C, T, H, W] float32 as the transformer sees them.

    The engines are opened one after another, so that one network is in memory at a time.
    `on_step` is called with the number of steps done. Raises ValueError for what cannot be made.
    """
    placement = placement or Placement()
    check_effects(request, placement)
    opened = open_checkpoint(request.checkpoint, revision=request.revision)
    opened.check_loras([*request.loras_high_noise, *request.loras_low_noise])
    conditioning = encode(request, placement, opened.config)
    return denoise(request, placement, conditioning, on_step=on_step)


def denoise(
    request: Request,
    placement: Placement,
    conditioning: Arrays,
    *,
    state: Arrays | None = None,
    to_step: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Arrays:
    """The state before `to_step` (None: the final one), from `state` or else from the seed.

    With the state before the boundary step of another request this is a branch of it.
    """
    schedule = build_schedule(request.params)
    step = 0 if state is None else int(state["step_index"])
    last = schedule.num_steps if to_step is None else to_step
    while step < last:
        end = min(last, schedule.end_of(step))
        expert = schedule.expert_at(step)
        steps = range(step, end)
        state = _run_segment(request, placement, expert, conditioning, state, steps, on_step)
        step = end
    return state


def encode(request: Request, placement: Placement, config: WanConfig) -> Arrays:
    """The job's Conditioning: prompt embeddings and, with an image, what the VAE makes of it."""
    check_images(config, request.image, request.last_image, request.params.num_frames)
    where = {"checkpoint": request.checkpoint, "revision": request.revision}
    negative_prompt = request.negative_prompt or config.negative_prompt
    encoder = TextEncoderEngine(**where, device=placement.device, dtype=placement.dtype)
    prompt_embeds, negative_prompt_embeds = encoder.encode([request.prompt, negative_prompt])
    conditioning = {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
    }
    del encoder
    _free_memory()
    if request.image is not None:
        vae = VAEEngine(**where, device=placement.device, dtype=placement.vae_dtype)
        conditioning |= vae.encode_image(
            task=config.task,
            params=asdict(request.params),
            image=request.image,
            last_image=request.last_image,
        )
    return conditioning


def decode(request: Request, placement: Placement, state: Arrays) -> np.ndarray:
    """uint8 frames [F, H, W, 3] of a final state."""
    vae = VAEEngine(
        checkpoint=request.checkpoint,
        revision=request.revision,
        device=placement.device,
        dtype=placement.vae_dtype,
    )
    return vae.decode_frames(state)


def check_images(
    config: WanConfig, image: bytes | None, last_image: bytes | None, num_frames: int
) -> None:
    """Raises ValueError when this model needs an image it has not got, or cannot use one."""
    if config.needs_image and image is None:
        raise ValueError(f"{config.name} makes a video from an image: an image is required")
    if not config.accepts_image and (image or last_image) is not None:
        raise ValueError(f"{config.name} makes a video from text alone: it takes no image")
    if last_image is not None and image is None:
        raise ValueError("last_image needs a first image too")
    if last_image is not None and (config.task != "i2v" or num_frames == 1):
        raise ValueError("last_image has no effect: it needs an I2V model and more than one frame")
    if config.task == "ti2v" and image is not None and num_frames == 1:
        raise ValueError("image leaves nothing to make: it is the first frame, and there is one")


def check_effects(request: Request, placement: Placement) -> None:
    """Raises ValueError for a part of the request that would change no step."""
    params, schedule = request.params, build_schedule(request.params)
    experts = (
        ("high", schedule.boundary_step, params.guidance_high_noise, request.loras_high_noise),
        ("low", schedule.num_steps - schedule.boundary_step,
         params.guidance_low_noise, request.loras_low_noise),
    )  # fmt: skip
    for noise, num_steps, _, loras in experts:
        if loras and num_steps == 0:
            raise ValueError(
                f"LoRA {loras[0][0]} has no effect: the {noise}-noise expert takes no step"
            )
    if params.boundary_seed is not None and not schedule.has_boundary:
        raise ValueError(
            "boundary_seed has no effect: one expert takes every step of this schedule"
        )
    unguided = {guidance for _, n, guidance, _ in experts if n} == {1}
    if request.negative_prompt and unguided:
        raise ValueError("negative_prompt has no effect: with guidance 1 no step reads it")
    if placement.cfg_parallel and unguided:
        raise ValueError("cfg_parallel has no effect: with guidance 1 there is nothing to divide")


def _run_segment(
    request: Request,
    placement: Placement,
    expert: Expert,
    conditioning: Arrays,
    state: Arrays | None,
    steps: range,
    on_step: Callable[[int], None] | None,
) -> Arrays:
    high = expert is Expert.HIGH_NOISE
    engine = ExpertEngine(
        checkpoint=request.checkpoint,
        revision=request.revision,
        expert=expert,
        device=placement.device,
        dtype=placement.dtype,
        loras=request.loras_high_noise if high else request.loras_low_noise,
        ulysses_degree=placement.ulysses_degree,
        ring_degree=placement.ring_degree,
        cfg_parallel=placement.cfg_parallel,
        attention=placement.attention,
        parallel_backend=placement.parallel_backend,
        shard_weights=placement.shard_weights,
        offload=placement.offload,
        precision=placement.precision,
    )
    engine.open("job", params=asdict(request.params), conditioning=conditioning, state=state)
    for step_index in steps:
        engine.step("job")
        if on_step:
            on_step(step_index + 1)
    exported = engine.export("job")
    del engine
    _free_memory()
    return exported


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for what the caller can fix."""
    processes = Processes()
    try:
        _run(_parser().parse_args(argv), processes)
    except (ValueError, OSError) as error:
        processes.report(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        processes.leave()
    return 0


def _run(args: argparse.Namespace, processes: Processes) -> None:
    output = Path(args.output)
    if output.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {output}: the suffix must be {', '.join(OUTPUT_SUFFIXES)}")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist")
    device = processes.join(args.device)
    request = _request(args, processes)
    if output.suffix == ".png" and request.params.num_frames != 1:
        raise ValueError("--output .png holds one frame: add --num-frames 1")
    placement = Placement(
        device=device,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        ulysses_degree=args.ulysses_degree,
        ring_degree=args.ring_degree,
        cfg_parallel=args.cfg_parallel,
        attention=args.attention,
        parallel_backend=args.parallel_backend,
        shard_weights=args.fsdp,
        offload=args.offload,
        precision=args.precision,
    )
    first_rank = processes.rank == 0
    bar = tqdm(total=request.params.num_steps, unit="step", disable=not first_rank, delay=0.1)
    with bar:
        state = generate(request, placement, on_step=lambda done: bar.update(done - bar.n))
    if first_rank:
        _save(output, request, placement, state)
        print(f"{output} (seed {request.params.seed})")


def _request(args: argparse.Namespace, processes: Processes) -> Request:
    config = open_checkpoint(args.checkpoint, revision=args.revision).config
    image = _read_image(args.image)
    last_image = _read_image(args.last_image)
    num_frames = config.num_frames if args.num_frames is None else args.num_frames
    check_images(config, image, last_image, num_frames)
    width, height = args.size or (None, None)
    params = VideoParams.for_model(
        config,
        image_size=open_image(image).size if image is not None else None,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=args.fps,
        num_steps=args.steps,
        seed=processes.agree(random.SystemRandom().randint(0, MAX_SEED))
        if args.seed is None
        else args.seed,
        solver=args.solver,
        shift=args.shift,
        guidance=args.guidance,
        guidance_high_noise=args.guidance_high_noise,
        guidance_low_noise=args.guidance_low_noise,
        boundary_ratio=args.boundary_ratio,
        boundary_seed=args.boundary_seed,
        cache=args.cache,
    )
    if args.lora_low_noise and config.num_experts == 1:
        raise ValueError(f"--lora-low-noise has no effect: {config.name} has one expert")
    return Request(
        checkpoint=args.checkpoint,
        revision=args.revision,
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        image=image,
        last_image=last_image,
        params=params,
        loras_high_noise=args.lora_high_noise,
        loras_low_noise=args.lora_low_noise,
    )


def _read_image(path: str | None) -> bytes | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    data = Path(path).read_bytes()
    try:
        open_image(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return data


def _save(output: Path, request: Request, placement: Placement, state: Arrays) -> None:
    if output.suffix == ".safetensors":
        save_file({"latents": np.ascontiguousarray(state["latents"])}, output)
        return
    frames = decode(request, placement, state)
    if output.suffix == ".npy":
        np.save(output, frames)
    elif output.suffix == ".png":
        pictures.write_png(output, frames[0])
    else:
        height, width = frames.shape[1:3]
        with media.Mp4Writer(output, width=width, height=height, fps=request.params.fps) as mp4:
            mp4.write(frames)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("*", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as in 832x480")
    return int(width), int(height)


def _lora(text: str) -> tuple[str, float]:
    path, _, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m wan_model.generate",
        description="Make one video (or image) with a Wan model, in one process or under torchrun.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder or hub id, official or Diffusers layout")
    add("--revision", help="hub revision to pin")
    add("--prompt", required=True)
    add("--negative-prompt", default="", help="empty: the model's default one")
    add("--image", help="first frame (I2V, TI2V)")
    add("--last-image", help="last frame (I2V)")
    add("--size", type=_size, metavar="WIDTHxHEIGHT", help="with an image: an area")
    add("--num-frames", type=int, help="4n+1")
    add("--fps", type=int)
    add("--steps", type=int)
    add("--seed", type=int, help="default: a random one, printed")
    add("--solver", choices=SOLVERS, default="unipc")
    add("--shift", type=float)
    add("--guidance", type=float, help="both experts")
    add("--guidance-high-noise", type=float)
    add("--guidance-low-noise", type=float)
    add("--boundary-ratio", type=float)
    add("--boundary-seed", type=int, help="new noise for the low-noise expert: a variant")
    add("--cache", type=float, metavar="THRESHOLD", help="reuse steps that change less, as 0.05")
    lora = {"type": _lora, "action": "append", "default": [], "metavar": "FILE[:STRENGTH]"}
    add("--lora-high-noise", **lora, help="may be repeated; the only expert's LoRA on TI2V")
    add("--lora-low-noise", **lora)
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--vae-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--precision", choices=PRECISIONS, default="bf16", help="fp8: the experts' large products")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--attention", choices=ATTENTION_BACKENDS, default="auto")
    add("--ulysses-degree", type=int, default=1)
    add("--ring-degree", type=int, default=1)
    add("--cfg-parallel", action="store_true")
    add("--parallel-backend", choices=PARALLEL_BACKENDS, default="own")
    add("--fsdp", action="store_true", help="each rank keeps its part of the weights only")
    add("--offload", action="store_true", help="weights in host memory, two blocks on the GPU")
    add("--output", required=True, metavar="FILE", help=", ".join(OUTPUT_SUFFIXES))
    return parser


if __name__ == "__main__":
    sys.exit(main())
