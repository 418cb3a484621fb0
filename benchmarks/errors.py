"""How far two tensors are apart. Light to import: every benchmark does."""

from __future__ import annotations

from torch import Tensor


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """rms(got - expected) / rms(expected), in float32, of tensors of one shape."""
    got, expected = got.float(), expected.float()
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
