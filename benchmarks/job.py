"""Whole jobs on one GPU, models loaded: prompt, denoising, decoding, mp4. Random weights.

Owns the cases and the stages that are timed, and how far the final latents of a precision are from
those of the case's first one, of the same weights and noise. The engines are the service's own;
only the checkpoint they open is drawn at random, and the text encoder reads random tokens.

    python -m benchmarks.job --output benchmarks/results/job-h200.json
    python -m benchmarks.job --cases 480p-40 480p-40-short --output FILE    # 40 steps: 15 minutes
    python -m benchmarks.job --tiny --output /tmp/job.json                  # a dry run on a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import UMT5Config, UMT5EncoderModel

import wan_model.engine
from benchmarks.errors import relative_rms
from benchmarks.full_size_experts import PRECISIONS, PROMPT_TOKENS, random_expert
from benchmarks.gpu_timing import Record, device_of, machine, peak_bytes, start_counting_memory
from benchmarks.vae import random_vae
from wan_model.config import T2V_A14B, TI2V_5B, WanConfig
from wan_model.engine import ExpertEngine, VAEEngine
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Jobs that differ in precision only."""

    title: str
    config: WanConfig
    params: dict[str, object]
    precisions: tuple[str, ...] = PRECISIONS


CASES = {
    "720p-4": Case(
        title="T2V-A14B 1280x720x81, 4 steps, no guidance",
        config=T2V_A14B,
        params={
            "width": 1280,
            "height": 720,
            "num_steps": 4,
            "solver": "euler",
            "shift": 5.0,
            "guidance": 1.0,
        },
    ),
    "ti2v-50": Case(
        title="TI2V-5B 1280x704x121, 50 steps",
        config=TI2V_5B,
        params={"width": 1280, "height": 704, "num_steps": 50},
    ),
    "480p-40": Case(
        title="T2V-A14B 832x480x81, 40 steps",
        config=T2V_A14B,
        params={"width": 832, "height": 480, "num_steps": 40},
    ),
    "480p-40-short": Case(  # few frames: float32 takes eight times as long, and 115 GB
        title="T2V-A14B 832x480x5, 40 steps",
        config=T2V_A14B,
        params={"width": 832, "height": 480, "num_frames": 5, "num_steps": 40},
        precisions=("float32", *PRECISIONS),
    ),
}
HOW: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"dtype": "bfloat16", "precision": "fp8"},
    "fp8-attention": {"dtype": "bfloat16", "precision": "fp8", "attention": "fp8"},
}
TINY = {"dim": 64, "num_heads": 2, "num_layers": 2, "ffn_dim": 96, "text_dim": 32, "text_len": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCheckpoint:
    """What an engine opens, without files."""

    config: WanConfig

    def load_transformer(self, expert, *, device: str, dtype: torch.dtype, loras=()):
        model = random_expert(self.config.transformer, torch.bfloat16, device)
        if dtype == torch.float32:  # the very same weights, one after the other
            for parameter in model.parameters():
                parameter.data = parameter.data.float()
        return model

    def load_vae(self, *, device: str, dtype: torch.dtype):
        return random_vae(self.config.vae, dtype, device)


def random_text_encoder(config: WanConfig, device: str, *, tiny: bool) -> UMT5EncoderModel:
    c = config.text_encoder
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    if not tiny:
        sizes = {name: getattr(c, name) for name in sizes}
    umt5 = UMT5Config(vocab_size=c.vocab_size if not tiny else 64, **sizes)
    with torch.device("meta"):
        encoder = UMT5EncoderModel(umt5)
    encoder = encoder.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(std=0.02)
    return encoder


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny = args.device, args.tiny
        self.cases = [CASES[name] for name in args.cases]
        content = {**machine(args.device), "rows": []}
        self.record = Record(args.output, content, budget_s=args.budget_s)
        self.first_latents: dict[str, torch.Tensor] = {}

    def config(self, case: Case) -> WanConfig:
        if not self.tiny:
            return case.config
        transformer = dataclasses.replace(case.config.transformer, **TINY)
        return dataclasses.replace(case.config, transformer=transformer)

    def params(self, case: Case, config: WanConfig) -> VideoParams:
        given = dict(case.params)
        if self.tiny:
            given |= {"width": 64, "height": 64, "num_frames": 5, "num_steps": 4}
        return VideoParams.for_model(config, **given)

    def job(self, case: Case, precision: str) -> None:
        """Seconds of every stage of the second of two jobs; the first compiles what is compiled."""
        config = self.config(case)
        params = self.params(case, config)
        start_counting_memory(self.device)
        wan_model.engine.open_checkpoint = lambda *a, **k: RandomCheckpoint(config=config)
        how = {"checkpoint": "", "device": self.device}
        encoder = random_text_encoder(config, self.device, tiny=self.tiny)
        experts = [ExpertEngine(expert=e, **HOW[precision], **how) for e in config.experts]
        vae = VAEEngine(dtype="bfloat16", **how)
        guided = params.guidance_high_noise != 1.0 or params.guidance_low_noise != 1.0

        def run(limit: int | None) -> tuple[dict[str, float], torch.Tensor]:
            seconds: dict[str, float] = {}
            seconds["text"] = self.time(lambda: self.encode(encoder, 2 if guided else 1))
            num_tokens = min(PROMPT_TOKENS, config.transformer.text_len - 1)
            text = np.random.default_rng(0).standard_normal(
                (2, num_tokens, config.transformer.text_dim), np.float32
            )
            conditioning = dict(zip(("prompt_embeds", "negative_prompt_embeds"), text, strict=True))
            first = build_schedule(params).boundary_step
            spans = [range(params.num_steps)]
            if len(experts) == 2:
                spans = [range(first), range(first, params.num_steps)]
            state = None
            for expert, span in zip(experts, spans, strict=True):
                expert.open("job", params=vars(params), conditioning=conditioning, state=state)
                steps = span[:limit]
                name = f"{expert.expert} expert"
                seconds[name] = self.time(lambda e=expert, s=steps: [e.step("job") for _ in s])
                state = expert.export("job")
                if len(steps) < len(span):
                    state["step_index"] = np.asarray(span.stop)
                expert.close("job")
            made: dict[str, object] = {}
            decode = lambda: made.update(vae.decode(params=vars(params), state=state))  # noqa: E731
            seconds["decode and mp4"] = self.time(decode)
            return seconds, torch.from_numpy(state["latents"])

        run(1)
        started = time.perf_counter()
        seconds, latents = run(None)
        total = time.perf_counter() - started
        row = {"case": case.title, "precision": precision, "seconds": total, "stages": seconds}
        row |= {"num_steps": params.num_steps, "peak_bytes": peak_bytes(self.device)}
        first = self.first_latents.setdefault(case.title, latents)
        row["trajectory_error"] = relative_rms(latents, first)
        self.record.content["rows"].append(row)
        print(row, flush=True)

    def encode(self, encoder: UMT5EncoderModel, num_prompts: int) -> None:
        """Each prompt on its own, as the service does."""
        length = 16 if self.tiny else 512
        for _ in range(num_prompts):
            encoder(torch.randint(0, encoder.config.vocab_size, (1, length), device=self.device))

    def time(self, run: Callable[[], object]) -> float:
        started = time.perf_counter()
        run()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @torch.inference_mode()
    def run(self) -> None:
        for case in self.cases:
            for precision in case.precisions:
                run = partial(self.job, case, precision)
                self.record.case(f"{case.title} {precision}", run, limit_s=300)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny widths: a dry run")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["720p-4", "ti2v-50"])
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.device = device_of(args.device, tiny=args.tiny)
    Bench(args).run()


if __name__ == "__main__":
    main()
