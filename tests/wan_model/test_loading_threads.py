"""Loading a checkpoint by several threads: the same tensors, and errors that are not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wan_model.checkpoint_files import load_parameters, staged_parts
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


@pytest.mark.parametrize("num_bytes", [32, 56, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_goes_through_a_buffer_of_any_size(num_bytes, dtype):
    source = torch.randn(3, 5, 7).to(dtype)
    target, buffer = torch.zeros(3, 5, 7), torch.empty(num_bytes, dtype=torch.uint8)
    for part, staged in staged_parts(target, source, buffer):
        assert staged.data_ptr() == buffer.data_ptr()
        part.copy_(staged)
    assert torch.equal(target, source.float())
    transposed = source.transpose(0, 2)  # as a .pth file may hold one
    target = torch.zeros(transposed.shape)
    for part, staged in staged_parts(target, transposed, buffer):
        part.copy_(staged)
    assert torch.equal(target, transposed.float())


def test_what_a_thread_raises_ends_the_loading(tmp_path):
    def delta(slot: Slot, device: torch.device) -> None:
        raise RuntimeError(f"no memory for {slot.name}")

    with pytest.raises(RuntimeError, match="no memory for layers"):
        load(written(tmp_path)[1], num_readers=4, delta=delta)
