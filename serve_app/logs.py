"""Where the log lines of a replica go: to Serve's own handlers, with time, level and replica."""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.exceptions import RayServeException


def log_as_serve_does() -> None:
    """Called in a replica's constructor: Serve sets its own logger up, and no other."""
    try:
        serve.get_replica_context()
    except RayServeException:  # a test made the object by hand
        return
    theirs = logging.getLogger("ray.serve")
    for name in ("serve_app", "cluster"):
        ours = logging.getLogger(name)
        ours.setLevel(theirs.level)
        ours.handlers = list(theirs.handlers)
