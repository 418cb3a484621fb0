"""One event loop per test module, since a group lives on the loop that started it."""

import asyncio

import pytest

WAIT_S = 75.0


@pytest.fixture(scope="module")
def run():
    """`run(coroutine)`: its result, or TimeoutError after WAIT_S seconds."""
    loop = asyncio.new_event_loop()
    yield lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, WAIT_S))
    loop.close()
