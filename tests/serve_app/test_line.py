"""The line in front of an expert: bounded, by rank, and safe under cancellation."""

import asyncio

import pytest

from serve_app.line import Line

pytestmark = pytest.mark.anyio


async def visit(line: Line, rank, name: str, log: list[str], stay: asyncio.Event) -> None:
    async with line.place(rank):
        log.append(name)
        await stay.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_lowest_rank_goes_first_and_equal_ranks_in_order():
    line, log, stay = Line(1), [], asyncio.Event()
    first = asyncio.create_task(visit(line, (0, 9), "first", log, stay))
    await settle()
    ranks = {"late": (0, 3), "urgent": (-5, 8), "old": (0, 1), "old too": (0, 1)}
    tasks = [
        asyncio.create_task(visit(line, rank, name, log, stay)) for name, rank in ranks.items()
    ]
    await settle()
    assert log == ["first"]
    stay.set()
    await asyncio.gather(first, *tasks)
    assert log == ["first", "urgent", "old", "old too", "late"]


async def test_places_bound_who_is_inside_and_can_grow():
    line, log, stay = Line(2), [], asyncio.Event()
    tasks = [asyncio.create_task(visit(line, i, str(i), log, stay)) for i in range(5)]
    await settle()
    assert log == ["0", "1"]
    line.resize(4)
    await settle()
    assert log == ["0", "1", "2", "3"]
    stay.set()
    await asyncio.gather(*tasks)


async def test_one_who_gives_up_waiting_takes_no_place():
    line, log, stay = Line(1), [], asyncio.Event()
    inside = asyncio.create_task(visit(line, 0, "inside", log, stay))
    await settle()
    gone = asyncio.create_task(visit(line, 1, "gone", log, stay))
    next_one = asyncio.create_task(visit(line, 2, "next", log, stay))
    await settle()
    gone.cancel()
    await settle()
    stay.set()
    await asyncio.gather(inside, next_one)
    assert log == ["inside", "next"]


async def test_one_cancelled_at_the_moment_of_admission_gives_the_place_on():
    line, log, stay = Line(1), [], asyncio.Event()
    stay.set()
    async with line.place(0):
        admitted = asyncio.create_task(visit(line, 1, "admitted", log, stay))
        behind = asyncio.create_task(visit(line, 2, "behind", log, stay))
        await settle()
    admitted.cancel()
    await asyncio.gather(admitted, behind, return_exceptions=True)
    assert log == ["behind"]


async def test_one_cancelled_inside_leaves():
    line, log, stay = Line(1), [], asyncio.Event()
    inside = asyncio.create_task(visit(line, 0, "inside", log, stay))
    await settle()
    behind = asyncio.create_task(visit(line, 1, "behind", log, stay))
    await settle()
    inside.cancel()
    await settle()
    assert log == ["inside", "behind"]
    stay.set()
    await behind


async def test_a_lower_rank_that_waits_is_given_way_and_no_other():
    line, log = Line(1), []

    async def worker(name: str, rank: int, num_steps: int) -> None:
        async with line.place(rank) as place:
            for _ in range(num_steps):
                await place.give_way()
                log.append(name)
                await asyncio.sleep(0.01)

    second = asyncio.create_task(worker("second", 2, 4))
    await asyncio.sleep(0.015)
    first = asyncio.create_task(worker("first", 1, 3))
    third = asyncio.create_task(worker("third", 3, 1))
    await asyncio.gather(first, second, third)
    assert log == ["second"] * 2 + ["first"] * 3 + ["second"] * 2 + ["third"]


async def test_one_cancelled_while_giving_way_leaves_the_line_in_order():
    line, stay = Line(1), asyncio.Event()
    inside: list[str] = []

    async def yielding() -> None:
        async with line.place(2) as place:
            await stay.wait()
            await place.give_way()
            raise AssertionError("the urgent one never leaves")

    task = asyncio.create_task(yielding())
    await settle()
    forever = asyncio.Event()
    urgent = asyncio.create_task(visit(line, 1, "urgent", inside, forever))
    await settle()
    stay.set()
    await settle()
    assert inside == ["urgent"]
    task.cancel()
    await settle()
    forever.set()
    await asyncio.gather(task, urgent, return_exceptions=True)
    async with line.place(9):
        inside.append("later")
    assert inside == ["urgent", "later"]
