"""Engines that sleep a known time where wan_model.engine computes, with the same methods.

Their states have the sizes of real ones, so that handing them over costs what it costs. For
benchmarks of everything around the engines: no torch, no weights; `checkpoint` says how long.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wan_model.config import WAN_TINY, Expert
from wan_model.params import VideoParams

Arrays = dict[str, np.ndarray]

PROMPT_TOKENS, TEXT_DIM = 64, 4096  # a prompt of some length in UMT5-XXL's width: 1 MiB
THUMBNAIL = b"RIFF"
BYTES_PER_PIXEL = 0.01  # of an mp4


@dataclass(frozen=True, kw_only=True)
class SleepTimes:
    """Seconds of each call. Written as JSON where a real engine has its checkpoint's path."""

    text_encode_s: float
    step_high_noise_s: float
    step_low_noise_s: float
    decode_s: float

    def to_checkpoint(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_checkpoint(cls, checkpoint: str) -> SleepTimes:
        return cls(**json.loads(checkpoint))


class TextEncoderEngine:
    def __init__(self, *, checkpoint: str, **_: Any) -> None:
        self.times = SleepTimes.from_checkpoint(checkpoint)

    def warm_up(self) -> None:
        pass

    def encode(self, prompts: list[str]) -> list[np.ndarray]:
        """One sleep per call, however many prompts."""
        time.sleep(self.times.text_encode_s)
        return [np.zeros((PROMPT_TOKENS, TEXT_DIM), np.float32) for _ in prompts]


class ExpertEngine:
    """The state of a UniPC job: its latents, two predictions and the last sample."""

    def __init__(self, *, checkpoint: str, expert: str, **_: Any) -> None:
        times = SleepTimes.from_checkpoint(checkpoint)
        high = Expert(expert) is Expert.HIGH_NOISE
        self.step_s = times.step_high_noise_s if high else times.step_low_noise_s
        self.states: dict[str, Arrays] = {}

    def warm_up(self) -> None:
        pass

    def open(
        self, job_id: str, *, params: dict[str, Any], conditioning: Arrays, state: Arrays | None
    ) -> None:
        if state is not None:
            # A real engine copies the arrays to its device; views would keep them in the store.
            self.states[job_id] = {name: array.copy() for name, array in state.items()}
            return
        shape = VideoParams(**params).latent_shape(WAN_TINY)
        names = ("latents", "x0_history.0", "x0_history.1", "last_sample")
        latents = {name: np.zeros(shape, np.float32) for name in names}
        self.states[job_id] = latents | {"step_index": np.asarray(0, np.int64)}

    def step(self, job_id: str) -> dict[str, Any]:
        time.sleep(self.step_s)
        state = self.states[job_id]
        state["step_index"] = np.asarray(int(state["step_index"]) + 1, np.int64)
        return {"step_index": int(state["step_index"]), "seconds": self.step_s, "reused": False}

    def export(self, job_id: str) -> Arrays:
        return self.states[job_id]

    def close(self, job_id: str) -> None:
        self.states.pop(job_id, None)


class VAEEngine:
    def __init__(self, *, checkpoint: str, **_: Any) -> None:
        self.times = SleepTimes.from_checkpoint(checkpoint)

    def warm_up(self) -> None:
        pass

    def decode(self, *, params: dict[str, Any], state: Arrays) -> dict[str, Any]:
        video = VideoParams(**params)
        time.sleep(self.times.decode_s)
        num_pixels = video.width * video.height * video.num_frames
        mp4 = bytes(int(num_pixels * BYTES_PER_PIXEL))
        return {"mp4": mp4, "thumbnail": THUMBNAIL, "num_frames": video.num_frames}
