"""`wan doctor`: what is wrong, and what to do about it, one line per check.

Owns the checks of a running service (over HTTP) and of this machine. Nothing heavy is imported
here: torch and av are asked in a process of their own, which may also crash without harm.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.client.service import ClientError, KeyRefused, Service, Unreachable

PROBE_TIMEOUT_S = 120.0
MIN_FREE_BYTES, LITTLE_FREE_BYTES = 2**30, 20 * 2**30
FLASH_ATTENTION = ("flash-attn-4", "flash-attn", "flash_attn_3")

_TORCH_PROBE = """
import json, torch
from wan_model.hopper import has_bindings, is_hopper
cuda = torch.cuda.is_available()
num_gpus = torch.cuda.device_count() if cuda else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(num_gpus)]
print(json.dumps({"version": torch.__version__, "built_for": torch.version.cuda,
                  "gpus": [f"{g.name}, {g.total_memory / 2**30:.0f} GiB" for g in gpus],
                  "hopper": any(map(is_hopper, range(num_gpus))), "compiles": has_bindings()}))
"""
_AV_PROBE = """
import json, av
av.CodecContext.create("libx264", "w")
print(json.dumps({"version": av.__version__, "ffmpeg": av.ffmpeg_version_info}))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """`advice` says what to do; it is there unless `status` is ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(service: Service, *, has_api_key: bool, data_dir: Path) -> Iterator[Check]:
    """Each check when it is done, those of the service first."""
    yield from _service(service, has_api_key)
    yield _python()
    yield from _torch()
    yield _ray()
    yield _disk(data_dir)
    yield _codec()


def _service(service: Service, has_api_key: bool) -> Iterator[Check]:
    try:
        service.health()
    except ClientError as error:
        advice = error.advice or "look into its log, and check the URL"
        yield Check(name="service", status="fail", found=error.found, advice=advice)
        return
    yield Check(name="service", status="ok", found=f"{service.url} answers")
    try:
        service.ready()
        yield Check(name="stages", status="ok", found="every stage has run")
    except Unreachable as error:
        advice = "wait while they load their weights; the service's log says why one cannot"
        yield Check(name="stages", status="warn", found=str(error), advice=advice)
    yield _api_key(service, has_api_key)


def _api_key(service: Service, has_api_key: bool) -> Check:
    try:
        names = ", ".join(model["id"] for model in service.models()["data"])
    except KeyRefused as error:
        advice = "set WAN_API_KEY to one of the service's WAN_API_KEYS"
        found = "the key was refused" if has_api_key else "a key is needed"
        return Check(name="API key", status="fail", found=f"{found} ({error.found})", advice=advice)
    except ClientError as error:
        advice = "look into the service's log"
        return Check(name="API key", status="fail", found=str(error), advice=advice)
    found = "accepted" if has_api_key else "none needed"
    return Check(name="API key", status="ok", found=f"{found}; it serves {names}")


def _python() -> Check:
    return Check(name="python", status="ok", found=f"{platform.python_version()}, {sys.executable}")


def _torch() -> Iterator[Check]:
    """torch, its GPUs, and the attention kernels for them."""
    if _version("torch") is None:
        yield _missing("torch")
        return
    told, trouble = _ask(_TORCH_PROBE)
    if told is None:
        advice = "install it again, built for this machine's driver"
        yield Check(name="torch", status="fail", found=trouble, advice=advice)
        return
    yield Check(name="torch", status="ok", found=told["version"])
    driver = _nvidia_driver()
    if told["gpus"]:
        found = f"{'; '.join(told['gpus'])} (driver {driver}, CUDA {told['built_for']})"
        yield Check(name="GPU", status="ok", found=found)
    elif driver is None:
        yield Check(name="GPU", status="ok", found="none: stages run on the CPU, as wan-tiny does")
    else:
        advice = "install a CUDA build of torch that this driver can run"
        found = f"there is one (driver {driver}), but torch {told['version']} cannot use it"
        yield Check(name="GPU", status="fail", found=found, advice=advice)
    yield _kernels(told)


def _kernels(told: dict[str, Any]) -> Check:
    """What the fast kernels need: our own, on Hopper, a compiler; others FlashAttention."""
    if not told["gpus"]:
        return Check(name="kernels", status="ok", found="none needed without a GPU")
    if told["hopper"]:
        if told["compiles"]:
            return Check(name="kernels", status="ok", found="our own, compiled by cuda-bindings")
        found = f"cuda-bindings for CUDA {told['built_for']} is not installed"
        advice = "pip install '.[gpu]'; until then attention and decoding are slower"
        return Check(name="kernels", status="warn", found=found, advice=advice)
    for name in FLASH_ATTENTION:
        if (version := _version(name)) is not None:
            return Check(name="kernels", status="ok", found=f"{name} {version}")
    advice = "pip install '.[gpu]'; until then attention runs on torch's own kernels"
    return Check(name="kernels", status="warn", found="flash-attn is not installed", advice=advice)


def _nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _ray() -> Check:
    version = _version("ray")
    if version is None:
        return _missing("ray")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (2, 60):
        advice = "2.60 or newer is needed: pip install -c constraints.txt ."
        return Check(name="ray", status="fail", found=version, advice=advice)
    return Check(name="ray", status="ok", found=version)


def _disk(folder: Path) -> Check:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        free_bytes = shutil.disk_usage(there).free
    except OSError as error:
        advice = "set WAN_DATA_DIR to a folder on a working disk"
        return Check(name="disk", status="fail", found=f"{there}: {error}", advice=advice)
    found = f"{free_bytes / 2**30:.1f} GiB free for {folder}, this shell's WAN_DATA_DIR"
    advice = "delete old videos, or set WAN_DATA_DIR to a folder on a larger disk"
    if free_bytes < MIN_FREE_BYTES:
        return Check(name="disk", status="fail", found=found, advice=advice)
    if free_bytes < LITTLE_FREE_BYTES:
        return Check(name="disk", status="warn", found=found, advice=advice)
    return Check(name="disk", status="ok", found=found)


def _codec() -> Check:
    if _version("av") is None:
        return _missing("av")
    told, trouble = _ask(_AV_PROBE)
    if told is None:
        advice = "pip install --force-reinstall av: its wheels hold ffmpeg with libx264"
        return Check(name="codec", status="fail", found=trouble, advice=advice)
    found = f"libx264 of ffmpeg {told['ffmpeg']} through av {told['version']}"
    return Check(name="codec", status="ok", found=found)


def _missing(package: str) -> Check:
    advice = "pip install -c constraints.txt . (only where the service runs)"
    return Check(name=package, status="warn", found="not installed", advice=advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask(probe: str) -> tuple[dict | None, str]:
    """What `probe` prints as JSON in a fresh Python; or None and its last line of trouble."""
    command = [sys.executable, "-c", probe]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_TIMEOUT_S:.0f} s"
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"it ended with {answer.returncode}"]
        return None, lines[-1]
    return json.loads(answer.stdout.splitlines()[-1]), ""
