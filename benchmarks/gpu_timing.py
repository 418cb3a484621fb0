"""How the GPU benchmarks time, guard and record their cases.

Owns the clock (device events, or the host's clock on a CPU), the rule that one failing case stops
no other, and the JSON file, rewritten after every case. Knows nothing about what is measured.
"""

from __future__ import annotations

import gc
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device_of(device: str, *, tiny: bool) -> str:
    """Where a run takes place: without a GPU a tiny one is a dry run on the CPU."""
    return "cpu" if tiny and not torch.cuda.is_available() else device


def time_s(
    run: Callable[[], object], device: str, *, repeats: int, warm_ups: int = 1
) -> list[float]:
    """Seconds of each counted run, after `warm_ups` that are not."""
    for _ in range(warm_ups):
        run()
    return [_once(run, device) for _ in range(repeats)]


def median_s(
    run: Callable[[], object], device: str, *, repeats: int = 5, warm_ups: int = 1
) -> float:
    return statistics.median(time_s(run, device, repeats=repeats, warm_ups=warm_ups))


def _once(run: Callable[[], object], device: str) -> float:
    if not device.startswith("cuda"):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def start_counting_memory(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def machine(device: str) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda or ""}


class OutOfTime(BaseException):
    """A case took longer than its box, or the whole run did. No `except Exception` in a case, which
    expects what a kernel or a library raises, may take it for that."""


class Record:
    """The results of one run, kept on disk as they come."""

    def __init__(self, path: Path, content: dict[str, Any], *, budget_s: float) -> None:
        self.path = path
        self.content = content | {"failures": {}, "case_seconds": {}}
        self._deadline = time.monotonic() + budget_s

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def case(self, name: str, run: Callable[[], object], *, limit_s: int) -> None:
        """Calls `run`, for at most `limit_s`; what it raises is recorded, not raised."""
        started = time.monotonic()
        left_s = int(min(limit_s, self._deadline - started))
        try:
            if left_s < 5:
                raise OutOfTime("the run's budget is spent")
            signal.signal(signal.SIGALRM, _alarm)
            signal.alarm(left_s)
            run()
        except (Exception, OutOfTime) as error:  # recorded below: the other cases are worth having
            self.content["failures"][name] = f"{type(error).__name__}: {error}"[:600]
            traceback.print_exc(limit=8)
        finally:
            signal.alarm(0)
        self.content["case_seconds"][name] = round(time.monotonic() - started, 1)
        print(f"-- {name}: {self.content['case_seconds'][name]} s", flush=True)
        self.save()


def _alarm(signum: int, frame: object) -> None:
    raise OutOfTime("the case outlasted its time box")
