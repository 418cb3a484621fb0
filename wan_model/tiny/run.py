"""One stage of the training as it was asked for, and the files that stages hand to each other.

Owns the folder of a stage, its time and its weights on disk. Knows nothing about what is trained.

    RUNS/<stage>/weights.safetensors   running average of the weights, float32
    RUNS/<stage>/report.json           losses, seconds, the command, scores on held-out clips
    RUNS/<stage>/samples.png           some of those clips
    RUNS/<stage>/training.pt           everything, for --resume
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan_model.tiny.loop import Loop, Schedule
from wan_model.transformer import is_float32_island

State = dict[str, Tensor]

# What is left of the minutes for scores and files.
EVALUATION_S = {"vae": 15.0, "vae22": 15.0, "t2v": 25.0, "i2v": 30.0, "ti2v": 25.0}


@dataclass(frozen=True, kw_only=True)
class Run:
    """`None` leaves a number to the stage; `out` is the folder of all stages (RUNS above)."""

    stage: str
    out: Path
    command: str
    started_s: float
    device: torch.device
    dtype: torch.dtype | None = None
    minutes: float | None = None
    num_iterations: int | None = None
    num_clips: int
    num_evaluated: int
    num_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    resume: Path | None = None
    keep_text_encoder: bool = False
    attention_backend: str = "sdpa"

    @property
    def folder(self) -> Path:
        return self.out / self.stage

    @property
    def checkpoint(self) -> Path:
        return self.folder / "training.pt"

    def schedule(self, learning_rate: float, **numbers) -> Schedule:
        """What remains of the minutes now, less the time for the evaluation."""
        rate = self.learning_rate or learning_rate
        if self.num_iterations is not None:
            return Schedule(learning_rate=rate, num_iterations=self.num_iterations, **numbers)
        elapsed_s = time.monotonic() - self.started_s
        seconds = self.minutes * 60 - EVALUATION_S[self.stage] - elapsed_s
        if seconds < 1:
            raise ValueError(f"--minutes {self.minutes:g} leaves no time to train {self.stage}")
        return Schedule(learning_rate=rate, seconds=seconds, **numbers)

    def log(self, message: str) -> None:
        print(f"[{time.monotonic() - self.started_s:6.1f} s] {self.stage}: {message}", flush=True)

    def resume_into(self, loop: Loop) -> None:
        """From training.pt, or where that was not kept, from the averaged weights."""
        if self.resume is None:
            return
        if (path := self.resume / "training.pt").is_file():
            loop.load(path)
        else:
            loop.start_from(load_file(self.resume / "weights.safetensors"))
        self.log(f"continuing from {self.resume}, iteration {loop.iteration}")

    def save_weights(self, weights: State) -> None:
        save_file(weights, self.folder / "weights.safetensors")

    def weights_of(self, stage: str) -> State:
        path = self.out / stage / "weights.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run --stage {stage} first")
        return load_file(path)

    def report(self, loop: Loop, scores: Mapping[str, Mapping[str, float]]) -> None:
        on_gpu = self.device.type == "cuda"
        content = {
            "stage": self.stage,
            "command": self.command,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            "seconds": round(time.monotonic() - self.started_s, 1),
            "iterations": loop.iteration,
            "clips": self.num_clips,
            "parameters": loop.weights.numel(),
            "scores": scores,
            "losses": loop.history,
        }
        (self.folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        self.log("done")


def part(weights: Mapping[str, Tensor], name: str) -> State:
    """The weights of network `name`, under their own names."""
    return {
        key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")
    }


@torch.no_grad()
def load_rounded(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into the parameters' own dtypes, by way of the bfloat16 that checkpoints have.

    Raises ValueError when names differ.
    """
    parameters = dict(network.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"weights do not fit: {sorted(parameters.keys() ^ weights.keys())[:5]}")
    for name, parameter in parameters.items():
        # The VAE and the text encoder have no float32 islands; no name of theirs looks like one.
        rounded = weights[name] if is_float32_island(name) else weights[name].bfloat16()
        parameter.copy_(rounded)
