"""The thread behind a decode: order, bound, and errors in both directions."""

from __future__ import annotations

import threading

import pytest

from wan_model.follower import Follower


def test_every_piece_is_worked_on_in_order_by_another_thread() -> None:
    seen: list[tuple[int, str]] = []
    work = lambda piece: seen.append((piece, threading.current_thread().name))  # noqa: E731
    with Follower(work, max_waiting=2) as follower:
        for piece in range(20):
            follower.put(piece)
    assert seen == [(piece, "follower") for piece in range(20)]


def test_putting_waits_while_as_many_pieces_as_allowed_are_waiting() -> None:
    may_go_on, third_is_in = threading.Event(), threading.Event()

    def put_three(follower: Follower[int]) -> None:
        for piece in range(3):  # one at work, one waiting, one too many
            follower.put(piece)
        third_is_in.set()

    with Follower(lambda piece: may_go_on.wait(10), max_waiting=1) as follower:
        putting = threading.Thread(target=put_three, args=(follower,))
        putting.start()
        assert not third_is_in.wait(0.05)
        may_go_on.set()
        assert third_is_in.wait(10)
        putting.join()


def test_an_error_at_work_ends_the_block_and_drops_what_waits() -> None:
    seen: list[int] = []

    def work(piece: int) -> None:
        seen.append(piece)
        raise ValueError(f"piece {piece} is bad")

    with pytest.raises(ValueError, match="piece 0 is bad"), Follower(work, max_waiting=1) as f:
        for piece in range(5):
            f.put(piece)
    assert seen == [0]


def test_an_error_in_the_block_is_the_one_that_is_raised_and_nothing_more_is_worked_on() -> None:
    seen: list[int] = []
    may_go_on = threading.Event()

    def work(piece: int) -> None:
        may_go_on.wait(10)
        seen.append(piece)

    with pytest.raises(KeyError), Follower(work, max_waiting=2) as follower:
        follower.put(0)
        follower.put(1)
        threading.Timer(0.2, may_go_on.set).start()
        raise KeyError("decoding failed")
    assert 1 not in seen
