"""Loading one expert from disk: cold, from the page cache, and what the machine can do at most.

Owns the random checkpoint it writes (Diffusers layout, bf16 shards), the way files are dropped from
the page cache, and the ceilings: a plain parallel read of the same files and a copy to the device.

    python -m benchmarks.load --output benchmarks/results/load-h200.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.full_size_experts import random_expert
from benchmarks.gpu_timing import Record, device_of, machine
from wan_model.checkpoint_files import load_parameters
from wan_model.checkpoint_keys import transformer_slots
from wan_model.config import T2V_A14B, TransformerConfig
from wan_model.transformer import WanTransformer, is_float32_island

SHARD_BYTES = 5 * 10**9
READ_BYTES = 16 * 2**20
NUM_READERS = 8


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.device, self.folder = args.device, folder
        self.config = dataclasses.replace(T2V_A14B.transformer, num_layers=args.layers)
        if args.tiny:
            self.config = TransformerConfig(
                dim=64, num_heads=2, num_layers=2, ffn_dim=96, in_channels=16, out_channels=16
            )
        self.record = Record(
            args.output, {**machine(self.device), "rows": []}, budget_s=args.budget_s
        )
        self.files: list[Path] = []

    def write(self) -> None:
        """The shards of one expert; written a shard at a time, so that host memory holds one."""
        started = time.perf_counter()
        model = random_expert(self.config, torch.bfloat16, self.device)
        state = model.state_dict()
        shard: dict[str, torch.Tensor] = {}
        for key, slot in transformer_slots(state, "diffusers").items():
            shard[key] = slot.part(state[slot.name]).to("cpu", torch.bfloat16).contiguous()
            if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                self._write_shard(shard)
                shard = {}
        if shard:
            self._write_shard(shard)
        num_bytes = sum(path.stat().st_size for path in self.files)
        self.note("write", time.perf_counter() - started, num_bytes=num_bytes)

    def _write_shard(self, shard: dict[str, torch.Tensor]) -> None:
        path = self.folder / f"shard-{len(self.files)}.safetensors"
        save_file(shard, path)
        self.files.append(path)

    def forget(self) -> None:
        """The files leave the page cache, once they are on the disk."""
        for path in self.files:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def read(self, name: str) -> None:
        """The files' bytes into host memory and nowhere else, by several readers."""
        pieces = [
            (path, start) for path in self.files
            for start in range(0, path.stat().st_size, READ_BYTES)
        ]  # fmt: skip
        started = time.perf_counter()
        with ThreadPoolExecutor(NUM_READERS) as pool:
            num_bytes = sum(pool.map(_read_piece, pieces))
        self.note(name, time.perf_counter() - started, num_bytes=num_bytes)

    def load(self, name: str, num_readers: int) -> None:
        with torch.device("meta"):
            model = WanTransformer(self.config)
        slots = transformer_slots(model.state_dict(), "diffusers")
        started = time.perf_counter()
        load_parameters(
            model, slots, self.files,
            device=self.device, dtype=torch.bfloat16, keeps_float32=is_float32_island,
            num_readers=num_readers,
        )  # fmt: skip
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        num_bytes = sum(path.stat().st_size for path in self.files)
        self.note(name, time.perf_counter() - started, num_bytes=num_bytes)

    def copy(self) -> None:
        """Host to device, from memory the device can read by itself."""
        host = torch.empty(2**30, dtype=torch.uint8)
        if self.device.startswith("cuda"):
            host = host.pin_memory()
        target = host.to(self.device)
        started = time.perf_counter()
        for _ in range(4):
            target.copy_(host, non_blocking=True)
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.note("pinned copy", time.perf_counter() - started, num_bytes=4 * 2**30)

    def note(self, name: str, seconds: float, *, num_bytes: int) -> None:
        row = {"what": name, "seconds": seconds, "num_bytes": num_bytes}
        row["gb_per_s"] = num_bytes / seconds / 1e9
        self.record.content["rows"].append(row)
        print(row, flush=True)

    def run(self) -> None:
        case = self.record.case
        case("write", self.write, limit_s=150)
        case("forget", self.forget, limit_s=90)
        case("read cold", partial(self.read, "read cold"), limit_s=60)
        case("read cached", partial(self.read, "read cached"), limit_s=60)
        case("pinned copy", self.copy, limit_s=20)
        for num_readers in (8, 16, 1):
            name = f"load cached, {num_readers} readers"
            case(name, partial(self.load, name, num_readers), limit_s=40)
        case("forget again", self.forget, limit_s=60)
        case("load cold", partial(self.load, "load cold", 8), limit_s=60)


def _read_piece(piece: tuple[Path, int]) -> int:
    path, start = piece
    buffer = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.readinto(buffer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--layers", type=int, default=14, help="0.7 GB each; an expert has 40")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"),
                        help="on the disk to measure; one in it is made and removed")  # fmt: skip
    parser.add_argument("--budget-s", type=float, default=400)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.device = device_of(args.device, tiny=args.tiny)
    with tempfile.TemporaryDirectory(prefix="wan-load-", dir=args.folder) as folder:
        Bench(args, Path(folder)).run()


if __name__ == "__main__":
    main()
