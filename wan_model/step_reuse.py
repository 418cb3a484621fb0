"""Steps without a forward: the guided velocity carried on from the steps computed before.

Owns the decision and the extrapolation, as functions of the memory (`Reuse`), the latents and the
schedule. All of these are equal on every rank, so all ranks decide alike. Knows nothing about
networks, guidance or solvers.

The decision follows EasyCache (2507.02860): the velocity's relative change is predicted from how
far the latents moved and how much it changed with them lately. Reusing a straight line through the
last two computed velocities had half the error of EasyCache's reuse of v - x on wan-tiny.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from wan_model.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What one expert's last computed step found; the field `reuse` of a DenoiseState.

    latents, velocity: [C, T, H, W] float32, before that step and predicted (guided) in it.
    slope: the velocity's change per unit of sigma since the computed step before it.
    sensitivity: the velocity's relative change per unit of mean |change of the latents|.
    Both are None until the expert has computed two steps.
    """

    step_index: int
    latents: Tensor
    velocity: Tensor
    slope: Tensor | None = None
    sensitivity: float | None = None


def predict_velocity(
    memory: Reuse | None,
    latents: Tensor,
    *,
    step_index: int,
    schedule: Schedule,
    threshold: float | None,
) -> Tensor | None:
    """The velocity of this step, or None when it must be computed: the predicted relative change
    has reached `threshold` (None: never reuse), too little is known, or it is the job's last."""
    if threshold is None or memory is None or memory.slope is None:
        return None
    if step_index == schedule.num_steps - 1:
        return None
    if not memory.sensitivity * _mean_change(latents, memory.latents) < threshold:
        return None
    moved = schedule.sigmas[step_index] - schedule.sigmas[memory.step_index]
    return memory.velocity + moved * memory.slope


def remember(
    memory: Reuse | None, latents: Tensor, velocity: Tensor, *, step_index: int, schedule: Schedule
) -> Reuse:
    """The memory after a step was computed; `memory` is the one before, of the same expert."""
    if memory is None:
        return Reuse(step_index=step_index, latents=latents, velocity=velocity)
    moved = schedule.sigmas[step_index] - schedule.sigmas[memory.step_index]
    distance = _mean_change(latents, memory.latents) * velocity.abs().mean().item()
    changed = _mean_change(velocity, memory.velocity)
    return Reuse(
        step_index=step_index,
        latents=latents,
        velocity=velocity,
        slope=(velocity - memory.velocity) / moved,
        sensitivity=changed / distance if distance else math.inf,
    )


def _mean_change(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()
