"""The headline runs of one node: one group's latency, the layouts' throughput, a kill in mid-run.

    python -m benchmarks.headline --num-gpus 8 --output benchmarks/results/headline-h200x8.json
    python -m benchmarks.headline --num-gpus 2 --dry-run --output out/headline.json

Random weights, T2V-A14B, 81 frames. Parts are run in the order of their worth until `--budget-s` is
spent; what was left out is in the file. Owns the order and the table: a forward over all GPUs is
`parallel`'s, a layout under load `layouts`'.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import layouts
from benchmarks.full_size_checkpoint import write_full_size_checkpoint
from benchmarks.gpu_timing import Record, machine
from benchmarks.layouts import Layout
from benchmarks.report import markdown
from benchmarks.trace import figures
from wan_model.tiny.checkpoint import write_tiny_checkpoint

PARTS = ("latency", "throughput", "recovery")
NUM_STEPS = 40  # of the job whose time is computed from measured steps


class Headline:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cpu" if args.dry_run else "cuda"
        self.checkpoint = args.folder / "checkpoint"
        content = machine(self.device) | {
            "num_gpus": args.num_gpus, "latency": [], "throughput": [], "recovery": None,
        }  # fmt: skip
        self.record = Record(args.output, content, budget_s=args.budget_s)

    def run(self) -> None:
        sizes = ["dry-run"] if self.args.dry_run else self.args.sizes
        if "latency" in self.args.parts:
            self.record.case("latency", lambda: self.latency(sizes[-1]), limit_s=200)
        wanted = {"throughput", "recovery"} & set(self.args.parts)
        if not wanted:
            return
        self.record.case("checkpoint", self.write_checkpoint, limit_s=200)
        for number, layout in enumerate(layouts.layouts(self.args.num_gpus)):
            kills = number == 0 and "recovery" in wanted
            if "throughput" in wanted or kills:
                cases = sizes if number < 3 else sizes[:1]
                self.record.case(
                    layout.name,
                    lambda layout=layout, cases=cases, kills=kills: self.layout(
                        layout, cases, kills
                    ),
                    limit_s=600,
                )

    def latency(self, case: str) -> None:
        """A forward over all GPUs in each way, in processes of torchrun."""
        path = self.args.folder / "parallel.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
            str(self.args.num_gpus), "-m", "benchmarks.parallel", "--repeats", "2",
            "--ways", "ulysses", "cfg", "ring2", "--output", str(path),
        ]  # fmt: skip
        if self.args.dry_run:
            command += ["--dry-run"]
        else:
            command += ["--cases", case, "--attention", self.args.attention]
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
        measured = json.loads(path.read_text())
        self.record.content |= {key: measured[key] for key in ("attention", "dtype")}
        for row in measured["rows"]:
            if "seconds" in row:
                # A guided step is two forwards, or one that cfg parallel halves the GPUs for.
                step_s = row["seconds"] * (1 if row["way"] == "cfg" else 2)
                row |= {"step_s": step_s, "job_s": NUM_STEPS * step_s}
            self.record.content["latency"].append(row)

    def write_checkpoint(self) -> None:
        if self.args.dry_run:
            write_tiny_checkpoint(self.checkpoint, task="t2v-A14B", overwrite=True)
        elif not self.checkpoint.exists():
            partial = self.checkpoint.with_suffix(".partial")
            if partial.exists():  # of a run that was interrupted
                shutil.rmtree(partial)
            write_full_size_checkpoint(partial, device=self.device)
            partial.rename(self.checkpoint)
            torch.cuda.empty_cache()

    def layout(self, layout: Layout, cases: list[str], kills: bool) -> None:
        folder = self.args.folder / layout.name.replace(" ", "-").replace(":", "-")
        concurrency = 2 * layout.num_gpus
        num_jobs = self.args.rounds * layout.num_gpus
        with layouts.running(layout, self.checkpoint, folder, on_cpu=self.args.dry_run) as facts:
            for case in cases if "throughput" in self.args.parts else []:
                jobs = layouts.load(case, num_jobs=num_jobs, concurrency=concurrency)
                row = {"layout": layout.name, "case": case} | facts | {"figures": figures(jobs)}
                self.record.content["throughput"].append(row)
                self.record.save()
            if kills:
                jobs, killed_at = layouts.load_and_kill(
                    cases[0], num_jobs=3 * num_jobs, concurrency=concurrency,
                    after_s=self.args.kill_after_s, folder=folder,
                )  # fmt: skip
                found = layouts.recovery(jobs, killed_at)
                self.record.content["recovery"] = {"layout": layout.name} | found

    def table(self) -> str:
        content = self.record.content
        parts = []
        if content["latency"]:
            rows = [["", "s a step", f"s for {NUM_STEPS} steps", "scaling", "error"]]
            for row in content["latency"]:
                name = f"{row['impl']} {row['way']}"
                if "seconds" in row:
                    rows.append([
                        name, f"{row['step_s']:.3f}", f"{row['job_s']:.1f}",
                        _or_dash(row.get("scaling"), ".0%"),
                        _or_dash(row.get("relative_rms_error"), ".1e"),
                    ])  # fmt: skip
            parts.append(markdown(rows))
        if content["throughput"]:
            rows = [["layout", "size", "jobs/h", "p95, s", "busiest stage", "start, s"]]
            for row in content["throughput"]:
                found = row["figures"]
                busy = [stage["busy_share"] for stage in found["stages"].values()]
                rows.append([
                    row["layout"], row["case"], _or_dash(found["jobs_per_hour"], ".0f"),
                    _or_dash(found["latency_s"] and found["latency_s"]["p95"], ".1f"),
                    _or_dash(max(busy, default=None), ".0%"), f"{row['start_s']:.0f}",
                ])  # fmt: skip
            parts.append(markdown(rows))
        if (found := content["recovery"]) is not None:
            seconds = _or_dash(found["seconds_to_recovery"], ".1f")
            parts.append(
                f"A group killed in {found['layout']}: its successor worked after {seconds} s,"
                f" {found['num_lost']} of {found['num_jobs']} jobs lost."
            )
        parts += [f"not done: {name}: {why}" for name, why in content["failures"].items()]
        return "\n\n".join(parts)


def _or_dash(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.add_argument("--num-gpus", type=int, required=True, help="even; 2, 4 or 8")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", choices=("480p", "720p"), default=["480p", "720p"],
                        help="of the load; the last one is also the latency's")  # fmt: skip
    parser.add_argument("--attention", default="auto", help="Diffusers runs cuDNN")
    parser.add_argument("--rounds", type=int, default=3, help="jobs per GPU and load")
    parser.add_argument("--kill-after-s", type=float, default=8.0)
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/wan-headline"),
                        help="29 GB of weights, logs and videos; memory is quickest")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPUs")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.num_gpus < 2 or args.num_gpus % 2:
        parser.error("--num-gpus must be even: 2, 4 or 8")
    if not args.dry_run and torch.cuda.device_count() < args.num_gpus:
        parser.error(f"this machine has {torch.cuda.device_count()} GPUs: use --dry-run")
    started = time.monotonic()
    headline = Headline(args)
    headline.run()
    headline.record.save()
    print(headline.table())
    print(f"{args.output}, {time.monotonic() - started:.0f} s")
    return bool(headline.record.content["failures"])


if __name__ == "__main__":
    sys.exit(main())
