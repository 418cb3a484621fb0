"""Tensor maps as a CPU sees them: what the kernels of `hopper` are told to copy."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def memory(address: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """What a tensor map describes, outermost dimension first."""
    length = sum((n - 1) * s for n, s in zip(sizes, (2, *strides), strict=True)) + 2
    values = torch.frombuffer((ctypes.c_byte * length).from_address(address), dtype=torch.bfloat16)
    return values.as_strided(sizes[::-1], (*[s // 2 for s in strides[::-1]], 1))


def box_of(source: Tensor, box: tuple[int, ...], *start: int) -> Tensor:
    """As TMA copies it (`box` innermost first, `start` outermost first): 0 for what lies outside"""
    made = torch.zeros(box[::-1])
    inside = [
        (min(max(s, 0), size), min(max(s + n, 0), size))
        for s, n, size in zip(start, box[::-1], source.shape, strict=True)
    ]
    part = source[tuple(slice(low, high) for low, high in inside)].float()
    places = zip(inside, start, strict=True)
    made[tuple(slice(low - s, high - s) for (low, high), s in places)] = part
    return made


def tensor_map(
    who: str, at: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """In place of `hopper.tensor_map`."""
    assert at % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return memory(at, sizes, strides), box
