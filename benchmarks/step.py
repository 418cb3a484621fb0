"""One forward of a full-size expert on one GPU with random weights: ours beside Diffusers'.

Owns the cases, their order and the table. Ceilings, errors and both implementations are measured in
the same run; one failing case stops no other, and the JSON is written after each.

    python -m benchmarks.step --output benchmarks/results/step-h200.json
    python -m benchmarks.step --tiny --output /tmp/step.json        # a dry run on a CPU, in seconds
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.errors import relative_rms
from benchmarks.full_size_experts import PRECISIONS, Forward, diffusers_twin, random_expert
from benchmarks.gpu_timing import (
    Record,
    device_of,
    machine,
    median_s,
    peak_bytes,
    start_counting_memory,
    time_s,
)
from wan_model import fp8
from wan_model.attention import attention, resolve_backend
from wan_model.config import T2V_A14B, TI2V_5B, TransformerConfig, WanConfig
from wan_model.params import VideoParams
from wan_model.row_ops import quantise_rows
from wan_model.text_attention import TextKeys, text_attention
from wan_model.transformer import WanTransformer, is_float32_island

CASES: dict[str, tuple[WanConfig, int, int]] = {
    "480p": (T2V_A14B, 832, 480),
    "720p": (T2V_A14B, 1280, 720),
    "ti2v-704p": (TI2V_5B, 1280, 704),
}
ORDER = (  # most important first
    ("480p", "bf16", "ours"),
    ("480p", "fp8", "ours"),
    ("480p", "fp8-attention", "ours"),
    ("480p", "bf16", "diffusers-compiled"),
    ("ti2v-704p", "bf16", "ours"),
    ("ti2v-704p", "fp8", "ours"),
    ("ti2v-704p", "fp8-attention", "ours"),
    ("ti2v-704p", "bf16", "diffusers-compiled"),
    ("720p", "bf16", "ours"),
    ("720p", "fp8-attention", "ours"),
    ("720p", "fp8", "ours"),
    ("720p", "bf16", "diffusers-compiled"),
    ("480p", "bf16", "diffusers-eager"),
    ("ti2v-704p", "bf16", "diffusers-eager"),
    ("720p", "bf16", "diffusers-eager"),
    ("480p", "bf16", "ours-cudnn"),
    ("480p", "bf16", "ours-plain"),
)
ERRORS = {  # which of the measured errors a row has
    ("bf16", "ours"): "ours bf16 auto",
    ("fp8", "ours"): "ours fp8 fast_accum=True",
    ("fp8-attention", "ours"): "ours fp8, fp8 attention",
    ("bf16", "ours-cudnn"): "ours bf16 cudnn",
    ("bf16", "ours-plain"): "ours-plain bf16",
    ("bf16", "diffusers-eager"): "diffusers-eager bf16",
    ("bf16", "diffusers-compiled"): "diffusers-eager bf16",  # the same operations, fused
}


def forward_flop(config: TransformerConfig, num_tokens: int) -> float:
    """Floating-point operations of one forward: blocks, patches, head and text (wan-spec 10), the
    text's padding included."""
    c, s, text, d = config, num_tokens, config.text_len, config.dim
    block = 8 * s * d**2 + 4 * s**2 * d + 4 * s * d**2 + 4 * text * d**2
    block += 4 * s * text * d + 4 * s * d * c.ffn_dim
    outside = 8 * s * d * (c.in_channels + c.out_channels) + 2 * text * (c.text_dim * d + d**2)
    return c.num_layers * block + outside


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.repeats = args.device, args.tiny, args.repeats
        self.record = Record(
            args.output,
            {
                **machine(args.device),
                "ceilings": {},
                "errors": {},
                "rows": [],
                "profile": [],
            },
            budget_s=args.budget_s,
        )
        self.outputs: dict[str, Tensor] = {}
        self.on_gpu = args.device.startswith("cuda")
        self.dtype = torch.bfloat16
        self.profiled = args.profile

    def config(self, case: str) -> TransformerConfig:
        config = CASES[case][0].transformer
        if not self.tiny:
            return config
        return dataclasses.replace(
            config, dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_dim=32, text_len=16
        )

    def forward_of(self, case: str) -> Forward:
        config, width, height = CASES[case]
        shape = VideoParams.for_model(config, width=width, height=height).latent_shape(config)[1:]
        return Forward(
            self.config(case),
            (2, 4, 6) if self.tiny else shape,
            clean_first_frame=config.task == "ti2v",
            device=self.device,
        )

    # -------------------------------------------------------------------------- ceilings

    def measure_ceilings(self, case: str) -> None:
        """Seconds of each matrix product and attention of a block, alone, at the case's size."""
        c, s = self.config(case), self.forward_of(case).num_tokens
        heads = (c.num_heads, c.head_dim)
        found: dict[str, float | str] = {}
        shapes = {
            "qkv": (c.dim, 3 * c.dim), "o": (c.dim, c.dim), "ffn0": (c.dim, c.ffn_dim),
            "ffn2": (c.ffn_dim, c.dim),
        }  # fmt: skip
        for name, (d_in, d_out) in shapes.items():
            x = torch.randn(s, d_in, device=self.device, dtype=self.dtype)
            linear = torch.nn.Linear(d_in, d_out, device=self.device, dtype=self.dtype)
            linear.requires_grad_(False)
            flop = 2 * s * d_in * d_out
            self._ceiling(found, f"gemm_bf16_{name}", flop, partial(linear, x))
            quick = fp8.Fp8Linear(linear)
            rows = quantise_rows(x)
            self._ceiling(found, f"gemm_fp8_{name}", flop, partial(quick, rows))
        q, k, v = (
            torch.randn(1, s, *heads, device=self.device, dtype=self.dtype) for _ in range(3)
        )
        text = torch.randn(1, c.text_len, *heads, device=self.device, dtype=self.dtype)
        num_rows = len(self.forward_of(case).prompt) + 1
        keys = TextKeys(
            text[:, :num_rows], text[:, :num_rows], torch.zeros(1, num_rows, device=self.device)
        )
        flop = 4 * s * num_rows * c.dim
        self._ceiling(found, "cross_ours", flop, partial(text_attention, q, keys))
        kernels = ("hopper", "flash_attn_4", "cudnn", "fp8") if self.on_gpu else ("sdpa", "fp8")
        for backend in kernels:
            self._ceiling(
                found, f"self_{backend}", 4 * s * s * c.dim, lambda b=backend: attention(q, k, v, b)
            )
            if backend in ("hopper", "fp8"):
                continue
            self._ceiling(
                found, f"cross_{backend}", 4 * s * c.text_len * c.dim,
                lambda b=backend: attention(q, text, text, b),
            )  # fmt: skip
        self.record.content["ceilings"][case] = found

    def _ceiling(self, found: dict, name: str, flop: float, run) -> None:
        try:
            seconds = median_s(run, self.device, repeats=5, warm_ups=2)
            found[name] = seconds
            found[name + "_tflop_per_s"] = flop / seconds / 1e12
        except Exception as error:  # a kernel that is not there: the others still count
            found[name] = f"{type(error).__name__}: {error}"[:300]

    def floor_s(self, case: str, precision: str) -> float | None:
        """What the products and attentions of a forward take when each runs alone."""
        found = self.record.content["ceilings"].get(case, {})
        products = precision.removesuffix("-attention")
        gemm = {n: found.get(f"gemm_{products}_{n}") for n in ("qkv", "o", "ffn0", "ffn2")}
        exact = {k: v for k, v in found.items() if not k.startswith("self_fp8")}
        kinds = [
            min(
                (v for k, v in exact.items() if k.startswith(kind) and "tflop" not in k
                 and isinstance(v, float)), default=None,
            )
            for kind in ("self_", "cross_")
        ]  # fmt: skip
        if precision == "fp8-attention":
            kinds[0] = found.get("self_fp8")
        parts = [gemm["qkv"], gemm["o"], gemm["o"], gemm["o"], gemm["ffn0"], gemm["ffn2"], *kinds]
        if not all(isinstance(part, float) for part in parts):
            return None
        return self.config(case).num_layers * sum(parts)

    # ---------------------------------------------------------------------------- errors

    def measure_errors(self, depth: int = 2) -> None:
        """Relative rms error against float32 at a small depth, A14B's width, 7,800 tokens."""
        config = dataclasses.replace(self.config("480p"), num_layers=depth)
        shape = (2, 4, 6) if self.tiny else (5, 60, 104)
        case = Forward(config, shape, clean_first_frame=False, device=self.device)
        torch.backends.cudnn.allow_tf32 = False
        model = random_expert(config, torch.float32, self.device)
        model.fused = False
        exact = case.ours(model, "sdpa")()
        for name, parameter in model.named_parameters():
            if not is_float32_island(name):
                parameter.data = parameter.data.to(self.dtype)
        errors = self.record.content["errors"]

        def note(name: str, output: Tensor) -> None:
            errors[name] = relative_rms(output, exact)

        note("ours-plain bf16", case.ours(model, "cudnn" if self.on_gpu else "sdpa")())
        model.fused = True
        twin = diffusers_twin(model, self.device)
        self._use_cudnn(twin)
        note("diffusers-eager bf16", case.theirs(twin)())
        for backend in ("cudnn", "auto") if self.on_gpu else ("auto",):
            note(f"ours bf16 {backend}", case.ours(model, backend)())
        fp8.quantise_blocks(model.blocks)
        for fast in (True, False):
            fp8.USE_FAST_ACCUM = fast
            note(f"ours fp8 fast_accum={fast}", case.ours(model)())
        fp8.USE_FAST_ACCUM = True
        note("ours fp8, fp8 attention", case.ours(model, "fp8")())

    # -------------------------------------------------------------------------- forwards

    def measure(self, case: str, precision: str, impl: str) -> None:
        config, forward = self.config(case), self.forward_of(case)
        start_counting_memory(self.device)
        torch.compiler.reset()
        model = random_expert(config, self.dtype, self.device)
        run, backend = self._prepare(model, forward, precision, impl)
        repeats = self.repeats if case != "720p" else max(1, self.repeats - 2)
        kept: dict[str, Tensor] = {}
        seconds = time_s(lambda: kept.update(output=run()), self.device, repeats=repeats)
        output = kept["output"].float().cpu()
        flop = forward_flop(config, forward.num_tokens)
        best = statistics.median(seconds)
        floor = self.floor_s(case, precision)
        first = self.outputs.setdefault(case, output)
        row = {
            "case": case,
            "precision": precision,
            "impl": impl,
            "attention": backend,
            "num_tokens": forward.num_tokens,
            "seconds": best,
            "all_seconds": seconds,
            "tflop_per_s": flop / best / 1e12,
            "floor_s": floor,
            "share_of_floor": floor / best if floor else None,
            "peak_bytes": peak_bytes(self.device),
            "error": self.record.content["errors"].get(ERRORS[precision, impl]),
            "difference_to_first": relative_rms(output, first),
            "finite": bool(output.isfinite().all()),
        }
        self.record.content["rows"].append(row)
        print(row, flush=True)

    def _prepare(self, model: WanTransformer, forward: Forward, precision: str, impl: str):
        """(a call that makes one forward, the attention it uses)."""
        if impl.startswith("diffusers"):
            twin = diffusers_twin(model, self.device)
            self._use_cudnn(twin)
            if impl == "diffusers-compiled":
                twin.compile_repeated_blocks(fullgraph=True)
            return forward.theirs(twin), "cudnn" if self.on_gpu else "sdpa"
        backend = "auto"
        if impl == "ours-cudnn":
            backend = "cudnn" if self.on_gpu else "sdpa"
        if impl == "ours-plain":
            model.fused = False
        elif not self.on_gpu:
            model.fused = True
        if precision.startswith("fp8"):
            fp8.quantise_blocks(model.blocks)
        if precision == "fp8-attention":
            backend = "fp8"
        like = torch.empty(0, model.config.head_dim, dtype=self.dtype, device=self.device)
        return forward.ours(model, backend), resolve_backend(backend, like)

    def _use_cudnn(self, twin) -> None:
        if self.on_gpu:
            twin.set_attention_backend("_native_cudnn")

    # --------------------------------------------------------------------------- profile

    def profile(self, case: str, precision: str) -> None:
        """Milliseconds per kernel over one forward, the twenty that take longest."""
        model = random_expert(self.config(case), self.dtype, self.device)
        run, _ = self._prepare(model, self.forward_of(case), precision, "ours")
        run()
        activity = torch.profiler.ProfilerActivity
        wanted = activity.CUDA if self.on_gpu else activity.CPU
        with torch.profiler.profile(activities=[wanted]) as profiler:
            run()
        events = profiler.key_averages()
        key = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        slowest = sorted(events, key=lambda event: -getattr(event, key))[:20]
        self.record.content["profile"].append(
            {
                "case": case,
                "precision": precision,
                "kernels": [
                    {"name": e.key[:120], "calls": e.count, "ms": getattr(e, key) / 1000}
                    for e in slowest
                ],
            }
        )

    @torch.inference_mode()
    def run(self, wanted_cases: list[str]) -> None:
        """Everything, most important first."""
        record = self.record
        record.case("ceilings 480p", lambda: self.measure_ceilings("480p"), limit_s=90)
        record.case("errors", self.measure_errors, limit_s=60)
        for case, precision, impl in ORDER:
            if case not in wanted_cases:
                continue
            if case not in record.content["ceilings"]:
                run = partial(self.measure_ceilings, case)
                record.case(f"ceilings {case}", run, limit_s=30)
            run = partial(self.measure, case, precision, impl)
            record.case(f"{case} {precision} {impl}", run, limit_s=120)
            if (case, impl) == ("480p", "ours") and precision in self.profiled:
                run = partial(self.profile, case, precision)
                record.case(f"profile {case} {precision}", run, limit_s=30)


def table(content: dict) -> str:
    lines = [f"{'case':10} {'precision':9} {'impl':19} {'s':>7} {'TFLOP/s':>8} {'of floor':>8} GiB"]
    for row in content["rows"]:
        share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else "-"
        lines.append(
            f"{row['case']:10} {row['precision']:9} {row['impl']:19} {row['seconds']:7.3f}"
            f" {row['tflop_per_s']:8.0f} {share:>8} {row['peak_bytes'] / 2**30:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny widths: a dry run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--budget-s", type=float, default=3600)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.device = device_of(args.device, tiny=args.tiny)
    bench = Bench(args)
    bench.run(args.cases)
    print(bench.record.content["ceilings"], bench.record.content["errors"], sep="\n")
    print(table(bench.record.content))


if __name__ == "__main__":
    main()
