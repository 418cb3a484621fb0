"""How soon a restarted process of an expert can step: kernels compiled, and found on disk again.

Owns the processes (one after another, the first one with an empty cache) and their clocks. The
expert has the full width and two layers: its weights' time is `benchmarks.load`'s.

    python -m benchmarks.restart --output benchmarks/results/restart-h200.json
    python -m benchmarks.restart --tiny --output /tmp/restart.json         # a dry run on a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("nothing on disk", "kernels on disk")


def measure(device: str, *, tiny: bool) -> dict[str, float]:
    """Seconds of this process: imports, the kernel's check, the first forward and the second."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name] = now - started
        started = now

    import torch

    from benchmarks.full_size_experts import Forward, random_expert
    from wan_model.attention import check_kernel
    from wan_model.config import T2V_A14B

    config = dataclasses.replace(T2V_A14B.transformer, num_layers=2)
    if tiny:
        config = dataclasses.replace(
            config, dim=64, num_heads=2, ffn_dim=96, text_dim=32, text_len=16
        )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_expert(config, dtype, device)
    lap("imports and device")
    check_kernel("auto", device=device, dtype=dtype, head_dim=config.head_dim, needs_lse=False)
    lap("check of the attention kernel")
    shape = (2, 4, 6) if tiny else (21, 60, 104)
    with torch.inference_mode():
        case = Forward(config, shape, clean_first_frame=False, device=device)
        run = case.ours(model)
        run()
        lap("first forward")
        run()
        lap("second forward")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny widths, on a CPU: a dry run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = "cpu" if args.tiny else args.device
    if args.output is None:  # one of the processes that are measured
        print(json.dumps(measure(device, tiny=args.tiny)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            environ = os.environ | {"TRITON_CACHE_DIR": f"{folder}/triton"}
            command = [sys.executable, "-m", "benchmarks.restart", "--device", device]
            command += ["--tiny"] * args.tiny
            done = subprocess.run(
                command, env=environ, stdout=subprocess.PIPE, timeout=200, check=True
            )
            seconds = json.loads(done.stdout.splitlines()[-1])
            rows.append({"case": name, "seconds": sum(seconds.values()), "parts": seconds})
            print(rows[-1], flush=True)
    args.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
