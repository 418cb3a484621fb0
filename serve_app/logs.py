"""Where the log lines of a replica go: to Serve's own handlers, with time, level and replica."""

from __future__ import annotations

import logging


def log_as_serve_does() -> None:
    """Called in a replica's constructor: Serve sets its own logger up, and no other."""
    serve = logging.getLogger("ray.serve")
    for name in ("serve_app", "cluster"):
        ours = logging.getLogger(name)
        ours.setLevel(serve.level)
        ours.handlers = list(serve.handlers)
