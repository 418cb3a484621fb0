"""The job store, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from serve_app.job_database import metadata
from serve_app.jobs import (
    IdempotencyConflict,
    JobNotFound,
    JobStore,
    NewJob,
    QueueFull,
    StoreUnavailable,
    check_database,
)

pytestmark = pytest.mark.anyio

LEASE_S = 30.0
RETENTION_S = 1000.0
MAX_ATTEMPTS = 3


@pytest.fixture
async def store(database_url, clock):
    store = await JobStore.open(database_url, retention_s=RETENTION_S, clock=clock)
    yield store
    await store.close()


@pytest.fixture
def submit(store, make_new_job):
    async def submit_job(**given):
        return await store.submit(make_new_job(**given))

    return submit_job


@pytest.fixture
def claim(store):
    async def claim_job(worker="w", **given):
        return await store.claim(worker, lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS, **given)

    return claim_job


async def renew(store, job):
    renewals = await store.renew_many({job.id: job.attempt}, lease_s=LEASE_S)
    return renewals[job.id]


# --- submitting ------------------------------------------------------------------------------


async def test_a_submitted_job_comes_back_as_it_was_given(store, make_new_job, clock):
    new = make_new_job(owner="key1", user="u", params={"seed": 2**62, "shift": 5.0}, priority=-3)
    job = await store.submit(new)
    assert job == await store.get(new.id)
    assert {name: getattr(job, name) for name in vars(new)} == vars(new)
    assert (job.status, job.created_at, job.attempt, job.artifacts) == ("queued", clock.now, 0, {})


async def test_the_same_idempotency_key_and_request_make_one_job(store, make_new_job):
    new = make_new_job(owner="a", idempotency_key="k", request_hash="h")
    again, other = replace(new, id="video_again"), replace(new, id="video_other", owner="b")
    first = await store.submit(new)
    assert await store.submit(again, max_queued_jobs=1) == first  # no room is needed for it
    assert (await store.submit(other)).id == "video_other"  # a key belongs to its owner
    with pytest.raises(IdempotencyConflict, match="'k'"):
        await store.submit(replace(again, request_hash="another"))


async def test_concurrent_submits_with_one_idempotency_key_make_one_job(store, make_new_job):
    news = [make_new_job(idempotency_key="k", request_hash="h") for _ in range(8)]
    jobs = await asyncio.gather(*map(store.submit, news))
    assert len({job.id for job in jobs}) == 1


async def test_concurrent_submits_never_pass_the_bound_of_jobs(store, make_new_job):
    results = await asyncio.gather(
        *(store.submit(make_new_job(), max_queued_jobs=5) for _ in range(12)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert len(refused) == 7
    assert await store.queue_size() == (5, 50.0)
    assert refused[0].retry_after_s == 10.0  # the mean job is out of the way then


async def test_a_full_queue_of_unpredicted_jobs_is_tried_again_in_half_a_minute(
    store, make_new_job
):
    await store.submit(make_new_job(predicted_s=0.0))
    with pytest.raises(QueueFull) as refused:
        await store.submit(make_new_job(predicted_s=0.0), max_queued_jobs=1)
    assert refused.value.retry_after_s == 30


async def test_the_queue_is_bounded_in_predicted_seconds(store, make_new_job, claim):
    await store.submit(make_new_job(predicted_s=70.0), max_queued_s=100)
    with pytest.raises(QueueFull, match="70 s of work") as refused:
        await store.submit(make_new_job(predicted_s=50.0), max_queued_s=100)
    assert refused.value.retry_after_s == 20.0
    await claim()  # a running job no longer waits
    await store.submit(make_new_job(predicted_s=50.0), max_queued_s=100)


async def test_an_empty_queue_takes_a_job_longer_than_the_bound(store, make_new_job):
    await store.submit(make_new_job(predicted_s=500.0), max_queued_s=100)


@pytest.mark.parametrize("prompt", ["nul \0", "half \ud800"])
async def test_text_that_a_database_cannot_hold_is_refused_by_field(make_new_job, prompt):
    with pytest.raises(ValueError, match="^prompt holds"):
        make_new_job(prompt=prompt)


# --- reading ---------------------------------------------------------------------------------


async def test_a_list_goes_on_after_a_job_in_either_order_with_equal_timestamps(store, submit):
    ids = [(await submit()).id for _ in range(5)]  # the clock stands still
    for order, expected in [("asc", ids), ("desc", ids[::-1])]:
        first = await store.list(limit=2, order=order)
        rest = await store.list(limit=9, order=order, after=first[-1].id)
        assert [job.id for job in first + rest] == expected


async def test_an_owner_sees_and_touches_only_its_own_jobs(store, submit):
    mine, theirs = await submit(owner="me"), await submit(owner="them")
    assert await store.list(owner="me") == [mine]
    assert await store.get(theirs.id, owner="me") is None
    assert await store.request_cancel(theirs.id, owner="me") is None
    assert await store.delete(theirs.id, owner="me") is None
    with pytest.raises(JobNotFound):
        await store.list(owner="me", after=theirs.id)
    assert await store.get(theirs.id) == theirs


async def test_an_id_that_a_database_cannot_compare_is_an_unknown_job(store):
    assert await store.get("video_\0") is None
    assert await store.get("video_\ud800") is None
    assert await store.queue_position("video_\0") is None


async def test_queue_position_counts_the_jobs_ahead(store, submit, claim):
    late, urgent = await submit(), await submit(priority=1)
    assert await store.queue_position(urgent.id) == 0
    assert await store.queue_position(late.id) == 1
    other = await submit(model="another")
    assert await store.queue_position(other.id) == 0, "it waits for no job of another model"
    await claim()
    assert await store.queue_position(urgent.id) is None
    assert await store.queue_position(late.id) == 0


# --- claiming --------------------------------------------------------------------------------


async def test_claims_follow_priority_then_age(submit, claim, clock):
    low, old, young = await submit(priority=-1), await submit(), await submit()
    urgent = await submit(priority=5)
    claimed = [await claim() for _ in range(5)]
    assert [job and job.id for job in claimed] == [urgent.id, old.id, young.id, low.id, None]
    first = claimed[0]
    assert (first.status, first.attempt, first.worker) == ("in_progress", 1, "w")
    assert (first.started_at, first.lease_until) == (clock.now, clock.now + LEASE_S)


async def test_a_claim_can_be_limited_to_the_models_it_serves(submit, claim):
    await submit(model="other")
    mine = await submit(model="mine")
    assert (await claim(models=["mine"])).id == mine.id
    assert await claim(models=["mine"]) is None


async def test_a_lease_keeps_a_job_until_it_runs_out(store, submit, claim, clock):
    await submit()
    first = await claim("a")
    clock.advance(LEASE_S - 1)
    assert await claim("b") is None
    assert await renew(store, first)
    clock.advance(LEASE_S - 1)
    assert await claim("b") is None
    clock.advance(1)
    second = await claim("b")
    assert (second.id, second.attempt, second.worker) == (first.id, 2, "b")
    assert second.started_at == first.started_at


async def test_writes_of_a_stale_attempt_change_nothing(store, submit, claim, clock):
    await submit()
    stale = await claim("a")
    clock.advance(LEASE_S)
    await claim("b")
    before = await store.get(stale.id)
    held = (stale.id, stale.attempt)
    writes = [
        renew(store, stale),
        store.record_progress(*held, stage="vae", step=4, progress=99),
        store.record_checkpoint(*held, key="zombie", step=4),
        store.complete(*held, artifacts={"video": "zombie"}),
        store.fail(*held, code="zombie", message="zombie"),
        store.cancelled(*held),
        store.release(*held),
        store.retry(*held, reason="zombie", max_attempts=1),
    ]
    assert [bool(await write) for write in writes] == [False] * len(writes)
    assert await store.get(stale.id) == before


async def test_many_leases_are_renewed_at_once_and_each_is_answered(store, submit, claim, clock):
    await submit()
    await submit()
    kept, stale = await claim(), await claim()
    await store.request_cancel(kept.id)
    clock.advance(LEASE_S / 2)
    answers = await store.renew_many({kept.id: 1, stale.id: 7, "video_none": 1}, lease_s=LEASE_S)
    assert (answers[kept.id].held, answers[kept.id].cancel_requested) == (True, True)
    assert not answers[stale.id] and not answers["video_none"]
    assert (await store.get(kept.id)).lease_until == clock.now + LEASE_S
    assert (await store.get(stale.id)).lease_until == stale.lease_until


# --- attempts --------------------------------------------------------------------------------


async def test_a_job_that_loses_its_lease_too_often_fails_with_a_clear_error(
    store, submit, claim, clock
):
    poison, healthy = await submit(priority=1), await submit()
    for _ in range(MAX_ATTEMPTS):
        assert (await claim()).id == poison.id
        clock.advance(LEASE_S)
    assert (await claim()).id == healthy.id
    job = await store.get(poison.id)
    assert (job.status, job.error_code) == ("failed", "too_many_attempts")
    assert job.error_message == (
        "gave up after 3 failed attempts; the last: the process that ran it was lost"
    )
    assert (job.completed_at, job.expires_at) == (clock.now, clock.now + RETENTION_S)


async def test_a_retry_waits_its_delay_and_counts_as_a_failed_attempt(store, submit, claim, clock):
    await submit()
    for delay_s in (5, 5, 5):
        job = await claim()
        assert await store.retry(
            job.id, job.attempt, reason="rank 1 died", max_attempts=3, delay_s=delay_s
        )
        assert await claim() is None
        clock.advance(delay_s)
    job = await store.get(job.id)
    assert (job.status, job.error_code, job.failures) == ("failed", "too_many_attempts", 3)
    assert job.error_message.endswith("the last: rank 1 died")


async def test_a_job_that_comes_a_little_further_before_each_failure_is_given_up_too(
    store, submit, claim, clock
):
    await submit()
    limits = {"max_attempts": 2, "max_failures": 4}
    for step in range(1, 5):
        job = await claim(max_failures=4)
        assert (job.failures, job.total_failures) == (min(1, step - 1), step - 1)
        await store.record_checkpoint(job.id, job.attempt, key=f"c-{step}", step=step)
        if step % 2:
            await store.retry(job.id, job.attempt, reason="rank 1 died", **limits)
        else:
            clock.advance(LEASE_S)
    assert await claim(max_failures=4) is None
    job = await store.get(job.id)
    assert (job.status, job.error_code, job.failures) == ("failed", "too_many_attempts", 1)
    assert job.error_message.startswith("gave up after 4 failed attempts in all")


async def test_what_can_be_seen_before_the_end_is_fenced_and_replaced_by_the_end(
    store, submit, claim
):
    await submit()
    job = await claim()
    shown = {"preview": "k"}
    assert not await store.record_artifacts(job.id, job.attempt + 1, artifacts=shown)
    assert await store.record_artifacts(job.id, job.attempt, artifacts=shown)
    assert (await store.get(job.id)).artifacts == shown
    await store.complete(job.id, job.attempt, artifacts={"video": "v"})
    assert (await store.get(job.id)).artifacts == {"video": "v"}
    assert not await store.record_artifacts(job.id, job.attempt, artifacts=shown)


async def test_a_released_job_is_claimed_again_at_once_and_has_not_failed(store, submit, claim):
    await submit()
    for attempt in range(1, MAX_ATTEMPTS + 3):
        job = await claim()
        assert (job.attempt, job.failures) == (attempt, 0)
        assert await store.release(job.id, job.attempt)


async def test_a_job_released_with_a_delay_waits_it_out_and_has_not_failed(
    store, submit, claim, clock
):
    await submit()
    for attempt in range(1, MAX_ATTEMPTS + 3):
        job = await claim()
        assert (job.attempt, job.failures, job.total_failures) == (attempt, 0, 0)
        assert await store.release(job.id, job.attempt, delay_s=30)
        clock.advance(29)
        assert await claim() is None
        clock.advance(1)


async def test_the_next_attempt_finds_the_last_checkpoint(store, submit, claim, clock):
    await submit()
    job = await claim()
    assert await store.record_checkpoint(job.id, job.attempt, key="k/checkpoint-1-2", step=2)
    clock.advance(LEASE_S)
    resumed = await claim()
    assert (resumed.checkpoint, resumed.checkpoint_step) == ("k/checkpoint-1-2", 2)
    assert await store.record_checkpoint(job.id, resumed.attempt, key=None, step=0)  # it was bad
    assert (await store.get(job.id)).checkpoint is None


async def test_progress_only_moves_forward(store, submit, claim, clock):
    await submit()
    job = await claim()

    async def record(attempt, stage, step, progress):
        assert await store.record_progress(
            job.id, attempt, stage=stage, step=step, progress=progress
        )
        now = await store.get(job.id)
        return now.stage, now.step, now.progress

    assert await record(1, "high_noise", 3, 60) == ("high_noise", 3, 60)
    clock.advance(LEASE_S)
    await claim()
    assert await record(2, "text_encoder", 0, 5) == ("high_noise", 3, 60)
    assert await record(2, "high_noise", 2, 60) == ("high_noise", 3, 60)
    assert await record(2, "low_noise", 4, 60) == ("low_noise", 4, 60)


# --- ending ----------------------------------------------------------------------------------


async def test_a_completed_job_carries_its_artifacts_and_no_lease(store, submit, claim, clock):
    await submit()
    job = await claim()
    assert await store.complete(job.id, job.attempt, artifacts={"video": {"key": "v.mp4"}})
    job = await store.get(job.id)
    assert (job.status, job.progress, job.lease_until) == ("completed", 100, None)
    assert job.artifacts == {"video": {"key": "v.mp4"}}
    assert (job.completed_at, job.expires_at) == (clock.now, clock.now + RETENTION_S)
    assert not await store.complete(job.id, job.attempt, artifacts={})  # once


async def test_a_write_says_what_it_made_of_the_job(store, submit, claim):
    await submit()
    job = await claim()
    again = await store.retry(job.id, job.attempt, reason="r", max_attempts=2)
    assert (again.held, again.status) == (True, "queued")
    job = await claim()
    over = await store.retry(job.id, job.attempt, reason="r", max_attempts=2)
    assert over.status == "failed"
    assert (await store.complete(job.id, job.attempt, artifacts={})).status is None, "refused"


async def test_a_failed_job_says_why(store, submit, claim):
    await submit()
    job = await claim()
    assert await store.fail(job.id, job.attempt, code="bad_image", message="not an image: \0\ud800")
    job = await store.get(job.id)
    assert (job.status, job.error_code) == ("failed", "bad_image")
    assert job.error_message == "not an image: ??"  # what no database can hold


async def test_cancelling_a_queued_job_is_immediate(store, submit, claim, clock):
    job = await store.request_cancel((await submit()).id)
    assert (job.status, job.completed_at) == ("cancelled", clock.now)
    assert await claim() is None


async def test_the_owner_of_a_running_job_learns_of_a_cancel_at_its_next_write(
    store, submit, claim
):
    await submit()
    job = await claim()
    asked = await store.request_cancel(job.id)
    assert (asked.status, asked.cancel_requested) == ("in_progress", True)
    assert (await renew(store, job)).cancel_requested
    progress = await store.record_progress(job.id, 1, stage="high_noise", step=1, progress=9)
    assert progress.held and progress.cancel_requested
    assert await store.cancelled(job.id, 1)
    assert (await store.get(job.id)).status == "cancelled"


@pytest.mark.parametrize("ending", ["complete", "fail", "retry", "release", "lost"])
async def test_a_cancel_accepted_before_the_end_wins(store, submit, claim, clock, ending):
    await submit()
    job = await claim()
    await store.request_cancel(job.id)
    end = {
        "complete": lambda: store.complete(job.id, 1, artifacts={}),
        "fail": lambda: store.fail(job.id, 1, code="c", message="m"),
        "retry": lambda: store.retry(job.id, 1, reason="r", max_attempts=1),
        "release": lambda: store.release(job.id, 1),
        "lost": lambda: _lose(clock, claim),
    }[ending]
    assert await end()
    job = await store.get(job.id)
    assert (job.status, job.error_code, job.lease_until) == ("cancelled", None, None)
    assert await store.expired() == [job], "nobody can see it any more"


async def _lose(clock, claim):
    clock.advance(LEASE_S)
    return await claim() is None


async def test_cancelling_a_job_whose_owner_is_gone_is_immediate(store, submit, claim, clock):
    await submit()
    job = await claim()
    clock.advance(LEASE_S)
    assert (await store.request_cancel(job.id)).status == "cancelled"
    assert not await renew(store, job)


async def test_cancelling_a_finished_job_changes_nothing(store, submit, claim):
    await submit()
    job = await claim()
    await store.complete(job.id, 1, artifacts={})
    finished = await store.get(job.id)
    assert await store.request_cancel(job.id) == finished


async def test_only_a_finished_job_can_be_deleted(store, submit, claim):
    await submit()
    job = await claim()
    assert await store.delete(job.id) is None
    await store.complete(job.id, 1, artifacts={})
    assert (await store.delete(job.id)).id == job.id
    assert await store.get(job.id) is None


async def test_finished_jobs_expire_and_others_stay(store, submit, claim, clock):
    done = await submit()
    await claim()
    await store.complete(done.id, 1, artifacts={})
    clock.advance(RETENTION_S - 1)
    waiting = await submit()
    assert await store.expired() == []
    clock.advance(1)
    for _ in range(2):  # until it is deleted, as its artifacts were
        assert [job.id for job in await store.expired()] == [done.id]
    await store.delete(done.id)
    assert [job.id for job in await store.list()] == [waiting.id]


# --- many processes --------------------------------------------------------------------------


async def _claim_until_empty(url: str, now: float, num_claimers: int) -> list[tuple[str, int]]:
    store = await JobStore.open(url, clock=lambda: now)

    async def claimer() -> list[tuple[str, int]]:
        claimed = []
        while job := await store.claim("w", lease_s=LEASE_S, max_attempts=MAX_ATTEMPTS):
            claimed.append((job.id, job.attempt))
        return claimed

    results = await asyncio.gather(*(claimer() for _ in range(num_claimers)))
    await store.close()
    return sum(results, [])


def _claiming_process(url: str, now: float) -> list[tuple[str, int]]:
    return asyncio.run(_claim_until_empty(url, now, num_claimers=6))


async def _submit_some(url: str, num_jobs: int, bound: int) -> int:
    store = await JobStore.open(url)
    num_accepted = 0
    for _ in range(num_jobs):
        new = NewJob(model="m", prompt="p", params={}, num_steps=1, predicted_s=1.0)
        try:
            await store.submit(new, max_queued_jobs=bound)
            num_accepted += 1
        except QueueFull:
            pass
    await store.close()
    return num_accepted


def _submitting_process(url: str) -> int:
    return asyncio.run(_submit_some(url, num_jobs=30, bound=60))


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_processes_share_one_database_without_racing(database_url, processes):
    """Four processes open an empty database, fill its queue, then claim every job twice."""
    accepted = list(processes.map(_submitting_process, [database_url] * 4))
    assert sum(accepted) == 60  # 120 tried: the bound holds across processes

    for attempt, now in [(1, 1e9), (2, 1e9 + LEASE_S)]:  # the second time every lease is over
        claims = processes.map(_claiming_process, [database_url] * 4, [now] * 4)
        claimed = sum(claims, [])
        assert len(claimed) == len(set(claimed)) == 60
        assert {number for _, number in claimed} == {attempt}


async def test_opening_a_sqlite_file_waits_for_the_process_that_is_setting_it_up(tmp_path):
    """SQLite fails now and then when two connections turn WAL on in the same moment."""
    with open(tmp_path / "jobs.sqlite.lock", "w") as other_process:
        fcntl.flock(other_process, fcntl.LOCK_EX)
        opening = asyncio.create_task(JobStore.open(f"sqlite:///{tmp_path / 'jobs.sqlite'}"))
        done, _ = await asyncio.wait([opening], timeout=0.2)
        assert not done
    await (await opening).close()


# --- the database itself ---------------------------------------------------------------------


async def test_the_migrations_make_exactly_the_table_that_the_store_uses(store):
    def differences(connection: sa.Connection) -> list:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    async with store._database.transaction() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_reopened_store_has_its_jobs(store, submit, database_url):
    job = await submit()
    await store.close()
    reopened = await JobStore.open(database_url)
    assert await reopened.get(job.id) == job
    await reopened.close()


async def test_callers_cancelled_in_the_middle_of_a_call_leave_the_store_usable(
    store, submit, claim
):
    for delay_s in (0, 0.0005, 0.001, 0.002, 0.004):
        tasks = [asyncio.create_task(submit()) for _ in range(5)]
        await asyncio.sleep(delay_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(submit(), timeout=5)
    assert await asyncio.wait_for(claim(), timeout=5)


async def test_a_cancelled_claim_takes_no_job(store, submit, claim):
    await submit()
    claiming = asyncio.create_task(claim())
    await asyncio.sleep(0.001)
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    assert (await claim()).failures == 0


async def test_a_database_that_is_down_is_a_retryable_error_and_heals(
    postgres_server, clock, make_new_job
):
    store = await JobStore.open(postgres_server.create_database(), clock=clock)
    job = await store.submit(make_new_job())
    postgres_server.stop()
    try:
        with pytest.raises(StoreUnavailable) as down:
            await store.get(job.id)
        assert down.value.retryable
    finally:
        postgres_server.start()
    assert await store.get(job.id) == job
    await store.close()


async def test_a_database_that_is_not_up_yet_is_waited_for(postgres_server, caplog):
    url = postgres_server.create_database()
    postgres_server.stop()
    try:
        opening = asyncio.create_task(JobStore.open(url))
        await asyncio.sleep(0.5)
        assert not opening.done()
        assert "cannot be reached" in caplog.text and "waiting for it" in caplog.text
        with pytest.raises(StoreUnavailable):
            await JobStore.open(url, patience_s=0)
    finally:
        postgres_server.start()
    store = await asyncio.wait_for(opening, 20)
    assert await store.list() == []
    await store.close()


@pytest.mark.parametrize("url", ["mysql://h/d", "sqlite://", "sqlite:///:memory:"])
async def test_a_database_that_cannot_hold_jobs_is_refused(url):
    with pytest.raises(ValueError, match="sqlite:///"):
        await JobStore.open(url)


def test_sqlite_is_refused_on_more_than_one_node():
    with pytest.raises(ValueError, match="SQLite file.*this cluster has 2 nodes"):
        check_database("sqlite:///jobs.sqlite", 2)
    check_database("sqlite:///jobs.sqlite", 1)
    check_database("postgresql://host/jobs", 8)


async def test_the_sslmode_of_libpq_is_kept(postgres_server):
    url = postgres_server.create_database()
    await (await JobStore.open(f"{url}?sslmode=prefer", patience_s=0)).close()
    with pytest.raises(StoreUnavailable, match="rejected SSL"):  # the server has none
        await JobStore.open(f"{url}?sslmode=require", patience_s=0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "sslmode=yes",
            "sslmode is one of disable, allow, prefer, require, verify-",
        ),
        (
            "connect_timeout=3",
            "option connect_timeout, which asyncpg does not take: remove it$",
        ),
        (
            "sslmode=verify-full&sslrootcert=/ca.pem",
            "sslrootcert.*, and set PGSSLROOTCERT",
        ),
    ],
)
def test_an_option_that_the_driver_does_not_take_is_refused_in_one_line(query, message):
    with pytest.raises(ValueError, match=message):
        check_database(f"postgresql://user:secret@host/jobs?{query}", 1)


@pytest.mark.parametrize("url", ["secret", "postgresql://user:secret@host:port/jobs"])
def test_what_is_no_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="this is no URL") as refused:
        check_database(url, 1)
    assert "secret" not in str(refused.value)


async def test_failures_count_again_from_zero_once_a_job_has_advanced(store, make_new_job):
    await store.submit(make_new_job())
    for step in (1, 2, 3):
        job = await store.claim("w", lease_s=10, max_attempts=2)
        await store.record_checkpoint(job.id, job.attempt, key=f"{job.id}/c", step=step)
        await store.retry(job.id, job.attempt, reason="died", max_attempts=2)
        assert (await store.get(job.id)).status == "queued"
    job = await store.claim("w", lease_s=10, max_attempts=2)
    await store.retry(job.id, job.attempt, reason="died", max_attempts=2)
    assert (await store.get(job.id)).error_code == "too_many_attempts"
