"""Muon: steps for weight matrices whose singular values are all about one.

Owns the momentum of those matrices; AdamW has all other weights. Knows nothing about networks:
it is given views of weights and of their gradients. For experts as small as these it learns in
2 minutes more than AdamW in 8 (the model card has the scores).

Shapes: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MatrixView = tuple[Tensor, Tensor]
"""A weight [R,C] and its gradient [R,C]; both are views of the loop's flat vectors."""

_MOMENTUM = 0.95
_NUM_ITERATIONS = 5
# The quintic of Keller Jordan's Muon: steepest at zero, singular values end between 0.7 and 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ADAM_RMS = 0.2  # of an AdamW step at rate 1, so that one rate fits both (2502.16982, section 2.2)
_FASTER = 4.0  # than AdamW's rate, which its worst-scaled weights limit


class Muon:
    """Momentum, orthogonalised. All matrices of one shape are one batch: few kernels."""

    def __init__(self, matrices: Sequence[MatrixView]) -> None:
        self._groups: dict[tuple[int, ...], list[MatrixView]] = {}
        for weight, gradient in matrices:
            self._groups.setdefault(tuple(weight.shape), []).append((weight, gradient))
        self.momenta = [
            torch.zeros(len(group), *shape, device=group[0][0].device)
            for shape, group in self._groups.items()
        ]

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """Moves the weights; sets their gradients to zero, so that AdamW leaves them alone."""
        for momentum_MRC, (shape, group) in zip(self.momenta, self._groups.items(), strict=True):
            weights, gradients = (list(views) for views in zip(*group, strict=True))
            gradient_MRC = torch.stack(gradients)
            momentum_MRC.lerp_(gradient_MRC, 1 - _MOMENTUM)
            update_MRC = orthogonalise(gradient_MRC.lerp(momentum_MRC, _MOMENTUM))
            scale = _FASTER * _ADAM_RMS * max(shape) ** 0.5
            torch._foreach_sub_(weights, list((rate * scale * update_MRC).unbind()))
            torch._foreach_zero_(gradients)


def orthogonalise(x_MRC: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, float32, by Newton-Schulz iterations in bfloat16."""
    a, b, c = _QUINTIC
    x = x_MRC.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if is_tall else x).float()
