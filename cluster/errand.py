"""One function call in a worker process, by import string: for what the caller must not import.

Owns nothing that lasts. Knows no model; needs a Ray that is already connected.
"""

import importlib
from typing import Any

import ray


@ray.remote(num_cpus=0, max_retries=0)
def _call(target: str, kwargs: dict[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(**kwargs)


def call_in_worker(target: str, *, timeout_s: float = 300.0, **kwargs: Any) -> Any:
    """`package.module:function(**kwargs)`, run elsewhere. Raises what it raised, as itself."""
    try:
        return ray.get(_call.remote(target, kwargs), timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
