"""The ODE solvers as functions of values: (state, noise_pred, schedule) -> state.

Owns the update rules; the memory they need is in DenoiseState. Knows nothing about networks,
guidance or which expert predicted. Notation: alpha = 1 - sigma, lambda = log(alpha / sigma),
m = the predicted clean latents x0 = x - sigma * noise_pred.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from wan_model.schedule import Schedule
from wan_model.state import DenoiseState, draw_noise


def solver_step(
    solver: str, state: DenoiseState, noise_pred: Tensor, schedule: Schedule
) -> DenoiseState:
    """Moves `state` from step i to i+1 by `solver` ("unipc", "dpm++" or "euler").

    noise_pred: [C, T, H, W] float32, the network's velocity (noise - x0) after guidance.
    """
    return _STEPS[solver](state, noise_pred.float(), schedule)


def predict_x0(state: DenoiseState, noise_pred: Tensor, schedule: Schedule) -> Tensor:
    """The clean latents that the network sees behind the current ones."""
    return state.latents - schedule.sigmas[state.step_index] * noise_pred


def renoise(state: DenoiseState, seed: int, schedule: Schedule) -> DenoiseState:
    """The state's newest x0 prediction under new noise of the same level, (1 - sigma) x0 + sigma
    noise; the solver begins afresh. What x0 leaves open, at a high sigma the detail, becomes
    another; needs a step taken before."""
    sigma, x0 = schedule.sigmas[state.step_index], state.x0_history[0]
    noise = draw_noise(tuple(x0.shape), seed).to(x0.device)
    return DenoiseState(latents=(1 - sigma) * x0 + sigma * noise, step_index=state.step_index)


def _euler(state: DenoiseState, noise_pred: Tensor, schedule: Schedule) -> DenoiseState:
    i = state.step_index
    latents = state.latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * noise_pred
    # Not needed for the next step: a preview shows it.
    x0_history = (predict_x0(state, noise_pred, schedule),)
    return DenoiseState(latents=latents, step_index=i + 1, x0_history=x0_history)


def _dpmpp_2m(state: DenoiseState, noise_pred: Tensor, schedule: Schedule) -> DenoiseState:
    """DPM-Solver++(2M), midpoint form (2211.01095, algorithm 2); first order without a history and
    at the last step."""
    i, sigmas = state.step_index, schedule.sigmas
    m0 = predict_x0(state, noise_pred, schedule)
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    # expm1(-inf) = -1: the last step lands on m0 exactly, the first one may start at sigma 1.
    alpha_phi = (1 - sigmas[i + 1]) * math.expm1(-h)
    latents = (sigmas[i + 1] / sigmas[i]) * state.latents - alpha_phi * m0
    if state.x0_history and i < schedule.num_steps - 1:
        h_last = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
        latents = latents - 0.5 * alpha_phi * (h / h_last) * (m0 - state.x0_history[0])
    return DenoiseState(latents=latents, step_index=i + 1, x0_history=(m0,))


def _unipc(state: DenoiseState, noise_pred: Tensor, schedule: Schedule) -> DenoiseState:
    """UniPC of order 2, B2(h) (2302.04867): correct the sample with the new x0, then predict.

    The new x0 comes from the uncorrected sample; only the corrected one is carried on.
    """
    i = state.step_index
    m = predict_x0(state, noise_pred, schedule)
    sample = state.latents
    if state.last_sample is not None:
        sample = _unipc_correct(state, m, schedule)
    x0_history = (m, *state.x0_history[:1])
    return DenoiseState(
        latents=_unipc_predict(i, sample, x0_history, schedule),
        step_index=i + 1,
        x0_history=x0_history,
        last_sample=sample,
    )


def _unipc_order(i: int, num_steps: int, num_predictions: int) -> int:
    """2, but 1 while there is one prediction only, and at the last step."""
    return min(2, num_predictions, num_steps - i)


def _unipc_correct(state: DenoiseState, m: Tensor, schedule: Schedule) -> Tensor:
    """Redoes the step that led here, i-1 -> i, now that the x0 at its end is known."""
    i, sigmas = state.step_index, schedule.sigmas
    m0, *older = state.x0_history
    h = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    phi_1 = math.expm1(-h)
    alpha_phi = (1 - sigmas[i]) * phi_1
    sample = (sigmas[i] / sigmas[i - 1]) * state.last_sample - alpha_phi * m0
    if _unipc_order(i - 1, schedule.num_steps, len(state.x0_history)) == 1:
        return sample - alpha_phi * 0.5 * (m - m0)
    r = (_log_snr(sigmas[i - 2]) - _log_snr(sigmas[i - 1])) / h
    # rho solves [[1, 1], [r, 1]] rho = (phi_2 / B, 2 phi_3 / B) with B = phi_1.
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho_1 = (b_2 - b_1) / (r - 1)
    rho_2 = b_1 - rho_1
    return sample - alpha_phi * (rho_1 / r * (older[0] - m0) + rho_2 * (m - m0))


def _unipc_predict(
    i: int, sample: Tensor, x0_history: tuple[Tensor, ...], schedule: Schedule
) -> Tensor:
    sigmas, m0 = schedule.sigmas, x0_history[0]
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    alpha_phi = (1 - sigmas[i + 1]) * math.expm1(-h)
    latents = (sigmas[i + 1] / sigmas[i]) * sample - alpha_phi * m0
    if _unipc_order(i, schedule.num_steps, len(x0_history)) == 2:
        r = (_log_snr(sigmas[i - 1]) - _log_snr(sigmas[i])) / h
        latents = latents - alpha_phi * 0.5 / r * (x0_history[1] - m0)
    return latents


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma); minus and plus infinity at sigma 1 and 0."""
    if sigma >= 1.0:
        return -math.inf
    if sigma <= 0.0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma)


_STEPS: dict[str, Callable[[DenoiseState, Tensor, Schedule], DenoiseState]] = {
    "unipc": _unipc,
    "dpm++": _dpmpp_2m,
    "euler": _euler,
}
