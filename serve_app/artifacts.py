"""The artifact store: checkpoints, inputs and videos under keys like `JOB_ID/video.mp4`.

The only fsspec file: a local directory, or `s3://bucket/prefix` (anything else fsspec knows works
unpromised). Owns keys, atomic writes and the checksum of stored arrays; knows nothing about jobs,
HTTP or the meaning of a checkpoint. A path of the server appears in no message.

    ArtifactError
     ├── ArtifactMissing       no such key
     ├── ArtifactCorrupt       the bytes are not those that were stored
     └── ArtifactUnavailable   the storage refuses or does not answer (retryable)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import safetensors.numpy
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

Arrays = dict[str, np.ndarray]
T = TypeVar("T")

_KEY_PART = re.compile(r"\w[\w.-]*", re.ASCII)  # no "..", no hidden name, no empty part
_CHECKSUM = "crc32"
_MARK = ".wan-artifacts"
"""A file in a local store's folder, no key: where it is not, the folder is gone or another one."""


class ArtifactError(Exception):
    """Root of the store's errors. `retryable`: the same call may succeed later."""

    retryable = False


class ArtifactMissing(ArtifactError):
    """No such key."""


class ArtifactCorrupt(ArtifactError):
    """The stored bytes are cut short or changed."""


class ArtifactUnavailable(ArtifactError):
    """The storage refuses or does not answer: full, unreachable, forbidden."""

    retryable = True


class Artifacts:
    """Values under keys. Every call runs in a thread, and none but `put` changes a stored value.

    `url`: a directory (created when missing), or a URL of fsspec. `storage_options`: what the file
    system of that URL takes, such as s3's `key`, `secret` and `endpoint_url`.

    Every method raises ValueError for a key that could leave the store, and ArtifactMissing or
    ArtifactUnavailable where the storage fails.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        self._is_local = isinstance(self._fs, LocalFileSystem)
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            Path(self._root, _MARK).touch()

    async def put(self, key: str, data: bytes) -> None:
        """Store `data`; a reader, and a crash at any moment, sees the old value or the new one."""
        write = _write_atomically if self._is_local else self._fs.pipe_file
        try:
            await self._call(key, write, data)
        except ArtifactMissing as error:  # a value needs nothing before it but the bucket
            raise ArtifactUnavailable(f"artifact {key!r}: the bucket does not exist") from error

    async def get(self, key: str) -> bytes:
        return await self._call(key, self._fs.cat_file)

    async def read_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of the value, fewer when it ends before `end`.

        `start` must lie inside the value (see `size`): s3 refuses it where a file gives nothing.
        """
        if not 0 <= start < end:
            raise ValueError(f"0 <= start < end does not hold for the range [{start}, {end})")
        return await self._call(key, self._fs.cat_file, start=start, end=end)

    async def size(self, key: str) -> int:
        """Bytes of the value."""
        return await self._call(key, self._fs.size)

    async def copy(self, source: str, target: str) -> None:
        """Store the value of `source` under `target` too; deleting one leaves the other.

        Raises:
            ArtifactMissing: nothing under `source`.
        """
        copy = _link if self._is_local else self._fs.cp_file
        await self._call(source, copy, f"{self._root}/{_checked(target)}")

    async def delete(self, key: str) -> None:
        """Delete one key; no such key is no error."""

        def delete(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)

        await self._call(key, delete)

    async def delete_prefix(self, prefix: str) -> None:
        """Delete every key that begins with `prefix/`; nothing there is no error."""

        def delete(path: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)

        await self._call(prefix, delete)

    async def put_arrays(self, key: str, arrays: Arrays) -> None:
        """Store named arrays (any shape, 0-d too) as safetensors, with a checksum."""
        await self.put(key, await asyncio.to_thread(_to_bytes, arrays))

    async def get_arrays(self, key: str) -> Arrays:
        """The arrays that `put_arrays` stored, bit for bit.

        Raises:
            ArtifactMissing: nothing under `key`.
            ArtifactCorrupt: cut short, changed, or never arrays.
        """
        data = await self.get(key)
        try:
            return await asyncio.to_thread(_from_bytes, data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtifactCorrupt(f"artifact {key!r} is damaged: {error}") from error

    async def _call(self, key: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        path = f"{self._root}/{_checked(key)}"

        def call() -> T:
            # A folder that is not mounted would seem to have lost all, and take new values.
            if self._is_local and not os.path.exists(f"{self._root}/{_MARK}"):
                raise OSError(errno.ENODEV, "the folder of the artifacts is not there")
            return function(path, *args, **options)

        with _named_errors(key):
            return await asyncio.to_thread(call)


def _checked(key: str) -> str:
    if not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(
            f"artifact key {key!r}: letters, digits, '_', '-', '.' in parts joined by '/'"
        )
    return key


@contextlib.contextmanager
def _named_errors(key: str) -> Iterator[None]:
    """Storage errors name paths and hosts; these name the key (the cause stays for the log)."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactMissing(f"no artifact {key!r}") from error
    except Exception as error:  # not only OSError: s3fs lets some of botocore's own through
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArtifactUnavailable(f"artifact {key!r} cannot be reached: {reason}") from error


def _write_atomically(path: str, data: bytes) -> None:
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    # In the same directory, so that the rename stays within one file system.
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".put-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _link(path: str, target: str) -> None:
    """A second name for the same bytes, which no `put` changes: it replaces names, not bytes."""
    directory = os.path.dirname(target)
    os.makedirs(directory, exist_ok=True)
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links, or the target is there already
        _write_atomically(target, Path(path).read_bytes())
    else:
        _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    """The rename itself must survive a power cut too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _to_bytes(arrays: Arrays) -> bytes:
    # safetensors writes the memory of a strided array as it lies, which is another array.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(ordered, metadata={_CHECKSUM: _checksum(ordered)})


def _from_bytes(data: bytes) -> Arrays:
    arrays = safetensors.numpy.load(data)
    # Layout: 8 bytes of header length, little endian, then the header as JSON.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header["__metadata__"][_CHECKSUM] != _checksum(arrays):
        raise ValueError("its checksum does not match")
    return arrays


def _checksum(arrays: Arrays) -> str:
    """CRC-32 over every array's name, dtype, shape and bytes: safetensors itself has none."""
    crc = 0
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"
