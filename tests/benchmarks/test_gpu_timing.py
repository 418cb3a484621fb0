"""A case's time box holds whatever the case catches, and ends no other case."""

import json
import signal
import time
from types import SimpleNamespace

import pytest

from benchmarks import step
from benchmarks.gpu_timing import Record


def test_a_case_that_outlasts_its_box_ends_though_a_kernel_of_it_was_guarded(tmp_path):
    record = Record(tmp_path / "record.json", {"rows": []}, budget_s=60)
    found, bench = {}, SimpleNamespace(device="cpu")

    def slow() -> None:
        for name in ("first", "second"):
            step.Bench._ceiling(bench, found, name, 1.0, lambda: time.sleep(0.5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "alarm", lambda s: signal.setitimer(signal.ITIMER_REAL, s and 0.05))
        record.case("slow", slow, limit_s=10)
    record.case("next", lambda: record.content["rows"].append("done"), limit_s=10)
    content = json.loads(record.path.read_text())
    assert content["failures"] == {"slow": "OutOfTime: the case outlasted its time box"}
    assert content["rows"] == ["done"] and found == {}


def test_a_kernel_that_is_not_there_leaves_the_others_their_turn():
    found, bench = {}, SimpleNamespace(device="cpu")

    def missing() -> None:
        raise RuntimeError("no such kernel")

    step.Bench._ceiling(bench, found, "missing", 1.0, missing)
    step.Bench._ceiling(bench, found, "there", 1.0, lambda: None)
    assert found["missing"] == "RuntimeError: no such kernel" and found["there"] > 0
