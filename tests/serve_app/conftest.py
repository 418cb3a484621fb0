"""Fixtures of the service's tests: a clock that the test moves, jobs to submit, a service over real
stores and its HTTP client."""

from __future__ import annotations

import pytest
from http_service import http_service

from serve_app.jobs import NewJob


@pytest.fixture
def anyio_backend() -> str:
    """`pytest.mark.anyio` runs coroutine tests under asyncio, the loop of the service."""
    return "asyncio"


class Clock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_new_job():
    """A NewJob with whatever the test cares about."""

    def make(**given: object) -> NewJob:
        plain = {"model": "wan-tiny", "prompt": "a cat", "params": {"seed": 1}}
        return NewJob(**(plain | {"num_steps": 4, "predicted_s": 10.0} | given))

    return make


@pytest.fixture
async def service(tmp_path):
    async with http_service(tmp_path) as service:
        yield service


@pytest.fixture
async def client(service):
    async with service.client() as client:
        yield client
