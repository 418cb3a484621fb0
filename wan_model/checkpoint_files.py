"""Files of tensors -> the parameters of a model, one tensor at a time.

Owns how .safetensors and .pth files are opened, the check that files and model hold the same names
and shapes, and the one copy from file to device. Knows nothing about layouts or what a model is.

Host memory: files are mapped, never read whole, and a shard is closed before the next is opened, so
the peak stays below one shard above the size of the finished model.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan_model.checkpoint_keys import CheckpointError, Slot

NUM_READERS = 8
"""Threads that copy to a GPU: enough to keep a fast disk and the bus busy."""

STAGE_BYTES = 2**25
"""Of pinned memory for each of them, which PyTorch keeps for the life of the process."""

NUM_NAMED = 5
"""At most so many keys are listed in an error."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """An opened file: its keys and shapes, and its tensors on request (mapped, on the CPU)."""

    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Raises CheckpointError for a file that is missing, truncated or of another kind."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.suffix == ".pth":
        tensors = _map_pth(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        yield TensorFile(shapes=shapes, tensor=tensors.__getitem__)
        return
    try:
        opened = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from error
    with opened as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        yield TensorFile(shapes=shapes, tensor=file.get_tensor, metadata=file.metadata() or {})


def _map_pth(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is truncated or no PyTorch file ({reason})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} is not a flat dictionary of tensors")
    return tensors


def find_shards(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a component, by their index or by their names."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing")
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names:
            raise CheckpointError(f"{index} has no weight_map")
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}, a shard listed in {index}, is missing")
        return [folder / name for name in names]
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not shards:
        raise CheckpointError(f"{single} is missing")
    num_shards = shards[0].stem.rpartition("-of-")[2]
    for number in range(1, int(num_shards) + 1):
        shard = folder / f"{stem}-{number:0{len(num_shards)}d}-of-{num_shards}.safetensors"
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing")
    return shards


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def load_parameters(
    model: nn.Module,
    slots: Mapping[str, Slot],
    files: Sequence[Path],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    keeps_float32: Callable[[str], bool] = lambda name: False,
    delta: Callable[[Slot, torch.device], Tensor | None] = lambda slot, device: None,
    num_readers: int | None = None,
) -> None:
    """Give `model`, built on the meta device, real parameters filled from `files`.

    `delta` is added in float32 to what a slot holds in the file (None: nothing to add). To a GPU
    `num_readers` tensors are under way at a time. Raises CheckpointError, before anything is
    allocated, unless the files hold exactly `slots`.
    """
    device = torch.device(device)
    check_files(model, slots, files)
    allocate(model, device=device, dtype=dtype, keeps_float32=keeps_float32)
    parameters = dict(model.named_parameters())
    stage = threading.local()

    def fill(file: TensorFile, key: str) -> None:
        slot = slots[key]
        target = slot.part(parameters[slot.name])
        with torch.no_grad(), torch.cuda.device_of(target):
            copy_to_device(target, file.tensor(key), delta(slot, device), stage)

    default = NUM_READERS if device.type == "cuda" else 1
    with ThreadPoolExecutor(num_readers or default) as readers:
        for path in files:
            _read_ahead(path)
            with open_tensors(path) as file:
                _finish([readers.submit(fill, file, key) for key in file.shapes])


def _finish(tasks: list[Future[None]]) -> None:
    """Waits until none of them runs, also after one failed: the file they read is closed next."""
    wait(tasks, return_when=FIRST_EXCEPTION)
    running = [task for task in tasks if not task.cancel()]
    wait(running)
    for task in running:
        task.result()


def copy_to_device(
    target: Tensor, source: Tensor, delta: Tensor | None, stage: threading.local
) -> None:
    """The one copy: `source` (mapped, any dtype) and its `delta` into `target` on its device.

    To a GPU a piece at a time by way of memory it can read by itself (`stage.buffer`, one a thread,
    kept): several times quicker than from mapped pages, whose faults the threads take side by side.
    """
    if delta is not None:
        target.copy_(source.to(target.device, torch.float32) + delta)
        return
    if not target.is_cuda or not source.numel():
        target.copy_(source)
        return
    if getattr(stage, "buffer", None) is None:
        stage.buffer = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        stage.stream = torch.cuda.Stream(target.device)
    stage.stream.wait_stream(torch.cuda.current_stream())  # the memory's last user is done
    for part, staged in staged_parts(target, source, stage.buffer):
        with torch.cuda.stream(stage.stream):
            part.copy_(staged, non_blocking=True)
        stage.stream.synchronize()


def staged_parts(target: Tensor, source: Tensor, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies `source` into `buffer` piece by piece: yields the part of `target` and its piece."""
    length = buffer.numel() // source.element_size()
    parts = target.view(-1).split(length)
    for part, piece in zip(parts, source.reshape(-1).split(length), strict=True):
        staged = buffer[: piece.numel() * piece.element_size()].view(piece.dtype)
        yield part, staged.copy_(piece)


def _read_ahead(path: Path) -> None:
    """Asks the system to fetch the whole file: mapped pages alone are read in small pieces."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def check_files(model: nn.Module, slots: Mapping[str, Slot], files: Sequence[Path]) -> None:
    """Every slot is in some file, every key in the files is a slot, and the shapes agree."""
    parameters = dict(model.named_parameters())
    missing = {slot: key for key, slot in reversed(slots.items())}
    unexpected = []
    for path in files:
        with open_tensors(path) as file:
            for key, shape in file.shapes.items():
                slot = slots.get(key)
                if slot is None:
                    unexpected.append(key)
                    continue
                missing.pop(slot, None)
                expected = slot.shape(parameters[slot.name])
                if shape != expected:
                    raise CheckpointError(
                        f"{path}: {key} has shape {list(shape)}, the model needs {list(expected)}"
                    )
    if missing or unexpected:
        place = files[0] if len(files) == 1 else files[0].parent
        problems = [
            f"{len(keys)} {word} key(s): {', '.join(sorted(keys)[:NUM_NAMED])}"
            + (", ..." if len(keys) > NUM_NAMED else "")
            for word, keys in (("missing", list(missing.values())), ("unexpected", unexpected))
            if keys
        ]
        raise CheckpointError(f"{place} does not fit this model: {'; '.join(problems)}")


def allocate(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    keeps_float32: Callable[[str], bool],
) -> None:
    """Replace meta parameters by uninitialised ones; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                kept = keeps_float32(f"{prefix}.{name}" if prefix else name)
                data = torch.empty_like(old, device=device, dtype=torch.float32 if kept else dtype)
                made[id(old)] = nn.Parameter(data, requires_grad=False)
            setattr(module, name, made[id(old)])
