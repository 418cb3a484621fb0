"""How a full-size expert scales over the GPUs of one machine: Ulysses, ring, cfg; ours and theirs.

Every way is timed in one run beside one GPU, with the same random weights, on the same inputs, and
compared with its output. Owns the ways and their table; weights and Diffusers' twin come from
`full_size_experts`.

    torchrun --nproc_per_node 2 -m benchmarks.parallel --output benchmarks/results/parallel.json
    torchrun --nproc_per_node 2 -m benchmarks.parallel --precision fp8 --ways ulysses --output FILE
    torchrun --nproc_per_node 2 -m benchmarks.parallel --dry-run --output out/parallel.json
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.errors import relative_rms
from benchmarks.full_size_experts import PRECISIONS, Forward, diffusers_twin, random_expert
from benchmarks.gpu_timing import machine, peak_bytes, start_counting_memory
from wan_model.attention import resolve_backend
from wan_model.config import T2V_A14B, ParallelDims, TransformerConfig
from wan_model.fp8 import quantise_blocks
from wan_model.parallel import SequenceParallel, make_mesh
from wan_model.sharding import load_sharded
from wan_model.torchrun import Processes
from wan_model.transformer import WanTransformer

CASES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}  # latents of 81 frames
TARGETS = {"ulysses": 0.95, "ring": 0.90, "cfg": 0.97}
WAYS = (*TARGETS, "ring2", "fsdp")
"""ring2: a ring of two times Ulysses, from four GPUs on. fsdp: Ulysses, and weights divided."""
DRY = dataclasses.replace(
    T2V_A14B.transformer, dim=192, num_heads=8, num_layers=2, ffn_dim=256, text_dim=64
)


class Bench:
    """The ways of one case, each timed on all ranks at once."""

    def __init__(self, args: argparse.Namespace, device: str, num_ranks: int) -> None:
        self.args, self.device, self.num_ranks = args, device, num_ranks
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.config: TransformerConfig = DRY if args.dry_run else T2V_A14B.transformer
        self.config = dataclasses.replace(
            self.config, num_layers=args.num_layers or self.config.num_layers
        )
        self.rows: list[dict] = []

    def run(self, case: str) -> None:
        shape = (3, 12, 12) if self.args.dry_run else CASES[case]
        model = random_expert(self.config, self.dtype, self.device)
        exact = self.args.precision == "bf16"
        if not exact:
            quantise_blocks(model.blocks)
        forward = Forward(self.config, shape, clean_first_frame=False, device=self.device)
        case = {"case": "dry-run" if self.args.dry_run else case, "num_tokens": forward.num_tokens}
        n = self.num_ranks
        text = model.embed_text([forward.prompt])

        def call(sp: SequenceParallel) -> Callable[[], Tensor]:
            return lambda: model(forward.latents, forward.timesteps, text, sp)

        alone = call(SequenceParallel(attention_backend=self.args.attention))
        one_s, expected = self.time(alone)
        self.record(case, "ours", "one GPU", one_s)
        ways = {"ulysses": ParallelDims(ulysses_degree=n), "ring": ParallelDims(ring_degree=n)}
        if n >= 4:
            ways["ring2"] = ParallelDims(ring_degree=2, ulysses_degree=n // 2)
        for way, dims in ways.items():
            if way not in self.args.ways:
                continue
            sp = SequenceParallel(self.mesh(dims), self.args.attention)
            self.compare(case, "ours", way, call(sp), one_s, expected)
            if exact:
                prepare = partial(self.xfuser, call, dims)
                self.attempt(case, "xfuser", way, prepare, one_s, expected)
        if n % 2 == 0 and "cfg" in self.args.ways:
            self.cfg(case, call, one_s, expected)
        if "fsdp" in self.args.ways:
            self.compare(case, "ours", "fsdp", self.fsdp(forward), one_s, expected)
        if exact:
            self.attempt_diffusers(case, model, forward, one_s)

    def cfg(self, case: dict, call: Callable, one_s: float, expected: Tensor) -> None:
        """A guided step: two forwards on one GPU, one forward and an exchange here."""
        mesh = self.mesh(ParallelDims(cfg_parallel=True, ulysses_degree=self.num_ranks // 2))
        half = call(SequenceParallel(mesh, self.args.attention))
        self.compare(case, "ours", "cfg", lambda: mesh.exchange_cfg(half())[0], 2 * one_s, expected)

    def mesh(self, dims: ParallelDims):
        return make_mesh(dims, num_heads=self.config.num_heads)

    def fsdp(self, forward: Forward) -> Callable[[], Tensor]:
        """The plain blocks, which divided weights take. All ranks draw the weights on their GPU,
        one after the other: a CPU's generator gives other numbers."""
        model = load_sharded(
            lambda onto: random_expert(self.config, self.dtype, self.device).to(onto), self.device
        )
        with torch.inference_mode():
            text = model.embed_text([forward.prompt])
        sp = SequenceParallel(
            self.mesh(ParallelDims(ulysses_degree=self.num_ranks)), self.args.attention
        )
        return lambda: model(forward.latents, forward.timesteps, text, sp)

    def xfuser(self, call: Callable, dims: ParallelDims) -> Callable[[], Tensor]:
        from wan_model.xfuser_backend import XfuserSequenceParallel

        return call(
            XfuserSequenceParallel(
                self.mesh(dims), "cudnn", num_heads=self.config.num_heads, device=self.device
            )
        )

    def attempt_diffusers(
        self, case: dict, model: WanTransformer, forward: Forward, one_s: float
    ) -> None:
        """Diffusers' module on views of the same weights: alone, then with its own Ulysses."""

        def prepare() -> Callable[[], Tensor]:
            from diffusers import ContextParallelConfig

            twin = diffusers_twin(model, self.device)
            twin.set_attention_backend("_native_cudnn")
            their_one_s, their_expected = self.time(forward.theirs(twin))
            self.record(case, "diffusers", "one GPU", their_one_s)
            twin.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.num_ranks))
            self.compare(
                case, "diffusers", "ulysses", forward.theirs(twin), their_one_s, their_expected
            )

        self.attempt(case, "diffusers", "ulysses", prepare, one_s, None)

    def attempt(
        self,
        case: dict,
        impl: str,
        way: str,
        prepare: Callable,
        one_s: float,
        expected: Tensor | None,
    ) -> None:
        """What another package cannot do here is recorded beside what it can."""
        try:
            run = prepare()
            if run is not None:
                self.compare(case, impl, way, run, one_s, expected)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.keep(case | {"impl": impl, "way": way, "skipped": reason})

    def compare(
        self,
        case: dict,
        impl: str,
        way: str,
        run: Callable[[], Tensor],
        one_s: float,
        expected: Tensor,
    ) -> None:
        seconds, got = self.time(run)
        scaling = one_s / (self.num_ranks * seconds)
        self.record(
            case, impl, way, seconds, scaling=scaling,
            relative_rms_error=relative_rms(got, expected),
            target=TARGETS.get(way) if impl == "ours" else None,
        )  # fmt: skip

    @torch.inference_mode()
    def time(self, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """Median seconds of the slowest rank, after a warm-up; and the output."""
        start_counting_memory(self.device)
        out = run()
        seconds = []
        for _ in range(self.args.repeats):
            self.wait()
            started = time.perf_counter()
            run()
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - started, device=self.device)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds.append(took.item())
        return statistics.median(seconds), out

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        dist.barrier()

    def record(self, case: dict, impl: str, way: str, seconds: float, **more: object) -> None:
        row = {"impl": impl, "way": way, "num_ranks": 1 if way == "one GPU" else self.num_ranks}
        self.keep(case | row | {"seconds": seconds, "peak_bytes": peak_bytes(self.device)} | more)

    def keep(self, row: dict) -> None:
        self.rows.append(row)
        if dist.get_rank() == 0:
            print(row, flush=True)
            self.save()

    def save(self) -> None:
        dtype = str(self.dtype).removeprefix("torch.")
        sample = torch.empty(0, self.config.head_dim, dtype=self.dtype, device=self.device)
        content = machine(self.device) | {
            "num_ranks": self.num_ranks,
            "precision": self.args.precision,
            "dtype": dtype,
            "attention": resolve_backend(self.args.attention, sample),
            "num_layers": self.config.num_layers,
            "repeats": self.args.repeats,
            "rows": self.rows,
        }
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        self.args.output.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=["720p"])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS[:4])
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--attention", default="cudnn", help="Diffusers and xfuser run cuDNN")
    parser.add_argument("--num-layers", type=int, help="fewer than all, for a quick look")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPUs, over gloo")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    processes = Processes()
    if processes.num_ranks < 2:
        processes.report("one process scales nowhere: torchrun --nproc_per_node 2 -m ...")
        return 2
    if args.precision != "bf16" and "fsdp" in args.ways:
        processes.report("fsdp divides bf16 weights: leave out --precision")
        return 2
    if args.dry_run:
        args.attention = "sdpa"
    if args.precision == "fp8-attention":  # which has no log-sum-exp for a ring
        args.attention, args.ways = "fp8", [way for way in args.ways if "ring" not in way]
    try:
        device = processes.join("cpu" if args.dry_run else "cuda")
        bench = Bench(args, device, processes.num_ranks)
        for case in args.cases:
            bench.run(case)
            gc.collect()
    except ValueError as error:
        processes.report(str(error))
        return 2
    finally:
        processes.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
