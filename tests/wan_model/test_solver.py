"""The solvers against Diffusers' on a toy velocity field, and their memory as data."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from wan_model.config import T2V_A14B
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.solver import predict_x0, solver_step
from wan_model.state import DenoiseState, draw_noise

SHAPE = (4, 3, 6, 5)


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth field that depends on both arguments, so that every term of a solver matters."""
    return torch.sin(2 * latents + sigma) - 0.3 * latents + 0.5 * sigma


def run(solver: str, num_steps: int, *, stop: int | None = None, state=None, shift=12.0):
    params = VideoParams.for_model(T2V_A14B, num_steps=num_steps, solver=solver, shift=shift)
    schedule = build_schedule(params)
    state = state or DenoiseState(latents=draw_noise(SHAPE, 7))
    while state.step_index < (num_steps if stop is None else stop):
        noise_pred = velocity(state.latents, schedule.sigmas[state.step_index])
        state = solver_step(solver, state, noise_pred, schedule)
    return state


def run_diffusers(scheduler, sigmas) -> torch.Tensor:
    scheduler.set_begin_index(0)
    latents = draw_noise(SHAPE, 7)
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(velocity(latents, sigmas[i]), t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 40, 100])
def test_unipc_follows_diffusers_on_the_same_sigmas(num_steps):
    sigmas = build_schedule(VideoParams.for_model(T2V_A14B, num_steps=num_steps)).sigmas
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.tensor(sigmas)
    expected = run_diffusers(scheduler, sigmas)
    # float64 coefficients here, float32 there: rounding only.
    torch.testing.assert_close(run("unipc", num_steps).latents, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 40])
def test_dpmpp_follows_diffusers_on_the_same_sigmas(num_steps):
    made = build_schedule(VideoParams.for_model(T2V_A14B, num_steps=num_steps, solver="dpm++"))
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
    )
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.tensor(made.sigmas)
    expected = run_diffusers(scheduler, made.sigmas)
    torch.testing.assert_close(run("dpm++", num_steps).latents, expected, atol=2e-5, rtol=0)


def test_euler_is_the_straight_line():
    schedule = build_schedule(
        VideoParams.for_model(T2V_A14B, num_steps=4, solver="euler", shift=5.0)
    )
    noise, v = draw_noise(SHAPE, 1), draw_noise(SHAPE, 2)
    state = DenoiseState(latents=noise)
    for _ in range(4):
        state = solver_step("euler", state, v, schedule)
    torch.testing.assert_close(state.latents, noise - v)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_the_last_step_lands_on_the_predicted_clean_latents(solver):
    params = VideoParams.for_model(T2V_A14B, num_steps=6, solver=solver)
    schedule = build_schedule(params)
    state = run(solver, 6, stop=5)
    noise_pred = velocity(state.latents, schedule.sigmas[5])
    final = solver_step(solver, state, noise_pred, schedule)
    torch.testing.assert_close(
        final.latents, predict_x0(state, noise_pred, schedule), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_state_that_went_through_arrays_goes_on_as_if_nothing_had_happened(solver, stop):
    whole = run(solver, 6)
    half = run(solver, 6, stop=stop)
    resumed = run(solver, 6, state=DenoiseState.from_arrays(half.to_arrays()))
    assert torch.equal(resumed.latents, whole.latents)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_forgetting_the_solvers_memory_would_be_seen(solver):
    """The contract above has teeth: a state without its history gives other latents or fails."""
    half = run(solver, 6, stop=3)
    older = tuple(torch.zeros_like(m) for m in half.x0_history)
    amnesiac = DenoiseState(
        latents=half.latents, step_index=3, x0_history=older, last_sample=half.last_sample
    )
    assert (run(solver, 6, state=amnesiac).latents - run(solver, 6).latents).abs().max() > 1e-2


def test_noise_is_the_same_for_the_same_seed_and_another_for_another():
    assert torch.equal(draw_noise(SHAPE, 3), draw_noise(SHAPE, 3))
    assert not torch.equal(draw_noise(SHAPE, 3), draw_noise(SHAPE, 4))
    assert draw_noise(SHAPE, 3).dtype == torch.float32
