"""Webhooks: announced with a job's end in both databases, signed, sent until they are taken."""

from __future__ import annotations

import asyncio
import logging
import time

import openai
import pytest
import standardwebhooks
from webhook_receiver import SECRET, receiving

from serve_app.config import WebhooksConfig
from serve_app.jobs import JobStore
from serve_app.resolve_webhooks import webhook_settings
from serve_app.webhooks import WebhookSender, retry_delay_s

pytestmark = pytest.mark.anyio

CLAIM = {"lease_s": 30.0, "max_attempts": 2}


@pytest.fixture
async def store(database_url, clock):
    store = await JobStore.open(database_url, announces_ends=True, clock=clock)
    yield store
    await store.close()


@pytest.fixture
def run(store, make_new_job):
    """Submit and claim: a running job."""

    async def running_job():
        await store.submit(make_new_job())
        return await store.claim("w", **CLAIM)

    return running_job


@pytest.fixture
def receiver():
    with receiving() as receiver:
        yield receiver


def settings(url: str, *, secrets: str = SECRET, **options):
    options = WebhooksConfig(url=url, **({"first_retry_s": 8.0, "timeout_s": 5.0} | options))
    return webhook_settings(options, default_url="", secrets=secrets)


async def send_due(store, settings) -> None:
    """One round of a sender."""
    sender = WebhookSender(settings, store.deliveries)
    await sender.deliver_due()
    await sender.close()


async def waiting(store):
    return await store.deliveries.claim(limit=100, lease_s=0)


# --- announcing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "event"),
    [
        ("complete", "video.completed"),
        ("fail", "video.failed"),
        ("retry", "video.failed"),
        ("lost", "video.failed"),
        ("cancel", None),
        ("release", None),
    ],
)
async def test_each_end_of_a_job_is_announced_once(store, run, clock, ending, event):
    job = await run()
    held = (job.id, job.attempt)
    if ending == "complete":
        assert await store.complete(*held, artifacts={})
        assert not await store.complete(*held, artifacts={})
    elif ending == "fail":
        assert await store.fail(*held, code="c", message="m")
    elif ending == "retry":
        assert await store.retry(*held, reason="r", max_attempts=1)
    elif ending == "lost":
        clock.advance(30)
        await store.claim("w", **CLAIM)  # its second attempt
        clock.advance(30)
        assert await store.claim("w", **CLAIM) is None
    elif ending == "cancel":
        await store.request_cancel(job.id)
        assert await store.complete(*held, artifacts={})  # ends cancelled
    else:
        assert await store.release(*held)
    deliveries = await waiting(store)
    if event is None:
        assert deliveries == []
        return
    (delivery,) = deliveries
    assert (delivery.job_id, delivery.event) == (job.id, event)
    assert delivery.payload == {
        "id": delivery.id,
        "object": "event",
        "created_at": int(clock.now),
        "type": event,
        "data": {"id": job.id},
    }
    assert delivery.id.startswith("evt_")


async def test_nothing_is_announced_without_webhooks(database_url, make_new_job):
    store = await JobStore.open(database_url)
    await store.submit(make_new_job())
    job = await store.claim("w", **CLAIM)
    await store.complete(job.id, job.attempt, artifacts={})
    assert await waiting(store) == []
    await store.close()


async def test_a_picture_is_not_announced(store, make_new_job):
    await store.submit(make_new_job(announced=False))
    job = await store.claim("w", **CLAIM)
    assert await store.complete(job.id, job.attempt, artifacts={})
    assert await waiting(store) == []


async def test_an_end_that_cannot_be_announced_does_not_happen(store, run, monkeypatch):
    """One transaction: a job may not be finished with its event lost."""
    job = await run()

    async def broken(*args, **kwargs):
        raise RuntimeError("the process dies here")

    monkeypatch.setattr("serve_app.webhook_store.announce", broken)
    with pytest.raises(RuntimeError):
        await store.complete(job.id, job.attempt, artifacts={})
    assert (await store.get(job.id)).status == "in_progress"


# --- the leases of deliveries ----------------------------------------------------------------


async def test_a_delivery_is_leased_by_one_sender_at_a_time(store, run, clock):
    for _ in range(3):
        job = await run()
        await store.complete(job.id, job.attempt, artifacts={})
    claims = await asyncio.gather(*(store.deliveries.claim(limit=2, lease_s=10) for _ in range(4)))
    first = sum(claims, [])
    assert len(first) == len({delivery.id for delivery in first}) == 3
    clock.advance(10)  # these senders died
    second = await store.deliveries.claim(limit=9, lease_s=10)
    assert {delivery.id for delivery in second} == {delivery.id for delivery in first}
    assert {delivery.attempts for delivery in second} == {2}
    # One that was only slow changes nothing any more.
    assert not await store.deliveries.forget(first[0])
    assert not await store.deliveries.retry(first[0], delay_s=0)
    assert await store.deliveries.forget(second[0])


# --- sending ---------------------------------------------------------------------------------


async def test_a_receiver_that_fails_first_gets_the_same_event_again_after_a_restart(
    store, run, clock, receiver, database_url
):
    job = await run()
    await store.complete(job.id, job.attempt, artifacts={})
    receiver.answers = [500, 302]
    for num_requests in (1, 2, 3):
        restarted = await JobStore.open(database_url, announces_ends=True, clock=clock)
        await send_due(restarted, settings(receiver.url))
        await restarted.close()
        assert len(receiver.requests) == num_requests
        assert await waiting(store) == []  # not due yet, or done
        clock.advance(8.0 * num_requests)
    assert await waiting(store) == []
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len({body for _, body in receiver.requests}) == 1


async def test_the_signature_is_the_one_that_receivers_verify(store, run, receiver):
    job = await run()
    await store.fail(job.id, job.attempt, code="c", message="m")
    new_secret = "whsec_" + "A" * 43 + "="
    await send_due(store, settings(receiver.url, secrets=f"{new_secret},{SECRET}"))
    ((headers, body),) = receiver.requests
    assert headers["content-type"] == "application/json"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    for secret in (SECRET, new_secret):  # while one replaces the other, both are right
        event = standardwebhooks.Webhook(secret).verify(body, headers)
        assert (event["type"], event["data"]) == ("video.failed", {"id": job.id})
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(body.replace(b"failed", b"passed"), headers)
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert (event.id, event.type, event.data.id) == (headers["webhook-id"], "video.failed", job.id)


@pytest.mark.parametrize(("status", "words"), [(410, "gets it no more"), (503, "given up after 1")])
async def test_a_refused_delivery_ends_with_a_line_in_the_log(
    store, run, clock, receiver, caplog, status, words
):
    job = await run()
    await store.complete(job.id, job.attempt, artifacts={})
    receiver.answers = [status]
    with caplog.at_level(logging.WARNING, "serve_app.webhooks"):
        await send_due(store, settings(receiver.url, max_attempts=1))
    assert words in caplog.text and job.id in caplog.text
    clock.advance(1e6)
    assert await waiting(store) == []


async def test_a_silent_or_absent_receiver_costs_its_time_out_and_a_retry(
    store, run, clock, receiver
):
    job = await run()
    await store.complete(job.id, job.attempt, artifacts={})
    receiver.answers = [0]
    await send_due(store, settings(receiver.url, timeout_s=0.2))
    clock.advance(8)
    await send_due(store, settings("http://127.0.0.1:9", timeout_s=0.2))  # nobody listens there
    assert await waiting(store) == []
    clock.advance(16)
    assert [delivery.attempts for delivery in await waiting(store)] == [3]


async def test_the_waits_double_up_to_the_longest_and_never_agree():
    of = settings("http://h", first_retry_s=4.0, max_retry_s=60.0)
    for attempts, longest_s in [(1, 4), (2, 8), (5, 60), (2000, 60)]:
        waits_s = [retry_delay_s(of, attempts) for _ in range(50)]
        assert longest_s / 2 <= min(waits_s) < max(waits_s) <= longest_s


# --- configuration ---------------------------------------------------------------------------


async def test_a_url_may_come_from_the_environment_and_none_means_no_webhooks():
    assert webhook_settings(WebhooksConfig(), default_url="", secrets=SECRET) is None
    made = webhook_settings(WebhooksConfig(), default_url="https://h/hook", secrets=SECRET)
    assert (made.url, made.max_attempts) == ("https://h/hook", 16)
    assert made.secrets == (b"0123456789abcdef0123456789abcdef",)
    assert "0123456789" not in repr(made)


@pytest.mark.parametrize(
    ("options", "secrets", "words"),
    [
        ({"url": "ftp://h"}, SECRET, "not an http"),
        ({"url": "https://"}, SECRET, "not an http"),
        ({"url": "https://h:99999"}, SECRET, "not an http"),
        ({"url": "https://h"}, "", "WAN_WEBHOOK_SECRET is not set: make one"),
        ({"url": "https://h"}, "whsec_c2hvcnQ=", "24 bytes or more"),
        ({"url": "https://h"}, SECRET.removeprefix("whsec_"), "is not whsec_"),
        ({"max_attempts": 3}, SECRET, "no effect without webhooks.url"),
        ({"url": "https://h", "max_retry_s": 1}, SECRET, "max_retry_s 1 < first_retry_s 5"),
    ],
)
async def test_webhooks_that_cannot_work_are_refused_with_what_to_do(options, secrets, words):
    with pytest.raises(ValueError, match=words) as refused:
        webhook_settings(WebhooksConfig(**options), default_url="", secrets=secrets)
    assert SECRET not in str(refused.value)
