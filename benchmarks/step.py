"""Seconds and memory of one forward of a full-size expert on one GPU, with random weights.

Owns the cases and how they are timed (CUDA events, median after a warm-up). Compares with nothing
but the GPU's own ceilings, measured in the same run; the table in the README is made from its JSON.

    python -m benchmarks.step --output benchmarks/results/step-h200.json [--compile]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from wan_model.attention import attention, resolve_backend
from wan_model.config import I2V_A14B, T2V_A14B, TI2V_5B, WanConfig
from wan_model.parallel import SequenceParallel
from wan_model.params import VideoParams
from wan_model.transformer import WanTransformer, is_float32_island
from wan_model.vae import WanVAE

CASES: dict[str, tuple[WanConfig, int, int]] = {
    "480p": (T2V_A14B, 832, 480),
    "720p": (T2V_A14B, 1280, 720),
    "i2v-480p": (I2V_A14B, 832, 480),
    "ti2v-704p": (TI2V_5B, 1280, 704),
}
PFLOP = 1e15


def time_s(run: Callable[[], object], *, repeats: int) -> float:
    """Median seconds of `run` on the GPU, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def forward_flop(config: WanConfig, num_tokens: int) -> float:
    """Floating-point operations of one forward: blocks, patches, head and text (wan-spec 10)."""
    t, s, text = config.transformer, num_tokens, config.transformer.text_len
    d = t.dim
    block = 8 * s * d**2 + 4 * s**2 * d + 4 * s * d**2 + 4 * text * d**2
    block += 4 * s * text * d + 4 * s * d * t.ffn_dim
    outside = 8 * s * d * (t.in_channels + t.out_channels) + 2 * text * (t.text_dim * d + d**2)
    return t.num_layers * block + outside


def random_expert(config: WanConfig, dtype: torch.dtype) -> WanTransformer:
    """Full-size weights drawn on the GPU, scaled so that values stay of order 1."""
    with torch.device("meta"):
        model = WanTransformer(config.transformer)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_float32_island(name) else dtype)
    model = model.to_empty(device="cuda").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif parameter.dim() < 2:
            parameter.normal_(std=0.02)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@torch.inference_mode()
def measure_forward(case: str, *, compiled: bool, backend: str, repeats: int) -> dict:
    config, width, height = CASES[case]
    params = VideoParams.for_model(config, width=width, height=height)
    _, t, h, w = params.latent_shape(config)
    model = random_expert(config, torch.bfloat16)
    if compiled:
        for block in model.blocks:
            block.compile()
    latents = torch.randn(1, config.transformer.in_channels, t, h, w, device="cuda")
    text = model.embed_text([torch.randn(512, config.transformer.text_dim, device="cuda")])
    timesteps = torch.tensor([[0.0, 900.0]] if config.task == "ti2v" else [[900.0]], device="cuda")
    sp = SequenceParallel(attention_backend=backend)
    torch.cuda.reset_peak_memory_stats()
    seconds = time_s(lambda: model(latents, timesteps, text, sp), repeats=repeats)
    flop = forward_flop(config, params.num_tokens(config))
    return {
        "case": case,
        "precision": "bf16",
        "impl": "ours-compiled" if compiled else "ours",
        "attention": resolve_backend(backend, latents.bfloat16()),
        "num_tokens": params.num_tokens(config),
        "seconds": seconds,
        "pflop": flop / PFLOP,
        "tflop_per_s": flop / seconds / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


@torch.inference_mode()
def measure_error(depth: int = 2) -> float:
    """Relative rms error of a bfloat16 forward against float32, A14B width at a small depth."""
    config = dataclasses.replace(
        T2V_A14B, transformer=dataclasses.replace(T2V_A14B.transformer, num_layers=depth)
    )
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_expert(config, torch.float32)
        for name, parameter in model.named_parameters():
            if not is_float32_island(name):
                parameter.data = parameter.data.to(dtype)
        torch.manual_seed(1)
        latents = torch.randn(1, 16, 5, 60, 104, device="cuda")
        text = model.embed_text([torch.randn(64, 4096, device="cuda")])
        backend = "sdpa" if dtype is torch.float32 else "auto"
        timesteps = torch.tensor([[900.0]], device="cuda")
        outputs.append(model(latents, timesteps, text, SequenceParallel(attention_backend=backend)))
    exact, rough = outputs
    return ((rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


@torch.inference_mode()
def measure_vae(config: WanConfig, *, dtype: torch.dtype, chunk: int) -> dict:
    params = VideoParams.for_model(config)
    with torch.device("meta"):
        vae = WanVAE(config.vae)
    vae = vae.to_empty(device="cuda").to(dtype).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.normal_(std=0.02)
    latents = torch.randn(1, *params.latent_shape(config), device="cuda")

    def decode() -> None:
        for frames in vae.decode_chunks(latents, chunk=chunk):
            del frames

    torch.cuda.reset_peak_memory_stats()
    return {
        "vae": config.vae.version,
        "size": f"{params.width}x{params.height}x{params.num_frames}",
        "dtype": str(dtype).removeprefix("torch."),
        "chunk": chunk,
        "seconds": time_s(decode, repeats=2),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


@torch.inference_mode()
def measure_ceilings(backend: str) -> dict[str, float]:
    """TFLOP/s of a GEMM and of attention at the 480p shapes."""
    s, d, f = 32_760, 5120, 13_824
    a = torch.randn(s, d, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(d, f, device="cuda", dtype=torch.bfloat16)
    q, k, v = (torch.randn(1, s, 40, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return {
        "gemm_tflop_per_s": 2 * s * d * f / time_s(lambda: a @ b, repeats=5) / 1e12,
        "attention_tflop_per_s": 4 * s * s * d
        / time_s(lambda: attention(q, k, v, backend), repeats=3) / 1e12,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--vae", action="store_true", help="also time VAE decoding")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": measure_ceilings(args.backend),
        "bf16_relative_rms_error_2_layers": measure_error(),
        "rows": [],
        "vae": [],
    }

    def save() -> None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    print(result, flush=True)
    for case in args.cases:
        for compiled in (False, True) if args.compile else (False,):
            torch.cuda.empty_cache()
            row = measure_forward(
                case, compiled=compiled, backend=args.backend, repeats=args.repeats
            )
            result["rows"].append(row)
            print(row, flush=True)
            save()
    if args.vae:
        for config in (T2V_A14B, TI2V_5B):
            for dtype, chunk in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 3)):
                torch.cuda.empty_cache()
                row = measure_vae(config, dtype=dtype, chunk=chunk)
                result["vae"].append(row)
                print(row, flush=True)
                save()


if __name__ == "__main__":
    main()
