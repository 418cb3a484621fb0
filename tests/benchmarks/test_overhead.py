"""The figures of the overhead benchmark, on timings whose answers are known by hand."""

import pytest

from benchmarks.overhead import hand_overs, saturation_figures, slept_s, solo_figures, table
from benchmarks.sleeping_engines import ExpertEngine, SleepTimes, VAEEngine
from benchmarks.trace import JobTrace, Span
from wan_model.config import WAN_TINY
from wan_model.params import VideoParams

SLEPT = {"TextEncoder": 1.0, "LowNoiseExpert": 4.0}
TIMES = SleepTimes(text_encode_s=0.0, step_high_noise_s=0.0, step_low_noise_s=0.0, decode_s=0.0)


def params(num_steps=12):
    return VideoParams.for_model(WAN_TINY, width=64, height=64, num_frames=9, num_steps=num_steps)


def trace(start, *spans):
    """Spans as (stage, started, ended) in seconds after `start`; completed 0.1 s after the last."""
    timings = tuple(
        Span(stage=stage, replica=stage, started_at=start + a, ended_at=start + b, busy_s=b - a)
        for stage, a, b in spans
    )
    return JobTrace(
        id="v", model="m", status="completed", submitted_at=start,
        completed_at=timings[-1].ended_at + 0.1, timings=timings,
    )  # fmt: skip


ALONE = trace(10, ("TextEncoder", 0.2, 1.2), ("LowNoiseExpert", 1.5, 5.6))


def test_hand_overs_are_the_times_in_which_no_stage_works():
    found = hand_overs(ALONE)
    assert [kind for kind, _ in found] == [
        "submit -> TextEncoder", "TextEncoder -> LowNoiseExpert", "LowNoiseExpert -> completed",
    ]  # fmt: skip
    assert [gap_s for _, gap_s in found] == pytest.approx([0.2, 0.3, 0.1])


def test_wall_time_is_stages_plus_hand_overs():
    found = solo_figures([ALONE], SLEPT)
    assert found["num_hand_overs"] == 3
    assert found["per_hand_over_s"] == pytest.approx((ALONE.latency_s - 1.0 - 4.1) / 3)
    assert found["in_stages_s"] == pytest.approx(0.1)


def test_the_bottleneck_is_measured_from_its_first_start_to_its_last_end():
    jobs = [
        trace(0, ("TextEncoder", 0, 1), ("LowNoiseExpert", 1, 5.2)),
        trace(0, ("TextEncoder", 1, 2), ("LowNoiseExpert", 5.4, 9.4)),
    ]
    found = saturation_figures(jobs, SLEPT)
    assert found["bottleneck"] == "LowNoiseExpert"
    assert found["window_s"] == pytest.approx(8.4)
    assert found["busy_share"] == pytest.approx(8.2 / 8.4)
    assert found["slept_share"] == pytest.approx(8 / 8.4)


def test_the_sleep_of_a_job_is_known_from_its_schedule():
    times = SleepTimes(
        text_encode_s=0.5, step_high_noise_s=1.0, step_low_noise_s=100.0, decode_s=0.25
    )
    slept = slept_s(times, params(num_steps=12))
    num_high = slept["HighNoiseExpert"]
    assert 0 < num_high < 12
    assert slept["LowNoiseExpert"] == (12 - num_high) * 100
    assert (slept["TextEncoder"], slept["VAE"]) == (0.5, 0.25)


def test_a_sleeping_expert_steps_and_hands_its_state_over():
    engine = ExpertEngine(checkpoint=TIMES.to_checkpoint(), expert="high_noise", device="cpu")
    engine.open("v", params=vars(params()), conditioning={}, state=None)
    assert engine.step("v")["step_index"] == 1
    state = engine.export("v")
    engine.close("v")
    assert state["latents"].shape == params().latent_shape(WAN_TINY)
    engine.open("v", params=vars(params()), conditioning={}, state=state)
    assert engine.step("v")["step_index"] == 2


def test_a_sleeping_vae_gives_a_file_of_some_size():
    made = VAEEngine(checkpoint=TIMES.to_checkpoint(), device="cpu").decode(
        params=vars(params()), state={}
    )
    assert made["num_frames"] == 9
    assert len(made["mp4"]) == 64 * 64 * 9 // 100


def test_the_table_says_what_was_wanted():
    result = {
        "solo": solo_figures([ALONE], SLEPT),
        "saturation": saturation_figures([ALONE], SLEPT),
    }
    assert "< 50.0" in table(result)
    assert ">= 97%" in table(result)
