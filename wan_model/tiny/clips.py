"""Clips in quantity: rendered and judged by processes beside the one that trains.

Owns the worker processes and the shared memory that rendered frames travel through. Knows nothing
about networks: frames arrive as uint8 tensors, to be copied wherever they are needed.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from wan_model.tiny.data import NUM_FRAMES, SIZE, Clip, Scene, sample_clip
from wan_model.tiny.judge import score

CLIP_SHAPE = (NUM_FRAMES, SIZE, SIZE, 3)
_CLIPS_PER_SLOT = 32
_SLOTS_PER_WORKER = 3


class ClipWorkers:
    """`num_workers` processes, forked at once: make it before CUDA is first used. 0 is none.

    Frames are written into slots of anonymous shared memory, which a small /dev/shm does not
    limit; a slot is used again when its clips were taken.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._num_slots = max(1, num_workers * _SLOTS_PER_WORKER)
        self._memory = mmap.mmap(-1, self._num_slots * _CLIPS_PER_SLOT * math.prod(CLIP_SHAPE))
        self._slots = np.frombuffer(self._memory, np.uint8).reshape(
            self._num_slots, _CLIPS_PER_SLOT, *CLIP_SHAPE
        )
        self._executor = None
        if num_workers:
            self._executor = ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_adopt_slots,
                initargs=(self._slots,),
            )
            list(self._executor.map(abs, range(num_workers)))

    def close(self) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def render(self, num_clips: int, *, seed: int) -> Iterator[tuple[int, Tensor, list[str]]]:
        """(number of the first clip, frames uint8 [n,F,H,W,3], captions), in any order.

        Clips of the training split. The frames are valid until the next piece is asked for.
        """
        if self._executor is None:
            _adopt_slots(self._slots)
        starts = iter(range(0, num_clips, _CLIPS_PER_SLOT))
        free = list(range(self._num_slots))
        running = {}
        while True:
            while free and (start := next(starts, None)) is not None:
                stop = min(start + _CLIPS_PER_SLOT, num_clips)
                task = (free[-1], seed, start, stop)
                if self._executor is None:
                    yield start, self._frames(free[-1], stop - start), _render_into(*task)
                    continue
                running[self._executor.submit(_render_into, *task)] = (free.pop(), start)
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                slot, start = running.pop(future)
                captions = future.result()
                yield start, self._frames(slot, len(captions)), captions
                free.append(slot)

    def _frames(self, slot: int, num_clips: int) -> Tensor:
        return torch.from_numpy(self._slots[slot, :num_clips])

    def held_out(self, num_clips: int, *, seed: int) -> list[Clip]:
        """Clips whose combination of shape, colour and motion is never trained on."""
        map_ = self._executor.map if self._executor else map
        return list(map_(_held_out_clip, [seed] * num_clips, range(num_clips)))

    def score(self, scenes: Sequence[Scene], videos: Sequence[np.ndarray]) -> dict[str, float]:
        """`judge.score`, divided over the workers."""
        if not self._executor:
            return score(scenes, videos)
        size = math.ceil(len(scenes) / self.num_workers)
        cuts = range(0, len(scenes), size)
        parts = list(
            self._executor.map(
                score,
                [scenes[cut : cut + size] for cut in cuts],
                [videos[cut : cut + size] for cut in cuts],
            )
        )
        weights = [len(scenes[cut : cut + size]) / len(scenes) for cut in cuts]
        return {
            name: sum(w * part[name] for w, part in zip(weights, parts, strict=True))
            for name in parts[0]
        }


_slots: np.ndarray


def _adopt_slots(slots: np.ndarray) -> None:
    global _slots
    _slots = slots


def _render_into(slot: int, seed: int, start: int, stop: int) -> list[str]:
    clips = [sample_clip(seed, index) for index in range(start, stop)]
    for place, clip in zip(_slots[slot], clips, strict=False):
        place[:] = clip.frames
    return [clip.caption for clip in clips]


def _held_out_clip(seed: int, index: int) -> Clip:
    return sample_clip(seed, index, split="held_out")
