"""Steps that are reused: which, that they cost no forward, and that the memory is in the state."""

import dataclasses

import numpy as np
import pytest
import torch
from test_parallel import conditioning

from wan_model.config import Expert
from wan_model.engine import ExpertEngine
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.step_reuse import predict_velocity, remember
from wan_model.weights import open_checkpoint

NUM_STEPS = 12
ALWAYS = 1.0  # a threshold that nothing here reaches


@pytest.fixture(scope="module")
def config(tiny):
    return open_checkpoint(str(tiny("t2v-A14B"))).config


@pytest.fixture(scope="module")
def experts(tiny):
    where = {"checkpoint": str(tiny("t2v-A14B")), "device": "cpu"}
    return {expert: ExpertEngine(**where, expert=expert.value) for expert in Expert}


@pytest.fixture
def forwards(experts, monkeypatch):
    """A list that grows by one entry a forward."""
    calls = []
    for expert, engine in experts.items():
        forward_each = engine.transformer.forward_each

        def counted(latents, timesteps, texts, sp, _expert=expert, _forward_each=forward_each):
            calls.extend([_expert] * len(texts))
            return _forward_each(latents, timesteps, texts, sp)

        monkeypatch.setattr(engine.transformer, "forward_each", counted)
    return calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """`pattern`: a letter a step, c computed or r reused. `states`: before every segment's end."""

    pattern: str
    states: list[dict[str, np.ndarray]]

    @property
    def latents(self) -> np.ndarray:
        return self.states[-1]["latents"]


@pytest.fixture
def run(config, experts):
    def run(cache: float | None, *, segment: int = NUM_STEPS, **given) -> Run:
        numbers = {"width": 64, "height": 32, "num_frames": 9, "num_steps": NUM_STEPS, "seed": 4}
        params = VideoParams.for_model(config, **numbers, cache=cache, **given)
        schedule, pattern, states, step = build_schedule(params), "", [], 0
        while step < NUM_STEPS:
            engine = experts[schedule.expert_at(step)]
            engine.open(
                "j",
                params=dataclasses.asdict(params),
                conditioning=conditioning(config, params),
                state=states[-1] if states else None,
            )
            end = min(schedule.end_of(step), step + segment)
            while step < end:
                result = engine.step("j")
                step += 1
                assert result["step_index"] == step
                pattern += "r" if result["reused"] else "c"
            states.append({name: array.copy() for name, array in engine.export("j").items()})
        return Run(pattern=pattern, states=states)

    return run


def test_without_cache_every_step_is_computed_and_the_state_is_the_solvers_alone(run, forwards):
    plain = run(None, segment=1)
    assert plain.pattern == "c" * NUM_STEPS
    assert len(forwards) == 2 * NUM_STEPS  # with guidance
    solvers = {"latents", "step_index", "x0_history.0", "x0_history.1", "last_sample"}
    assert all(set(state) <= solvers for state in plain.states)
    nothing_reused = run(1e-9)
    assert nothing_reused.pattern == plain.pattern
    assert np.array_equal(nothing_reused.latents, plain.latents)


def test_a_reused_step_runs_no_forward(run, forwards):
    got = run(ALWAYS)
    assert got.pattern.count("r") >= NUM_STEPS // 3
    assert len(forwards) == 2 * got.pattern.count("c")


def test_the_first_two_steps_of_an_expert_and_the_last_of_the_job_are_computed(run, config):
    """So nothing of the high-noise expert's is reused beyond the boundary."""
    params = VideoParams.for_model(config, num_steps=NUM_STEPS)
    boundary = build_schedule(params).boundary_step
    for given in ({}, {"boundary_seed": 5}):
        got = run(ALWAYS, **given)
        high, low = got.pattern[:boundary], got.pattern[boundary:]
        assert high.startswith("ccr") and high.endswith("r")
        assert low.startswith("ccr") and low.endswith("rc")
        assert not [name for state in got.states for name in state if name.startswith("reuse.")]


@pytest.mark.parametrize("threshold", [0.4, ALWAYS])
@pytest.mark.parametrize("segment", [1, 2, 3])
def test_a_job_taken_up_again_after_any_step_is_the_same_to_the_bit(run, threshold, segment):
    whole, pieces = run(threshold), run(threshold, segment=segment)
    assert pieces.pattern == whole.pattern
    assert np.array_equal(pieces.latents, whole.latents)
    assert any("reuse.slope" in state for state in pieces.states)


@pytest.fixture
def line():
    """A velocity that is a line in sigma along latents on a curve, as a schedule finds them."""
    params = VideoParams(
        width=16, height=16, num_frames=1, fps=8, num_steps=8, seed=0, solver="euler", shift=3.0,
        guidance_high_noise=1.0, guidance_low_noise=1.0, boundary_ratio=None,
    )  # fmt: skip
    schedule = build_schedule(params)
    a, b = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    points = [(s * s * a + b, a + s * b) for s in schedule.sigmas]
    memory = None
    for step_index in (0, 1):
        latents, velocity = points[step_index]
        memory = remember(memory, latents, velocity, step_index=step_index, schedule=schedule)
    return schedule, points, memory


def test_what_changes_along_a_line_is_extrapolated_exactly(line):
    schedule, points, memory = line
    for step_index in (2, 5):
        latents, velocity = points[step_index]
        where = {"step_index": step_index, "schedule": schedule, "threshold": ALWAYS}
        torch.testing.assert_close(predict_velocity(memory, latents, **where), velocity)


def test_a_step_is_computed_once_the_predicted_change_reaches_the_threshold(line):
    schedule, points, memory = line
    (x0, v0), (x1, v1), (x2, _) = points[:3]
    change = (v1 - v0).abs().mean() / (x1 - x0).abs().mean()
    change *= (x2 - x1).abs().mean() / v1.abs().mean()
    where = {"step_index": 2, "schedule": schedule}
    assert predict_velocity(memory, x2, threshold=1.01 * change.item(), **where) is not None
    assert predict_velocity(memory, x2, threshold=0.99 * change.item(), **where) is None
    still = remember(memory, x1, v1, step_index=2, schedule=schedule)
    where = {"step_index": 3, "schedule": schedule, "threshold": ALWAYS}
    assert predict_velocity(still, x2, **where) is None, "nothing moved, so nothing is known"
