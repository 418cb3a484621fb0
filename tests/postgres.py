"""A PostgreSQL server of our own, and a fresh database of each kind for every test that asks.

The server is Debian's, on a free port of loopback, gone when the session ends. It does not run as
root, so root runs it as the user `postgres` that the package brings. conftest.py has the fixtures.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


class PostgresServer:
    """A running server; `restart()` cuts every connection, as a crash would."""

    def __init__(self, bin_dir: Path, root: Path) -> None:
        self._bin_dir, self._data, self._root = bin_dir, root / "data", root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", self._data)
        self.start()

    def start(self) -> None:
        options = (
            f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._root}"
            " -c fsync=off"
        )
        log = self._root / "log"
        self._run("pg_ctl", "-w", "-D", self._data, "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-D", self._data, "-m", "immediate", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}"

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"

        self._run("createdb", "-h", "127.0.0.1", "-p", self._port, "-U", "postgres", name)
        return self.url(name)

    def _run(self, program: str, *args: object) -> None:
        as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        line = [*as_postgres, self._bin_dir / program, *args]
        # Files, not pipes: the server inherits them and would keep a pipe open for ever.
        with tempfile.TemporaryFile() as output:
            process = subprocess.run(
                [str(word) for word in line], cwd="/", stdout=output, stderr=subprocess.STDOUT
            )
            output.seek(0)
            assert process.returncode == 0, output.read().decode()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    # Not tmp_path: its parents are closed to the user postgres.
    root = Path(tempfile.mkdtemp(prefix="wan-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(root, "postgres")
    try:
        server = PostgresServer(found[-1].parent, root)
        yield server
        server.stop()
    finally:
        shutil.rmtree(root)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database; a test that asks for it runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return request.getfixturevalue("postgres_server").create_database()
