"""Bytes per second of each fused row kernel at the size of a block, and its error.

Owns the list of kernels and of the variants (piece, warps) that are tried. The definition each is
compared with is the one in `wan_model.row_ops`; the ceiling is a device-to-device copy.

    python -m benchmarks.row_kernels --output benchmarks/results/row-kernels-h200.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.errors import relative_rms
from benchmarks.gpu_timing import Record, machine, median_s
from wan_model import kernels, row_ops, text_kernels
from wan_model.row_ops import FP8, Change, Quantised, RowLayout
from wan_model.text_attention import TextKeys, text_attention

VARIANTS = ((1024, 8, 4), (1024, 4, 2), (512, 8, 8), (512, 4, 4), (512, 2, 2))
"""(piece, warps of the norms, warps of quantising); the first is what is used."""


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.num_variants = args.device, args.variants
        self.rows, self.dim, self.ffn, self.head = (
            (48, 64, 96, 16) if args.tiny else (32_760, 5120, 13_824, 128)
        )
        self.record = Record(args.output, {**machine(args.device), "rows": []}, budget_s=120)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def note(self, name: str, run: Callable[[], object], num_bytes: float, error: float | None):
        seconds = median_s(run, self.device, repeats=20 if self.rows > 100 else 1)
        row = {"kernel": name, "ms": seconds * 1e3, "tb_per_s": num_bytes / seconds / 1e12}
        row |= {"chunk": kernels.MAX_CHUNK, "error": error}
        row |= {"norm_warps": kernels.NORM_WARPS, "quantise_warps": kernels.QUANTISE_WARPS}
        self.record.content["rows"].append(row)
        print(row, flush=True)

    def copy(self) -> None:
        x, y = self.draw(self.rows, self.dim), self.draw(self.rows, self.dim)
        self.note("copy", lambda: y.copy_(x), 2 * x.nbytes, None)

    def add_norm(self, out_dtype: torch.dtype) -> None:
        rows, dim = self.rows, self.dim
        x, y = self.draw(rows, dim), self.draw(rows, dim, dtype=torch.bfloat16)
        gate, scale, shift = (self.draw(1, 2, dim) for _ in range(3))
        layout = RowLayout(num_tokens=rows, num_clean=rows // 3)

        def run(x: Tensor = x):
            change = Change(y=y, gate=gate)
            how = {"eps": 1e-6, "out_dtype": out_dtype}
            return row_ops.add_norm(x, (change,), scale, shift, layout, **how)

        error = compare(lambda: run(x.clone()))
        num_bytes = 2 * x.nbytes + y.nbytes + x.numel() * out_dtype.itemsize
        self.note(f"add_norm {out_dtype}", run, num_bytes, error)

    def norm_rope(self) -> None:
        qkv = self.draw(self.rows, 3 * self.dim, dtype=torch.bfloat16)
        weights = (self.draw(self.dim), self.draw(self.dim))
        angle = self.draw(self.rows, self.head // 2)
        rope, layout = (angle.cos(), angle.sin()), RowLayout(num_tokens=self.rows)

        def run(x: Tensor = qkv) -> Tensor:
            row_ops.norm_rope(x, weights, rope, layout, eps=1e-6)
            return x

        error = compare(lambda: run(qkv.clone()))
        self.note("norm_rope q, k", run, 4 * self.rows * self.dim * 2, error)

    def quantise(self) -> None:
        x = self.draw(self.rows, self.ffn, dtype=torch.bfloat16)
        run = lambda: row_ops.gelu(x, out_dtype=FP8)  # noqa: E731
        self.note("gelu to fp8", run, 1.5 * x.nbytes, compare(run))
        y = self.draw(self.rows, self.dim, dtype=torch.bfloat16)
        run = lambda: row_ops.quantise_rows(y)  # noqa: E731
        self.note("quantise", run, 1.5 * y.nbytes, compare(run))

    def text(self) -> None:
        """A prompt of 120 tokens and its padding: as a block has it, and by the Triton kernel."""
        heads, num_keys = (self.dim // self.head, self.head), 121
        q = self.draw(1, self.rows, *heads, dtype=torch.bfloat16)
        k, v = (self.draw(1, num_keys, *heads, dtype=torch.bfloat16) for _ in range(2))
        keys = TextKeys(k, v, torch.ones(1, num_keys, device=self.device))
        # The definition is a library's kernel there, in float32.
        exact = text_attention(q.float(), TextKeys(k.float(), v.float(), keys.log_counts))
        runs = {"text": lambda: text_attention(q, keys)}
        if self.device.startswith("cuda"):
            runs["text by Triton"] = lambda: text_kernels.text_attention(q, *keys)
        for name, run in runs.items():
            self.note(name, run, 2 * q.nbytes, relative_rms(run(), exact))

    @torch.inference_mode()
    def run(self) -> None:
        self.record.case("copy", self.copy, limit_s=20)
        for chunk, norm_warps, quantise_warps in VARIANTS[: self.num_variants]:
            kernels.NORM_WARPS, kernels.QUANTISE_WARPS = norm_warps, quantise_warps
            kernels.MAX_CHUNK, warps = chunk, f"{norm_warps} {quantise_warps}"
            for dtype in (torch.bfloat16, FP8):
                run = partial(self.add_norm, dtype)
                self.record.case(f"add_norm {dtype} {chunk} {warps}", run, limit_s=30)
            self.record.case(f"norm_rope {chunk} {warps}", self.norm_rope, limit_s=30)
            self.record.case(f"quantise {chunk} {warps}", self.quantise, limit_s=30)
        self.record.case("text", self.text, limit_s=30)


def compare(run: Callable[[], row_ops.Rows]) -> float:
    """Relative rms difference of the kernel from the PyTorch definition, on the same inputs."""
    got = _plain(run())
    chosen = row_ops._uses_kernels
    row_ops._uses_kernels = lambda x: False
    try:
        return relative_rms(got, _plain(run()))
    finally:
        row_ops._uses_kernels = chosen


def _plain(rows: row_ops.Rows) -> Tensor:
    return rows.dequantise() if isinstance(rows, Quantised) else rows.float()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row_kernels", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="the first so many")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    Bench(args).run()


if __name__ == "__main__":
    main()
