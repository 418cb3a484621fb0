"""The job table and the connections to it: SQLite by default, PostgreSQL by URL.

Owns the table's columns, the transactions and their locks, and the upgrade to the newest migration.
Knows nothing about what a job goes through: those statements are in `jobs.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from serve_app.job_schema import QUEUED, StoreUnavailable

logger = logging.getLogger(__name__)

P, T = ParamSpec("P"), TypeVar("T")

BUSY_TIMEOUT_S = 30  # how long a SQLite writer waits for the others
ANSWER_TIMEOUT_S = 20  # of PostgreSQL
OPEN_PATIENCE_S, OPEN_RETRY_S = 300.0, 2.0
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
ASYNCPG_OPTIONS = (
    "gsslib", "host", "krbsrvname", "passfile", "port", "prepared_statement_cache_size", "service",
    "servicefile", "ssl", "target_session_attrs",
)  # fmt: skip
"""Those of its connect() and of SQLAlchemy's that can be written in a URL."""
_SSL_FILES = {
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
}
"""libpq's options of which asyncpg reads the environment variable only."""
# Names of PostgreSQL advisory locks; any numbers that nothing else in the database uses.
MIGRATION_LOCK, SUBMIT_LOCK = 0x57414E01, 0x57414E02

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
    # The order of submission: unlike created_at it has no ties.
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("user", sa.Text),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("negative_prompt", sa.Text),
    sa.Column("params", sa.JSON, nullable=False),
    sa.Column("num_steps", sa.Integer, nullable=False),
    sa.Column("predicted_s", sa.Double, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("input_image", sa.Text),
    sa.Column("last_image", sa.Text),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("request_hash", sa.Text),
    sa.Column("status", sa.Text, nullable=False, default=QUEUED),
    sa.Column("stage", sa.Text),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("progress", sa.Integer, nullable=False, default=0),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("worker", sa.Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("available_at", sa.Double, nullable=False, default=0.0),  # a retry waits until then
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("checkpoint", sa.Text),
    sa.Column("checkpoint_step", sa.Integer, nullable=False, default=0),
    sa.Column("artifacts", sa.JSON, nullable=False, default=dict),
    sa.Column("error_code", sa.Text),
    sa.Column("error_message", sa.Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("completed_at", sa.Double),
    sa.Column("expires_at", sa.Double),
    sa.Column("extend_prompt", sa.Boolean, nullable=False, default=False),
    sa.Column("remixed_from", sa.Text),
    sa.Column("branch_from", sa.Text),
    sa.Column("preview", sa.Boolean, nullable=False, default=False),
    sa.Column("announced", sa.Boolean, nullable=False, default=True),
    sa.Column("revised_prompt", sa.Text),
    sa.Column("prompt_note", sa.Text),
    sa.Column("cinematography", sa.JSON(none_as_null=True)),
    sa.Column("boundary_state", sa.Text),
    sa.Column("total_failures", sa.Integer, nullable=False, default=0),
    sa.UniqueConstraint("owner", "idempotency_key", name="uq_jobs_idempotency"),
    sa.Index("ix_jobs_claim", "status", "priority", "seq"),
    sa.Index("ix_jobs_owner", "owner", "seq"),
    sa.Index("ix_jobs_expiry", "expires_at"),
)
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),  # webhook-id: the same at every retry
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("available_at", sa.Double, nullable=False),
    sa.Column("lease_until", sa.Double),
    sa.Index("ix_webhook_deliveries_due", "available_at"),
)


def runs_to_its_end(
    method: Callable[P, Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """A cancelled caller stops waiting, but the transaction it began still ends.

    A statement cut off in the driver's thread would leave SQLite's write lock taken.
    """

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        running = asyncio.create_task(method(*args, **kwargs))
        _running.add(running)  # the loop itself keeps tasks weakly
        running.add_done_callback(_running.discard)
        return await asyncio.shield(running)

    return call


_running: set[asyncio.Task[Any]] = set()


class JobDatabase:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, url: str, *, patience_s: float = OPEN_PATIENCE_S) -> JobDatabase:
        """Connect and bring the table to the newest revision; many processes may open at once.

        A database that may come up later than its users is waited for: Serve gives a deployment up
        after three failed constructors, but sets a constructor no time.

        Raises:
            ValueError: neither `sqlite:///FILE` nor `postgresql://...`.
            StoreUnavailable: nobody answered there for `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return await cls._open(url)
            except StoreUnavailable as error:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                logger.warning("%s: waiting for it, %.0f s more at most", error, left_s)
            await asyncio.sleep(min(OPEN_RETRY_S, left_s))

    @classmethod
    async def _open(cls, url: str) -> JobDatabase:
        parsed = _parse(url)
        if parsed.get_backend_name() == "postgresql":
            database = cls(_postgresql_engine(parsed))
        else:
            database = cls(_sqlite_engine(parsed))
        try:
            async with _first_sqlite_user(parsed):
                await database._migrate()
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        await self._engine.dispose()

    @contextlib.asynccontextmanager
    async def transaction(self, *, write: bool = False) -> AsyncIterator[AsyncConnection]:
        engine = self._engine.execution_options(write=True) if write else self._engine
        try:
            async with engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            if not _is_unanswered(error):
                raise
            # The driver's own words only: SQLAlchemy's would repeat the row, prompt and all.
            raise StoreUnavailable(f"the job database does not answer: {error.orig}") from error
        except (OSError, sa.exc.TimeoutError) as error:
            raise StoreUnavailable(f"the job database cannot be reached: {error}") from error

    async def lock(self, connection: AsyncConnection, name: int) -> None:
        """Wait until no other transaction holds `name`. SQLite has one writer at a time anyway."""
        if connection.dialect.name == "postgresql":
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(name)))

    async def _migrate(self) -> None:
        config = AlembicConfig()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))

        def upgrade(connection: sa.Connection) -> None:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

        async with self.transaction(write=True) as connection:
            await self.lock(connection, MIGRATION_LOCK)
            await connection.run_sync(upgrade)


def _is_unanswered(error: sa.exc.DBAPIError) -> bool:
    """The database's trouble, not a mistake in a statement."""
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return True
    # Classes of PostgreSQL's codes: connection lost, out of resources, starting up or going down.
    code = getattr(error.orig, "sqlstate", None) or ""
    return error.connection_invalidated or code[:2] in ("08", "53", "57")


def check_database(url: str, num_nodes: int) -> None:
    """Refuse what could not be opened, or not from everywhere, before anything starts.

    Raises:
        ValueError: `url` is no URL of a job database, or it is SQLite on more than one node.
    """
    if _parse(url).get_backend_name() == "sqlite" and num_nodes > 1:
        raise ValueError(
            f"the job database is a SQLite file, which serves one node only, and this cluster has "
            f"{num_nodes} nodes: set a postgresql:// URL"
        )


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # it may hold a password: the URL is not repeated
        raise ValueError(
            "the job database is sqlite:///FILE or postgresql://..., and this is no URL"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+asyncpg", query=_asyncpg_options(parsed.query))
    if backend != "sqlite":
        raise ValueError(f"the job database is sqlite:///FILE or postgresql://..., not {backend}")
    if parsed.database in (None, "", ":memory:"):
        raise ValueError("the SQLite job database needs a file: sqlite:////path/to/jobs.sqlite")
    return parsed.set(drivername="sqlite+aiosqlite")


def _asyncpg_options(query: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a PostgreSQL URL as asyncpg takes them: most URLs are written for libpq."""
    options = dict(query)
    if "sslmode" in options:
        options["ssl"] = options.pop("sslmode")
    if options.get("ssl", "prefer") not in SSL_MODES:
        raise ValueError(f"the job database's sslmode is one of {', '.join(SSL_MODES)}")
    for name in options:
        if name not in ASYNCPG_OPTIONS:
            instead = f", and set {variable}" if (variable := _SSL_FILES.get(name)) else ""
            raise ValueError(
                f"the job database's URL has the option {name}, which asyncpg does not take: remove"
                f" it{instead}"
            )
    return options


def _postgresql_engine(url: sa.URL) -> AsyncEngine:
    # pre_ping: after a restart of the server the pool's dead connections are replaced silently.
    # The timeouts: a partition must not hold a stage's turn; a late answer is StoreUnavailable.
    return create_async_engine(
        url,
        pool_size=5,
        max_overflow=5,
        pool_pre_ping=True,
        connect_args={"timeout": ANSWER_TIMEOUT_S, "command_timeout": ANSWER_TIMEOUT_S},
    )


def _sqlite_engine(url: sa.URL) -> AsyncEngine:
    """One connection, in a thread of its own: calls of this process queue for it in order.

    Two would poll for the one write lock, each delaying the other by up to 0.1 s.
    """
    engine = create_async_engine(
        url,
        pool_size=1,
        max_overflow=0,
        # isolation_level None: the driver begins nothing by itself, `begin` below does.
        connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def set_up(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
        cursor.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later would fail rather than wait for its turn.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


@contextlib.asynccontextmanager
async def _first_sqlite_user(url: sa.URL) -> AsyncIterator[None]:
    """One process at a time turns WAL on: SQLite does not wait for that lock, it fails."""
    if url.get_backend_name() != "sqlite":
        yield
        return
    path = Path(url.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
