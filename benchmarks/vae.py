"""Decoding a whole video on one GPU: ours beside Diffusers', and the convolutions they are made of.

Owns the cases (VAE 2.1 at 720p, VAE 2.2 at 704p) and the variants of layout and chunk that are
timed. Both networks hold the same random weights. One failing case stops no other.

    python -m benchmarks.vae --output benchmarks/results/vae-h200.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmarks.gpu_timing import (
    Record,
    device_of,
    machine,
    median_s,
    peak_bytes,
    start_counting_memory,
    time_s,
)
from wan_model.checkpoint_config import vae_to_diffusers
from wan_model.checkpoint_keys import vae_slots
from wan_model.config import T2V_A14B, TI2V_5B, VAEConfig, WanConfig
from wan_model.convolution import by_kernel
from wan_model.params import VideoParams
from wan_model.vae import WanVAE

CASES: dict[str, tuple[WanConfig, int, int]] = {
    "2.1 1280x720x81": (T2V_A14B, 1280, 720),
    "2.2 1280x704x121": (TI2V_5B, 1280, 704),
}
CONVOLUTIONS = {  # channels in and out, frames, height, width: where the time goes
    "96": (96, 96, 4, 720, 1280),
    "192": (192, 192, 4, 360, 640),
    "384": (384, 384, 2, 180, 320),
    "256": (256, 256, 4, 352, 640),
    "512": (512, 512, 4, 176, 320),
    "1024": (1024, 1024, 2, 88, 160),
}


ORDER = (  # most important first
    ("2.2 1280x704x121", "ours", torch.bfloat16, True, 1),
    ("2.1 1280x720x81", "ours", torch.bfloat16, True, 1),
    ("2.2 1280x704x121", "diffusers", torch.bfloat16, False, 1),
    ("2.1 1280x720x81", "diffusers", torch.bfloat16, False, 1),
    ("2.2 1280x704x121", "ours", torch.bfloat16, True, 2),
    ("2.1 1280x720x81", "ours", torch.float32, True, 1),
    ("2.2 1280x704x121", "ours", torch.float32, True, 1),
    ("2.1 1280x720x81", "ours", torch.bfloat16, False, 1),
)
PARTS = ("decode", "errors", "profile", "convolutions")


def random_vae(config: VAEConfig, dtype: torch.dtype, device: str) -> WanVAE:
    with torch.device("meta"):
        vae = WanVAE(config)
    vae = vae.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in vae.named_parameters():
        if "gamma" in name:
            parameter.fill_(1.0)
        elif parameter.dim() < 2:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return vae


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.repeats = args.device, args.tiny, args.repeats
        self.on_gpu = args.device.startswith("cuda")
        self.parts, self.num_decodes = args.parts, args.decodes
        content = {
            **machine(args.device), "rows": [], "errors": [], "profile": [], "convolutions": [],
        }  # fmt: skip
        self.record = Record(args.output, content, budget_s=args.budget_s)
        self.outputs: dict[str, Tensor] = {}

    # ----------------------------------------------------------------------- convolutions

    def convolution(self, name: str) -> None:
        """TFLOP/s of one causal 3x3x3 convolution, channels together: our kernel's and cuDNN's."""
        c_in, c_out, t, h, w = CONVOLUTIONS[name]
        if self.tiny:
            c_in, c_out, h, w = 8, 8, 6, 8
        flop = 2 * 27 * c_in * c_out * t * h * w
        like = {"device": self.device, "dtype": torch.bfloat16}
        x, weight = (
            torch.randn(shape, **like).contiguous(memory_format=torch.channels_last_3d)
            for shape in ((1, c_in, t + 2, h, w), (c_out, c_in, 3, 3, 3))
        )
        bias = torch.randn(c_out, **like)
        forms = {"cudnn": lambda: F.conv3d(x, weight, bias, padding=(0, 1, 1))}
        if self.on_gpu:
            forms["ours"] = lambda: by_kernel(x, weight, bias, 1)
        for form, run in forms.items():
            seconds = median_s(run, self.device, repeats=5, warm_ups=2)
            row = {"channels": name, "form": form, "ms": seconds * 1e3}
            row["tflop_per_s"] = flop / seconds / 1e12
            self.record.content["convolutions"].append(row)
            print(row, flush=True)

    # --------------------------------------------------------------------------- decoding

    def network(self, config: WanConfig, dtype: torch.dtype) -> WanVAE:
        return random_vae(config.vae, dtype, self.device)

    def latents(self, case: str) -> Tensor:
        config, width, height = CASES[case]
        shape = VideoParams.for_model(config, width=width, height=height).latent_shape(config)
        if self.tiny:
            shape = (shape[0], 2, 2, 2)
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(1, *shape, device=self.device, generator=generator)

    def ours(self, case: str, *, together: bool, chunk: int, dtype: torch.dtype) -> None:
        start_counting_memory(self.device)
        vae, latents = self.network(CASES[case][0], dtype), self.latents(case)
        if together:
            vae.hold_channels_together()

        def decode() -> list[Tensor]:
            """Frames leave the GPU's working memory as they would for an encoder."""
            pieces = vae.decode_chunks(latents, chunk=chunk)
            return [piece.mul(127.5).add(127.5).to(torch.uint8) for piece in pieces]

        self.note(case, "ours", decode, dtype=dtype, together=together, chunk=chunk)

    def theirs(self, case: str) -> None:
        start_counting_memory(self.device)
        config = CASES[case][0]
        vae, latents = self.network(config, torch.bfloat16), self.latents(case)
        with torch.device("meta"):
            twin = AutoencoderKLWan.from_config(vae_to_diffusers(config.vae))
        state = vae.state_dict()
        slots = vae_slots(state, "diffusers", config.vae)
        twin.load_state_dict(
            {k: slot.part(state[slot.name]) for k, slot in slots.items()}, assign=True
        )
        z = vae.denormalise(latents).to(torch.bfloat16)
        self.note(case, "diffusers", lambda: [twin.eval().decode(z, return_dict=False)[0]])

    def note(
        self, case: str, impl: str, decode, dtype: torch.dtype = torch.bfloat16, **how
    ) -> None:
        kept: dict[str, list[Tensor]] = {}
        run = lambda: kept.update(pieces=decode())  # noqa: E731
        seconds = time_s(run, self.device, repeats=self.repeats)
        first = kept["pieces"][-1].float()[:, :, -1].cpu()
        row = {"case": case, "impl": impl, "dtype": str(dtype).removeprefix("torch."), **how}
        row |= {"seconds": sorted(seconds)[len(seconds) // 2], "all_seconds": seconds}
        row |= {"peak_bytes": peak_bytes(self.device), "mean_of_last_frame": first.mean().item()}
        self.record.content["rows"].append(row)
        print(row, flush=True)

    def errors(self, case: str) -> None:
        """Differences from float32 of 17 frames a quarter as large, in [-1, 1]: rms and largest."""
        version = CASES[case][0].vae.version
        z, t, h, w = self.latents(case).shape[1:]
        shape = (1, z, min(t, 5), max(2, h // 2), max(2, w // 2))
        generator = torch.Generator(self.device).manual_seed(2)
        latents = torch.randn(shape, device=self.device, generator=generator)
        config = CASES[case][0]
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        exact = self.network(config, torch.float32).decode(latents)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
        for dtype in (torch.float32, torch.bfloat16):
            for together in (False, True):
                vae = self.network(config, torch.float32).to(dtype)
                if together:
                    vae.hold_channels_together()
                difference = vae.decode(latents) - exact
                row = {"version": version, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"together": together, "std_of_frames": exact.std().item()}
                row |= {
                    "rms": difference.square().mean().sqrt().item(),
                    "largest": difference.abs().max().item(),
                }
                self.record.content["errors"].append(row)
                print(row, flush=True)

    def profile(self, case: str, chunk: int) -> None:
        vae = self.network(CASES[case][0], torch.bfloat16).hold_channels_together()
        latents = self.latents(case)[:, :, :3]
        activity = torch.profiler.ProfilerActivity
        list(vae.decode_chunks(latents, chunk=chunk))
        wanted = activity.CUDA if self.on_gpu else activity.CPU
        with torch.profiler.profile(activities=[wanted]) as profiler:
            list(vae.decode_chunks(latents, chunk=chunk))
        key = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        slowest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))[:25]
        kernels = [
            {"name": e.key[:120], "calls": e.count, "ms": getattr(e, key) / 1000} for e in slowest
        ]
        self.record.content["profile"].append({"case": case, "kernels": kernels})

    @torch.inference_mode()
    def run(self) -> None:
        record = self.record
        if "decode" in self.parts:
            for case, impl, dtype, together, chunk in ORDER[: self.num_decodes]:
                if impl == "diffusers":
                    record.case(f"{case} diffusers", partial(self.theirs, case), limit_s=60)
                    continue
                how = {"together": together, "chunk": chunk, "dtype": dtype}
                record.case(f"{case} ours {how}", partial(self.ours, case, **how), limit_s=60)
        for case in CASES:
            if "errors" in self.parts:
                record.case(f"{case} errors", partial(self.errors, case), limit_s=30)
            if "profile" in self.parts:
                record.case(f"{case} profile", partial(self.profile, case, 1), limit_s=30)
        if "convolutions" in self.parts:
            for name in CONVOLUTIONS:
                record.case(f"convolution {name}", partial(self.convolution, name), limit_s=30)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--decodes", type=int, default=len(ORDER), help="the first so many")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.device = device_of(args.device, tiny=args.tiny)
    Bench(args).run()


if __name__ == "__main__":
    main()
