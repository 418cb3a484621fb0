"""The formulas, on a made-up trace whose answers are known by hand."""

import numpy as np
import pytest

from benchmarks.trace import (
    JobTrace,
    Run,
    Span,
    busy_share_by_replica,
    distribution,
    figures,
    merged,
    most_at_once,
    overlap,
    percentile,
    spans_of,
)


def span(stage, started_at, ended_at, replica=None, busy_s=None):
    return Span(
        stage=stage, replica=replica or f"{stage}#1", started_at=started_at, ended_at=ended_at,
        busy_s=ended_at - started_at if busy_s is None else busy_s,
    )  # fmt: skip


def job(name, submitted_at, completed_at, *timings, status="completed", **more):
    return JobTrace(
        id=name, model="m", status=status, submitted_at=submitted_at, completed_at=completed_at,
        timings=timings, **more,
    )  # fmt: skip


# Times from 100. Busy: text 101-102, 102-103; high 102-106, 106-110 (two calls of job b); vae
# 110-111 (a). Window 101-111.
TRACE = (
    job("a", 100, 112, span("text", 101, 102), span("high", 102, 106), span("vae", 110, 111)),
    job("b", 100.5, 110.5, span("text", 102, 103), span("high", 106, 108), span("high", 108, 110),
        num_refusals=2),
)  # fmt: skip


def test_throughput_counts_from_the_first_submit_to_the_last_completion():
    found = figures(TRACE)
    assert found["duration_s"] == 12
    assert found["jobs_per_hour"] == pytest.approx(2 / 12 * 3600)
    assert found["num_refusals"] == 2


def test_latency_and_queue_time_are_counted_from_the_submit():
    found = figures(TRACE)
    assert found["latency_s"]["max"] == 12
    assert found["latency_s"]["p50"] == 11
    assert found["queue_s"]["mean"] == pytest.approx((1 + 1.5) / 2)


def test_busy_share_and_seconds_per_stage_are_those_of_the_trace():
    stages = figures(TRACE)["stages"]
    assert list(stages) == ["text", "high", "vae"]
    assert stages["high"]["busy_share"] == pytest.approx(8 / 10)
    assert stages["high"]["num_calls"] == 3
    assert stages["high"]["busy_s"] == pytest.approx(8)
    assert stages["text"]["busy_share"] == pytest.approx(2 / 10)
    assert stages["vae"]["call_s"]["p99"] == pytest.approx(1)


def test_a_replica_that_works_for_two_jobs_at_once_is_busy_once():
    spans = [span("vae", 0, 4), span("vae", 2, 6)]
    assert busy_share_by_replica(spans, (0, 10)) == {"vae#1": pytest.approx(0.6)}
    [stage] = figures([job("a", 0, 6, *spans)])["stages"].values()
    assert stage["busy_s"] == pytest.approx(6)
    assert stage["call_s"]["mean"] == pytest.approx(4)


def test_pauses_between_the_steps_of_a_job_are_not_busy():
    # Two jobs step in turns from 0 to 8, each 3 s of them: 2 s were nobody's.
    spans = [span("high", 0, 8, busy_s=3), span("high", 0, 8, busy_s=3)]
    assert busy_share_by_replica(spans, (0, 10)) == {"high#1": pytest.approx(0.6)}
    # Of a span that is half outside, half its work counts.
    assert busy_share_by_replica(spans, (4, 14)) == {"high#1": pytest.approx(0.3)}


def test_the_busy_share_of_a_stage_is_the_mean_of_its_replicas():
    spans = [span("high", 0, 10, "first"), span("high", 0, 5, "second")]
    [stage] = figures([job("a", 0, 10, *spans)])["stages"].values()
    assert stage["num_replicas"] == 2
    assert stage["busy_share"] == pytest.approx(0.75)


def test_work_outside_the_window_does_not_count():
    assert busy_share_by_replica([span("vae", 0, 6)], (5, 10)) == {"vae#1": pytest.approx(0.2)}


def test_overlap_counts_stages_not_replicas_or_jobs():
    spans = [span("high", 0, 4, "first"), span("high", 0, 4, "second"), span("low", 2, 8)]
    # 4 s of high and 6 s of low in 8 s; together from 2 to 4.
    assert overlap(spans) == {"mean": pytest.approx(10 / 8), "most": 2}
    assert figures(TRACE)["stages_busy_at_once"] == {"mean": pytest.approx(11 / 10), "most": 2}


def test_an_interval_that_ends_when_another_starts_does_not_meet_it():
    assert most_at_once([(0, 1), (1, 2)]) == 1
    assert most_at_once([(0, 1), (0.5, 2), (0.9, 0.9)]) == 2
    assert most_at_once([]) == 0


def test_intervals_that_touch_become_one():
    assert merged([(3, 4), (0, 1), (1, 2), (0.5, 1.5), (5, 5)]) == [(0, 2), (3, 4)]


def test_failed_jobs_count_as_failed_and_nowhere_else():
    found = figures([*TRACE, job("c", 100, 500, status="failed", error="no")])
    assert (found["num_jobs"], found["num_completed"], found["num_failed"]) == (3, 2, 1)
    assert found["duration_s"] == 12
    assert found["latency_s"]["max"] == 12


@pytest.mark.parametrize("jobs", [[], [job("c", 0, 5, status="failed")]])
def test_a_run_without_a_completed_job_has_no_figures_and_no_error(jobs):
    found = figures(jobs)
    assert found["jobs_per_hour"] is found["latency_s"] is found["stages_busy_at_once"] is None
    assert found["stages"] == {}


@pytest.mark.parametrize("percent", [0, 1, 50, 95, 99, 99.9, 100])
@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0, 1.0, 3.0], list(range(100))])
def test_percentiles_equal_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_of_nothing_or_beyond_the_ends_are_refused():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="0..100"):
        percentile([1.0], 101)
    assert distribution([]) is None


def test_a_saved_run_is_read_back_as_it_was(tmp_path):
    run = Run(name="r", options={"jobs": 2}, environment={}, jobs=TRACE, started_at=100.0)
    run.save(tmp_path / "deep" / "r.json")
    assert Run.load(tmp_path / "deep" / "r.json") == run


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{}]}'])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json"):
        Run.load(path)


def test_timings_may_carry_fields_that_are_not_known_here():
    told = {"stage": "s", "replica": "r", "started_at": 1.0, "ended_at": 2.0, "busy_s": 0.5}
    assert spans_of([told | {"novelty": 3}]) == (Span(**told),)
