"""A TCP connection from each rank to the leader that ends when the rank's process or node does.

The kernel closes it within milliseconds of a process' end, which Ray reports later, and a second
or more later when the node goes too; for a node that vanishes without a word keepalive probes
count. The probes are the kernel's, so a rank that is merely busy always passes. Knows no Ray.
"""

import asyncio
import contextlib
import secrets
import socket
from dataclasses import dataclass

# A silent peer is given up after IDLE + COUNT * INTERVAL seconds.
_KEEPALIVE_IDLE_S = 1
_KEEPALIVE_INTERVAL_S = 1
_KEEPALIVE_COUNT = 3


@dataclass(frozen=True, kw_only=True)
class LifelineAddress:
    """Where ranks connect; the token keeps strangers from speaking for a rank."""

    host: str
    port: int
    token: str


class Lifeline:
    """The leader's end. `cut[rank]` is done once that rank's connection has ended."""

    def __init__(self, num_ranks: int) -> None:
        loop = asyncio.get_running_loop()
        self.cut: list[asyncio.Future[None]] = [loop.create_future() for _ in range(num_ranks)]
        self._token = secrets.token_hex(16)
        self._connections: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> LifelineAddress:
        self._server = await asyncio.start_server(self._hold, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return LifelineAddress(host=host, port=port, token=self._token)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(writer)
        rank = None
        with contextlib.suppress(OSError, ValueError):  # reset, timed out, or not one of ours
            rank = self._rank_of((await reader.readline()).decode())
            _probe(writer.get_extra_info("socket"))
            await reader.read(1)
        if rank is not None and not self.cut[rank].done():
            self.cut[rank].set_result(None)
        writer.close()

    def _rank_of(self, hello: str) -> int:
        token, _, rank = hello.strip().partition(" ")
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            raise ValueError("a stranger's hello")
        if int(rank) >= len(self.cut):
            raise ValueError(f"no rank {rank} in a group of {len(self.cut)}")
        return int(rank)


def hold(address: LifelineAddress, rank: int) -> None:
    """The rank's end: connect, and block until the leader closes or is gone."""
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(f"{address.token} {rank}\n".encode())
        connection.settimeout(None)
        _probe(connection)
        with contextlib.suppress(OSError):
            connection.recv(1)


def _probe(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
