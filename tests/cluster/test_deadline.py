"""The deadline of a step: the configured time at first, then several times what steps take."""

from cluster.deadline import FACTOR, FLOOR_S, MAX_KINDS, StepDeadlines


def test_the_first_two_steps_have_the_whole_time_however_quick_or_slow():
    deadlines = StepDeadlines(600.0)
    assert deadlines.of("720p") == 600.0
    deadlines.record("720p", 90.0)
    assert deadlines.of("720p") == 600.0


def test_then_a_step_may_take_several_times_the_slowest_the_first_one_not_counted():
    deadlines = StepDeadlines(600.0)
    for seconds in (90.0, 10.0, 12.0, 9.0):
        deadlines.record("720p", seconds)
    assert deadlines.of("720p") == FACTOR * 12.0


def test_no_deadline_is_under_the_floor_or_over_the_configured_time():
    deadlines = StepDeadlines(600.0)
    for kind, seconds in (("tiny", 0.01), ("huge", 500.0)):
        for _ in range(3):
            deadlines.record(kind, seconds)
    assert deadlines.of("tiny") == FLOOR_S
    assert deadlines.of("huge") == 600.0
    assert StepDeadlines(5.0).of("tiny") == 5.0


def test_quick_jobs_shorten_nothing_for_large_ones():
    deadlines = StepDeadlines(600.0)
    for _ in range(10):
        deadlines.record("480p", 4.0)
    assert deadlines.of("720p") == 600.0


def test_kinds_not_seen_for_long_are_forgotten():
    deadlines = StepDeadlines(600.0)
    for kind in range(MAX_KINDS + 5):
        for _ in range(3):
            deadlines.record(kind, 10.0)
    assert deadlines.of(0) == 600.0
    assert deadlines.of(MAX_KINDS + 4) == FACTOR * 10.0
