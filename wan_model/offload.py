"""An expert whose blocks live in host memory and visit a small card two at a time.

Owns the host copies, the two places on the device and the order of the copies: while a block
computes, the next one is copied on a side stream. The model is the same module with the same
parameters; those of block i always lie in place i % 2. Knows nothing about ranks or jobs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wan_model.transformer import WanTransformer

NUM_PLACES = 2
ALIGNMENT_BYTES = 256
LAST_PIECE_BYTES = 2**20


class Offload:
    """Keeps the blocks of one model fetched in time. Made by `offload_blocks`."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        size = max(_offsets(block)[-1] for block in blocks)
        self.places = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_PLACES)
        ]
        self.host: list[list[Tensor]] = []
        self.in_place: list[int | None] = [None] * NUM_PLACES
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.fetched: list[torch.cuda.Event | None] = [None] * NUM_PLACES
        for index, block in enumerate(blocks):
            self.host.append(_pack(block, pinned=device.type == "cuda"))
            _point_into(block, self.places[index % NUM_PLACES])
            self._before_each_use(block, index)

    def use(self, index: int) -> None:
        """Block `index` is about to compute: waits for its weights and sends for the next one's.

        Everything queued so far on the current stream used other blocks, so the next block's
        place is free once that has run; unless it is the place of this very block.
        """
        self._fetch(index)
        place = index % NUM_PLACES
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.fetched[place])
        following = (index + 1) % len(self.host)
        if following % NUM_PLACES != place:
            self._fetch(following)

    def _fetch(self, index: int) -> None:
        place = index % NUM_PLACES
        if self.in_place[place] == index:
            return
        if self.stream is None:
            self._copy(index)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self._copy(index)
                self.fetched[place] = self.stream.record_event()
        self.in_place[place] = index

    def _copy(self, index: int) -> None:
        start = 0
        for piece in self.host[index]:
            target = self.places[index % NUM_PLACES][start : start + piece.numel()]
            target.copy_(piece, non_blocking=True)
            start += piece.numel()

    def _before_each_use(self, block: nn.Module, index: int) -> None:
        block.register_forward_pre_hook(lambda *_: self.use(index))
        keys_and_values = block.keys_and_values

        def fetched_keys_and_values(text_BLD: Tensor) -> tuple[Tensor, Tensor]:
            self.use(index)
            return keys_and_values(text_BLD)

        block.keys_and_values = fetched_keys_and_values


def offload_blocks(model: WanTransformer, device: str) -> WanTransformer:
    """`model`, loaded on the CPU, ready to run on `device` with two blocks there at a time."""
    model.offload = Offload(model.blocks, torch.device(device))
    for name, child in model.named_children():
        if name != "blocks":
            child.to(device)
    model.fused = False  # the fused path reads weights without calling the blocks
    return model


def _tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _offsets(block: nn.Module) -> list[int]:
    """Where each tensor of a block begins in its packed bytes, and where the last one ends."""
    offsets = [0]
    for tensor in _tensors(block):
        end = offsets[-1] + tensor.numel() * tensor.element_size()
        offsets.append(-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return offsets


def _pack(block: nn.Module, *, pinned: bool) -> list[Tensor]:
    """All weights of a block as a few pieces of bytes in host memory: as many copies fetch them."""
    flat = torch.empty(_offsets(block)[-1], dtype=torch.uint8)
    _point_into(block, flat, copy=True)
    pieces = flat.split(_pieces(flat.numel()))
    return [piece.pin_memory() for piece in pieces] if pinned else list(pieces)


def _pieces(num_bytes: int) -> list[int]:
    """Powers of two and a small rest that add up to `num_bytes`. Of pinned memory PyTorch takes the
    next power of two: for one piece of an A14B block's 703 MB that would be 1074."""
    pieces = []
    while num_bytes > LAST_PIECE_BYTES:
        pieces.append(2 ** (num_bytes.bit_length() - 1))
        num_bytes -= pieces[-1]
    return [*pieces, num_bytes] if num_bytes else pieces


def _point_into(block: nn.Module, flat: Tensor, *, copy: bool = False) -> None:
    """Makes the block's tensors views of `flat`, on whatever device it is."""
    for tensor, start in zip(_tensors(block), _offsets(block), strict=False):
        piece = flat[start : start + tensor.numel() * tensor.element_size()]
        view = piece.view(tensor.dtype).view(tensor.shape)
        if copy:
            view.copy_(tensor.data)
        tensor.data = view
