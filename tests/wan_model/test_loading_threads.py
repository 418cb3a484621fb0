"""Loading a checkpoint by several threads: the same tensors, and errors that are not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan_model.checkpoint_files import load_parameters
from wan_model.checkpoint_keys import Slot


class Layers(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers))


def written(folder: Path) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Forty tensors in three shards."""
    state = Layers(20).state_dict()
    names, files = list(state), []
    for i in range(3):
        files.append(folder / f"shard-{i}.safetensors")
        save_file({name: state[name] for name in names[i::3]}, files[-1])
    return state, files


def load(files: list[Path], **how) -> nn.Module:
    with torch.device("meta"):
        model = Layers(20)
    slots = {name: Slot(name=name) for name in model.state_dict()}
    load_parameters(model, slots, files, device="cpu", dtype=torch.float32, **how)
    return model


def test_eight_threads_load_what_one_does(tmp_path):
    state, files = written(tmp_path)
    for num_readers in (1, 8):
        loaded = load(files, num_readers=num_readers).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_what_a_thread_raises_ends_the_loading(tmp_path):
    def delta(slot: Slot, device: torch.device) -> None:
        raise RuntimeError(f"no memory for {slot.name}")

    with pytest.raises(RuntimeError, match="no memory for layers"):
        load(written(tmp_path)[1], num_readers=4, delta=delta)
