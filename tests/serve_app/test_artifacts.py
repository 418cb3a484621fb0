"""The artifact store, in a local directory and in an S3 bucket on loopback (moto)."""

from __future__ import annotations

import asyncio
import os
import uuid

import boto3
import numpy as np
import pytest
from http_service import is_there
from moto.server import ThreadedMotoServer

from serve_app import artifacts as artifacts_module
from serve_app.artifacts import (
    ArtifactCorrupt,
    ArtifactMissing,
    Artifacts,
    ArtifactUnavailable,
)

pytestmark = pytest.mark.anyio

KEY = "video_1/checkpoint-1-8.safetensors"


@pytest.fixture(scope="session")
def s3_options():
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "key": "test",
        "secret": "test",
        "endpoint_url": f"http://{host}:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Artifacts(str(tmp_path / "artifacts"))
    options = request.getfixturevalue("s3_options")
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=bucket)
    return Artifacts(f"s3://{bucket}/wan", storage_options=options)


@pytest.fixture
def local(tmp_path):
    return Artifacts(str(tmp_path / "artifacts"))


async def test_what_was_put_comes_back_whole_and_in_ranges(store):
    data = bytes(range(256)) * 40
    await store.put("video_1/video.mp4", data)
    assert await store.get("video_1/video.mp4") == data
    assert await store.size("video_1/video.mp4") == len(data)
    assert await store.read_range("video_1/video.mp4", 100, 300) == data[100:300]
    assert await store.read_range("video_1/video.mp4", 10_000, 99_999) == data[10_000:]


async def test_a_second_put_replaces_the_value(store):
    await store.put("video_1/input.png", b"old and longer")
    await store.put("video_1/input.png", b"new")
    assert await store.get("video_1/input.png") == b"new"


async def test_a_copy_outlives_its_source(store):
    await store.put("video_1/input", b"image")
    await store.copy("video_1/input", "video_2/input")
    await store.put("video_1/input", b"another")
    assert await store.get("video_2/input") == b"image"
    await store.delete_prefix("video_1")
    assert await store.get("video_2/input") == b"image"
    with pytest.raises(ArtifactMissing, match="^no artifact 'video_1/input'$"):
        await store.copy("video_1/input", "video_3/input")
    with pytest.raises(ValueError, match="artifact key"):
        await store.copy("video_2/input", "../elsewhere")


async def test_a_missing_key_is_an_error_that_names_the_key(store):
    assert not await is_there(store, "video_1/video.mp4")
    for read in (store.get, store.size, store.get_arrays):
        with pytest.raises(ArtifactMissing, match="^no artifact 'video_1/video.mp4'$"):
            await read("video_1/video.mp4")


async def test_deleting_a_prefix_takes_its_keys_and_no_other(store):
    for key in ("video_1/video.mp4", "video_1/thumbnail.webp", "video_12/video.mp4"):
        await store.put(key, b"x")
    await store.delete_prefix("video_1")
    await store.delete_prefix("video_1")  # twice is no error
    assert not await is_there(store, "video_1/video.mp4")
    assert not await is_there(store, "video_1/thumbnail.webp")
    assert await is_there(store, "video_12/video.mp4")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".hidden", "a/..", "a\\b", "a\0", "a/"]
)
async def test_a_key_that_could_leave_the_store_is_refused(local, key):
    for call in (local.get(key), local.put(key, b""), local.delete_prefix(key)):
        with pytest.raises(ValueError, match="artifact key"):
            await call


async def test_a_range_that_is_empty_or_backwards_is_refused(local):
    await local.put(KEY, b"data")
    for start, end in [(2, 2), (3, 1), (-1, 2)]:
        with pytest.raises(ValueError, match="start < end"):
            await local.read_range(KEY, start, end)


async def test_arrays_come_back_bit_for_bit(store):
    rng = np.random.default_rng(0)
    arrays = {
        "latents": rng.standard_normal((16, 3, 8, 8), dtype=np.float32),
        "frames": rng.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8),
        "step_index": np.array(7),  # 0-d
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # strided memory
        "nothing": np.zeros((0, 3), dtype=np.float32),
        "odd": np.array([np.nan, -0.0, np.inf], dtype=np.float32),
    }
    await store.put_arrays(KEY, arrays)
    loaded = await store.get_arrays(KEY)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
        assert loaded[name].tobytes() == array.tobytes()


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _huge_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


@pytest.mark.parametrize(
    "damage",
    [_cut, _flip_last_bit, _huge_header, lambda data: b"", lambda data: b"not arrays at all"],
    ids=["cut", "flipped bit", "header", "empty", "foreign"],
)
async def test_damaged_arrays_are_an_error_that_names_the_key_and_no_path(local, damage, tmp_path):
    await local.put_arrays(KEY, {"latents": np.ones((4, 4), np.float32)})
    await local.put(KEY, damage(await local.get(KEY)))
    with pytest.raises(ArtifactCorrupt, match=f"artifact '{KEY}' is damaged") as error:
        await local.get_arrays(KEY)
    assert str(tmp_path) not in str(error.value)
    assert not error.value.retryable


async def test_a_put_that_dies_midway_leaves_the_old_value_and_no_litter(
    local, tmp_path, monkeypatch
):
    await local.put(KEY, b"old")

    def full(_handle):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(artifacts_module.os, "fsync", full)
    with pytest.raises(ArtifactUnavailable, match="No space left on device") as error:
        await local.put(KEY, b"new")
    assert error.value.retryable
    assert str(tmp_path) not in str(error.value)
    assert await local.get(KEY) == b"old"
    assert os.listdir(tmp_path / "artifacts" / "video_1") == [KEY.split("/")[1]]


async def test_readers_beside_a_writer_never_see_a_part_of_a_value(local):
    values = [bytes([n]) * 300_000 for n in range(20)]
    await local.put(KEY, values[0])

    async def write():
        for value in values:
            await local.put(KEY, value)

    writing = asyncio.create_task(write())
    while not writing.done():
        assert await local.get(KEY) in values
    await writing


async def test_an_s3_that_refuses_or_is_gone_is_a_retryable_error(s3_options):
    no_bucket = Artifacts("s3://no-such-bucket/wan", storage_options=s3_options)
    with pytest.raises(ArtifactUnavailable, match="the bucket does not exist"):
        await no_bucket.put(KEY, b"x")
    nowhere = {**s3_options, "endpoint_url": "http://127.0.0.1:9"}
    config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    gone = Artifacts("s3://bucket/wan", storage_options={**nowhere, "config_kwargs": config})
    gone._fs.retries = 1
    with pytest.raises(ArtifactUnavailable) as error:
        await gone.get(KEY)
    assert error.value.retryable
    assert "127.0.0.1" not in str(error.value)


async def test_a_folder_that_is_gone_or_another_one_is_an_outage_not_a_loss(tmp_path):
    store, folder = Artifacts(str(tmp_path / "art")), tmp_path / "art"
    await store.put("job/input.png", b"picture")
    folder.rename(tmp_path / "elsewhere")
    for _ in ("no folder", "an empty one, as a mount point is"):
        calls = (store.get("job/input.png"), store.put("job/x", b""), store.delete_prefix("job"))
        for call in calls:
            with pytest.raises(ArtifactUnavailable, match="folder of the artifacts is not there"):
                await call
        folder.mkdir(exist_ok=True)
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    assert await store.get("job/input.png") == b"picture"
