"""The connection by which a leader notices at once that a rank's process is gone."""

import asyncio
import socket
import threading
from dataclasses import replace

from cluster.lifeline import Lifeline, hold


def test_the_end_of_a_rank_is_seen_and_of_that_rank_only(run):
    async def cut_one():
        lifeline = Lifeline(2)
        address = await lifeline.open("127.0.0.1")
        holder = threading.Thread(target=hold, args=(address, 0), daemon=True)
        holder.start()
        rank_1 = socket.create_connection((address.host, address.port))
        rank_1.sendall(f"{address.token} 1\n".encode())
        await asyncio.sleep(0.1)
        assert not lifeline.cut[1].done()
        rank_1.close()
        await asyncio.wait_for(lifeline.cut[1], 1)
        assert not lifeline.cut[0].done()
        lifeline.close()
        await asyncio.wait_for(lifeline.cut[0], 1)
        await asyncio.to_thread(holder.join, 1)
        assert not holder.is_alive(), "a rank's end returns when the leader lets go"

    run(cut_one())


def test_a_stranger_cannot_end_a_group(run):
    async def say(address, hello):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(hello)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 1) == b"", "turned away"
        writer.close()

    async def strangers():
        lifeline = Lifeline(1)
        address = await lifeline.open("127.0.0.1")
        wrong = replace(address, token="guess")
        for hello in (f"{wrong.token} 0\n", f"{address.token} 7\n", f"{address.token} x\n", "\n"):
            await say(address, hello.encode())
        await say(address, b"\xff" * 100_000)
        assert not lifeline.cut[0].done()
        lifeline.close()

    run(strangers())
