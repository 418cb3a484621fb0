"""Where a measurement was made, for the result files. Knows nothing about what is measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any


def describe_machine() -> dict[str, Any]:
    """`load_average` is that of the last minute, now: above 0 before a run means company."""
    return {
        "machine": platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "ray": version("ray"),
    }
