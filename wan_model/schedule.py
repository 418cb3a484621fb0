"""Sigmas, timesteps and which expert takes which step. Pure numbers, no torch.

Flow matching: x_sigma = (1 - sigma) x0 + sigma noise. The grids are those of the official Wan2.2
samplers (Diffusers builds others; see README "Numerics").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wan_model.config import NUM_TRAIN_TIMESTEPS, Expert
from wan_model.params import VideoParams


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`sigmas`: N+1 float32 values in [0, 1], falling, the last 0. `timesteps`: N values times
    1000, whole numbers for UniPC and DPM++, fractions for Euler. Steps below `boundary_step` are
    the high-noise expert's; a one-expert model has boundary_step == num_steps."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    boundary_step: int

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def expert_at(self, step_index: int) -> Expert:
        return Expert.HIGH_NOISE if step_index < self.boundary_step else Expert.LOW_NOISE

    def end_of(self, step_index: int) -> int:
        """The first step that the expert of `step_index` does not take."""
        return self.boundary_step if step_index < self.boundary_step else self.num_steps

    @property
    def has_boundary(self) -> bool:
        """Whether a job changes experts on its way."""
        return 0 < self.boundary_step < self.num_steps


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves a grid towards noise: k s / (1 + (k - 1) s), SD3 paper (2403.03206) section 5.3.2."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def build_schedule(params: VideoParams) -> Schedule:
    """The grid of `params.solver` with `params.num_steps` steps and `params.shift`.

    UniPC starts at the float32 value of 1 - 1/1000, DPM++ and Euler at 1. The four-step distilled
    models use Euler on 1, 3/4, 1/2, 1/4 shifted by 5, whose timesteps stay fractions.
    """
    start = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS)) if params.solver == "unipc" else 1.0
    base = np.linspace(start, 0.0, params.num_steps + 1)[:-1]
    sigmas = shift_sigmas(base, params.shift)
    timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    if params.solver != "euler":
        timesteps = np.trunc(timesteps)
    boundary_step = params.num_steps
    if params.boundary_ratio is not None:
        boundary_timestep = params.boundary_ratio * NUM_TRAIN_TIMESTEPS
        boundary_step = int(np.count_nonzero(timesteps >= boundary_timestep))
    return Schedule(
        sigmas=(*(float(s) for s in sigmas.astype(np.float32)), 0.0),
        timesteps=tuple(float(t) for t in timesteps),
        boundary_step=boundary_step,
    )
