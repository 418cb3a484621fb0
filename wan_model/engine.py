"""What one rank of one stage runs: the text encoder, an expert, or the VAE.

Owns the loaded network and, for an expert, the open jobs. Every value that goes in or out is
numbers, bytes or `Arrays`; tensors stay inside. Knows no job store, no HTTP, no Ray: `generate`
drives these engines in one process, the service drives the same ones inside its workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from wan_model import convolution, media, pictures, text_attention
from wan_model.attention import check_kernel
from wan_model.backends import check_backends, check_precision
from wan_model.config import Expert, ParallelDims, WanConfig
from wan_model.follower import Follower
from wan_model.fp8 import check_fp8, quantise_blocks
from wan_model.image_file import open_image
from wan_model.lora import load_lora
from wan_model.offload import offload_blocks
from wan_model.parallel import Mesh, SequenceParallel, make_mesh
from wan_model.params import VideoParams
from wan_model.rows import divide_rows, is_first_rank
from wan_model.schedule import Schedule, build_schedule
from wan_model.solver import renoise, solver_step
from wan_model.state import Arrays, Conditioning, DenoiseState, draw_noise
from wan_model.step_reuse import Reuse, predict_velocity, remember
from wan_model.transformer import TextContext, WanTransformer
from wan_model.weights import open_checkpoint

ALL_AT_ONCE_PIXELS = 2**21  # 33 frames of 256 x 256
PREVIEW_PIXELS = 2**23  # 81 frames of 432 x 240
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU and float32 on a CPU.

    float32 turns off TF32, to which torch by default lets convolutions round, in this process.
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {' or '.join(DTYPES)}, not {dtype!r}")
    if dtype == "float32":
        torch.backends.cudnn.allow_tf32 = False
    return DTYPES[dtype]


class TextEncoderEngine:
    """Prompts -> embeddings."""

    def __init__(
        self, *, checkpoint: str, device: str, dtype: str = "auto", revision: str | None = None
    ) -> None:
        opened = open_checkpoint(checkpoint, revision=revision)
        self.encoder = opened.load_text_encoder(device=device, dtype=resolve_dtype(dtype, device))

    def warm_up(self) -> None:
        self.encode(["warm up"])

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[np.ndarray]:
        """[num_tokens, text_dim] float32 per prompt, padding dropped.

        One by one: padded to a longer neighbour a prompt is rounded otherwise, and a video would
        depend on what the service happened to have in its cache.
        """
        encoded = (self.encoder.encode([prompt])[0] for prompt in prompts)
        return [embeds.float().cpu().numpy() for embeds in encoded]


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """One job inside an expert: constant numbers and conditioning, and the moving state."""

    params: VideoParams
    schedule: Schedule
    guidance: float
    conditioning: Conditioning
    text: TextContext
    negative_text: TextContext | None
    state: DenoiseState


class ExpertEngine:
    """Denoising steps of one expert for several open jobs, on this rank's share of the work."""

    def __init__(
        self,
        *,
        checkpoint: str,
        expert: str,
        device: str,
        dtype: str = "auto",
        revision: str | None = None,
        loras: Sequence[tuple[str, float]] = (),
        ulysses_degree: int = 1,
        ring_degree: int = 1,
        cfg_parallel: bool = False,
        attention: str = "auto",
        parallel_backend: str = "own",
        shard_weights: bool = False,
        offload: bool = False,
        precision: str = "bf16",
    ) -> None:
        opened = open_checkpoint(checkpoint, revision=revision)
        self.config: WanConfig = opened.config
        self.expert = Expert(expert)
        self.device = device
        dims = ParallelDims(
            ulysses_degree=ulysses_degree, ring_degree=ring_degree, cfg_parallel=cfg_parallel
        )
        check_backends(
            attention=attention, parallel_backend=parallel_backend, ring_degree=ring_degree
        )
        network, weights_dtype = self.config.transformer, resolve_dtype(dtype, device)
        check_precision(precision, dtype="auto", shard_weights=shard_weights, offload=offload)
        if precision == "fp8":
            check_fp8(network, device=device, dtype=weights_dtype)
        self.mesh: Mesh | None = make_mesh(dims, num_heads=network.num_heads)
        check_kernel(
            attention,
            device=device,
            dtype=weights_dtype,
            head_dim=network.head_dim,
            needs_lse=ring_degree > 1 and parallel_backend == "own",
        )
        self.sp = self._sequence_parallel(attention, parallel_backend)

        def load(onto: str) -> WanTransformer:
            adapters = [load_lora(path, strength) for path, strength in loras]
            return opened.load_transformer(
                self.expert, device=onto, dtype=weights_dtype, loras=adapters
            )

        # Then the call of a module, not only its forward, brings them.
        self.fetches_weights = shard_weights or offload
        if shard_weights and offload:
            raise ValueError("shard_weights and offload exclude each other: choose one")
        if shard_weights and self.mesh is None:
            raise ValueError("shard_weights has no effect on one rank: use offload on a small card")
        if shard_weights:
            from wan_model.sharding import load_sharded  # FSDP takes a second to import

            self.transformer = load_sharded(load, device)
        elif offload:
            self.transformer = offload_blocks(load("cpu"), device)
        else:
            self.transformer = load(device)
        if precision == "fp8":
            quantise_blocks(self.transformer.blocks)
        self.jobs: dict[str, OpenJob] = {}

    def _sequence_parallel(self, attention: str, parallel_backend: str) -> SequenceParallel:
        if parallel_backend == "own" or self.mesh is None:
            return SequenceParallel(self.mesh, attention)
        from wan_model.xfuser_backend import XfuserSequenceParallel

        num_heads = self.config.transformer.num_heads
        return XfuserSequenceParallel(self.mesh, attention, num_heads=num_heads, device=self.device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One step of a one-frame job of few tokens, at both ends of guidance; they divide over
        the ranks, without which xfuser has no ring."""
        side = 2 * self.config.size_multiple
        params = VideoParams.for_model(
            self.config, width=side * self.sp.degree, height=side, num_frames=1, num_steps=1
        )
        text_dim = self.config.transformer.text_dim
        embeds = np.zeros((1, text_dim), np.float32)
        conditioning: Arrays = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds}
        if self.config.task == "i2v":
            z, t, h, w = params.latent_shape(self.config)
            conditioning["image_channels"] = np.zeros((4 + z, t, h, w), np.float32)
        self.open("warm-up", params=vars(params), conditioning=conditioning)
        self.step("warm-up")
        self.close("warm-up")
        if self.device.startswith("cuda"):
            text_attention.warm_up(self.config.transformer, self.device, self.transformer.dtype)

    @torch.inference_mode()
    def open(
        self,
        job_id: str,
        *,
        params: dict[str, Any],
        conditioning: Arrays,
        state: Arrays | None = None,
    ) -> None:
        """Makes a job ready to step. `state` None draws the noise of step 0 from the seed; a state
        at the boundary gets its new noise here, if the job has a `boundary_seed`."""
        video = VideoParams(**params)
        schedule = build_schedule(video)
        cond = Conditioning.from_arrays(conditioning, self.device)
        self._check(video, cond)
        if state is None:
            opened = DenoiseState(
                latents=draw_noise(video.latent_shape(self.config), video.seed).to(self.device)
            )
        else:
            opened = DenoiseState.from_arrays(state, self.device)
            at_boundary = schedule.has_boundary and opened.step_index == schedule.boundary_step
            if video.boundary_seed is not None and at_boundary:
                opened = renoise(opened, video.boundary_seed, schedule)
        high = self.expert is Expert.HIGH_NOISE
        guidance = video.guidance_high_noise if high else video.guidance_low_noise
        needs_negative = guidance != 1.0
        if needs_negative and cond.negative_prompt_embeds is None:
            raise ValueError(f"guidance {guidance:g} needs negative_prompt_embeds")
        self.jobs[job_id] = OpenJob(
            params=video,
            schedule=schedule,
            guidance=guidance,
            conditioning=cond,
            text=self.transformer.embed_text([cond.prompt_embeds]),
            negative_text=(
                self.transformer.embed_text([cond.negative_prompt_embeds])
                if needs_negative
                else None
            ),
            state=_impose_first_frame(opened, cond),
        )

    @torch.inference_mode()
    def step(self, job_id: str) -> dict[str, Any]:
        """One denoising step. Returns the next step_index, this step's seconds, and whether an
        earlier step's prediction was reused instead of computing one."""
        started = time.perf_counter()
        job = self.jobs[job_id]
        noise_pred, reuse, reused = self._predict_or_reuse(job)
        state = solver_step(job.params.solver, job.state, noise_pred, job.schedule)
        # What one expert found says nothing about the other.
        if state.step_index < job.schedule.end_of(job.state.step_index):
            state = replace(state, reuse=reuse)
        state = _impose_first_frame(state, job.conditioning)
        self.jobs[job_id] = replace(job, state=state)
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        return {"step_index": state.step_index, "seconds": seconds, "reused": reused}

    def export(self, job_id: str) -> Arrays:
        """The job's DenoiseState; equal on every rank."""
        return self.jobs[job_id].state.to_arrays()

    def close(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    def _check(self, params: VideoParams, conditioning: Conditioning) -> None:
        params.check_fits(self.config)
        if self.config.needs_image and conditioning.image_channels is None:
            raise ValueError(f"{self.config.name} needs an image")
        if not self.config.needs_image and conditioning.image_channels is not None:
            raise ValueError(f"{self.config.name} takes no image channels")

    def _predict_or_reuse(self, job: OpenJob) -> tuple[Tensor, Reuse | None, bool]:
        """(guided velocity, the memory for the next step, whether no forward was needed)."""
        threshold, state = job.params.cache, job.state
        where = {"step_index": state.step_index, "schedule": job.schedule}
        reused = predict_velocity(state.reuse, state.latents, threshold=threshold, **where)
        if reused is not None:
            return reused, state.reuse, True
        noise_pred = self._predict(job)
        if threshold is None:
            return noise_pred, None, False
        return noise_pred, remember(state.reuse, state.latents, noise_pred, **where), False

    def _predict(self, job: OpenJob) -> Tensor:
        """The guided velocity [C, T, H, W]: uncond + guidance (cond - uncond), float32."""
        if job.negative_text is None:
            return self._forward(job, job.text)[0]
        if self.mesh is not None and self.mesh.dims.cfg_parallel:
            mine = (job.text, job.negative_text)[self.mesh.cfg_rank]
            noise_pred_cond, noise_pred_uncond = self.mesh.exchange_cfg(self._forward(job, mine)[0])
        else:
            noise_pred_cond, noise_pred_uncond = self._forward(job, job.text, job.negative_text)
        return noise_pred_uncond + job.guidance * (noise_pred_cond - noise_pred_uncond)

    def _forward(self, job: OpenJob, *texts: TextContext) -> list[Tensor]:
        conditioning, state = job.conditioning, job.state
        timestep = job.schedule.timesteps[state.step_index]
        rows = [timestep] if conditioning.first_frame is None else [0.0, timestep]
        latents = state.latents
        if conditioning.image_channels is not None:
            latents = torch.cat([latents, conditioning.image_channels])
        timesteps = torch.tensor([rows], dtype=torch.float32, device=self.device)
        inputs = (latents[None], timesteps)
        if self.fetches_weights:
            return [self.transformer(*inputs, text, self.sp)[0] for text in texts]
        return [y[0] for y in self.transformer.forward_each(*inputs, list(texts), self.sp)]


def _impose_first_frame(state: DenoiseState, conditioning: Conditioning) -> DenoiseState:
    """TI2V keeps the image's latent frame clean: before the first step and after every one."""
    if conditioning.first_frame is None:
        return state
    latents = torch.cat([conditioning.first_frame, state.latents[:, 1:]], dim=1)
    return replace(state, latents=latents)


class VAEEngine:
    """Images -> conditioning, latents -> frames -> mp4."""

    def __init__(
        self,
        *,
        checkpoint: str,
        device: str,
        dtype: str = "auto",
        revision: str | None = None,
        split_rows: bool = False,
    ) -> None:
        """`split_rows`: all ranks decode together, each its rows. Then every rank is called."""
        opened = open_checkpoint(checkpoint, revision=revision)
        self.config = opened.config
        self.device = device
        self.split_rows = split_rows
        self.vae = opened.load_vae(device=device, dtype=resolve_dtype(dtype, device))
        if device.startswith("cuda"):
            self.vae.hold_channels_together()

    def warm_up(self) -> None:
        # A group's smallest picture has rows enough for each of its ranks.
        side = (16 if self.split_rows else 2) * self.config.size_multiple
        z, t, h, w = self.config.latent_shape(width=side, height=side, num_frames=5)
        self.decode_frames({"latents": np.zeros((z, t, h, w), np.float32)})
        if self.device.startswith("cuda"):
            convolution.warm_up(self.vae.parameters())  # so small a picture is left to cuDNN

    @torch.inference_mode()
    def encode_image(
        self, *, task: str, params: dict[str, Any], image: bytes, last_image: bytes | None = None
    ) -> Arrays:
        """The image part of a job's Conditioning, for an "i2v" or a "ti2v" model.

        Raises ValueError when the bytes are no image.
        """
        video = VideoParams(**params)
        size = (video.width, video.height)
        if task == "ti2v":
            if last_image is not None:
                raise ValueError("last_image has no effect: a ti2v model takes a first image only")
            pixels = media.prepare_image_ti2v(open_image(image), *size)
            return {"first_frame": self._encode(pixels[:, None])}
        first = media.prepare_image_i2v(open_image(image), *size)
        last = None
        if last_image is not None:
            if video.num_frames == 1:
                raise ValueError("last_image has no effect: the video has one frame")
            last = media.prepare_image_i2v(open_image(last_image), *size)
        latents = self._encode(media.i2v_video(first, last, video.num_frames))
        mask = media.i2v_mask(video.num_frames, *latents.shape[2:], has_last=last is not None)
        return {"image_channels": np.concatenate([mask.numpy(), latents])}

    def _encode(self, frames: Tensor) -> np.ndarray:
        """[3, F, H, W] in [-1, 1] -> normalised latents [z, T, h, w]."""
        chunk = _chunk(frames[0].numel())
        return self.vae.encode(frames[None].to(self.device), chunk=chunk)[0].cpu().numpy()

    @torch.inference_mode()
    def decode_frames(self, state: Arrays) -> np.ndarray:
        """Latents -> uint8 frames [F, H, W, 3]."""
        return np.concatenate(list(self._decoded(state)))

    @torch.inference_mode()
    def decode(self, *, params: dict[str, Any], state: Arrays) -> dict[str, Any]:
        """Latents -> {"mp4", "thumbnail", "spritesheet" (webp): bytes, "num_frames": int}, for a
        video of one frame also "png". Muxes while the next frames are being decoded."""
        if self.split_rows and not is_first_rank():
            for _ in self._decoded(state):
                pass  # its rows have gone to the first rank, which muxes
            return {}
        video = VideoParams(**params)
        file, made = BytesIO(), {}
        sheet = pictures.Spritesheet(video.num_frames)

        def write(frames: np.ndarray) -> None:
            mp4.write(frames)
            sheet.add(frames)
            if not made:
                made["thumbnail"] = pictures.thumbnail(frames[0])
            if video.num_frames == 1:
                made["png"] = pictures.png(frames)

        size = {"width": video.width, "height": video.height}
        with media.Mp4Writer(file, **size, fps=video.fps) as mp4:
            with Follower(write, max_waiting=2) as follower:
                for frames in self._decoded(state):
                    follower.put(frames)
            sheet_webp = sheet.to_webp()  # while the encoder's threads have frames left
        return made | {
            "mp4": file.getvalue(), "spritesheet": sheet_webp, "num_frames": mp4.num_frames,
        }  # fmt: skip

    @torch.inference_mode()
    def preview(self, *, params: dict[str, Any], state: Arrays) -> bytes:
        """An animated WebP of the clean latents that the last step predicted, decoded small.

        Latents are averaged to PREVIEW_PIXELS first: a preview of a large video costs a fraction of
        its decoding. KeyError for a state before its first step.
        """
        x0_CTHW = torch.tensor(state["x0_history.0"])
        shrunk = _shrink(x0_CTHW, self.config.vae.stride, PREVIEW_PIXELS)
        frames = self.decode_frames({"latents": shrunk.numpy()})
        return pictures.animation(frames, fps=VideoParams(**params).fps)

    def _decoded(self, state: Arrays) -> Iterator[np.ndarray]:
        """The CPU gives out the work of the next piece before it waits for one to arrive."""
        latents = torch.tensor(state["latents"], device=self.device)[None]
        chunk = _chunk(latents[0, 0].numel() * math.prod(self.config.vae.stride))
        rows = divide_rows(latents.shape[3]) if self.split_rows else None
        if rows is not None:
            latents = rows.mine(latents, dim=3)
        leaving = None
        for frames in self.vae.decode_chunks(latents, chunk=chunk, rows=rows):
            pixels_FHWC = media.frames_to_uint8(frames[0])
            if rows is not None:
                pixels_FHWC = rows.gather(pixels_FHWC, dim=1)
            before, leaving = leaving, _begin_copy(pixels_FHWC)
            if before is not None:
                yield before()
        yield leaving()


def _begin_copy(x: Tensor) -> Callable[[], np.ndarray]:
    """Starts a copy to the CPU that nothing waits for; what is returned waits for it."""
    if not x.is_cuda:
        return x.numpy
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(x.device))

    def wait() -> np.ndarray:
        done.synchronize()
        return copy.numpy()

    return wait


def _shrink(latents_CTHW: Tensor, stride: tuple[int, int, int], max_pixels: int) -> Tensor:
    """The same latents with smaller H and W, so that at most about `max_pixels` are decoded."""
    _, _, height, width = latents_CTHW.shape
    factor = math.sqrt(max_pixels / (latents_CTHW[0].numel() * math.prod(stride)))
    if factor >= 1:
        return latents_CTHW
    # At least 2: the patches of a transformer do not matter here, but the VAE's own strides do.
    size = tuple(max(2, round(side * factor)) for side in (height, width))
    by_frame_TCHW = latents_CTHW.transpose(0, 1)
    return functional.interpolate(by_frame_TCHW, size, mode="area").transpose(0, 1).contiguous()


def _chunk(num_pixels: int) -> int | None:
    """Latent frames the VAE takes at a time: all of a small video (4 times faster on a CPU), one
    of a larger one, whose memory then does not grow with its length."""
    return None if num_pixels <= ALL_AT_ONCE_PIXELS else 1
