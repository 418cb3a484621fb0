"""A picture divided over ranks by rows: each rank's share, its neighbours' edges, the whole again.

Owns the exchange that makes a convolution over one rank's rows exact at the seams. Knows nothing
about networks: a convolution of radius 1 needs one row of each neighbour, zeros at the borders.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Rows:
    """This rank's part of `num_rows` rows, and of pictures that are a multiple as high.

    Made by `divide_rows`. All methods but `mine` are collective over the default process group.
    """

    def __init__(self, num_rows: int) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        edges = [rank * num_rows // self.num_ranks for rank in range(self.num_ranks + 1)]
        self.start = edges[self.rank]
        self.counts = [end - start for start, end in zip(edges, edges[1:], strict=False)]

    def mine(self, x: Tensor, *, dim: int) -> Tensor:
        return x.narrow(dim, self.start, self.counts[self.rank])

    def with_neighbours(self, x: Tensor) -> Tensor:
        """[..., H, W] -> [..., H + 2, W]: the row above and the row below added."""
        first, last = x[..., :1, :].contiguous(), x[..., -1:, :].contiguous()
        above, below = torch.zeros_like(first), torch.zeros_like(last)
        transfers = []
        if self.rank > 0:
            transfers += _both_ways(first, above, self.rank - 1)
        if self.rank < self.num_ranks - 1:
            transfers += _both_ways(last, below, self.rank + 1)
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            # The parts of one layout are joined in it; mixed, they would all be rearranged.
            above, below = (row.to(memory_format=torch.channels_last_3d) for row in (above, below))
        return torch.cat((above, x, below), dim=-2)

    def gather(self, x: Tensor, *, dim: int) -> Tensor:
        """Everybody's rows along `dim`, in order. Parts may differ in height by one unit."""
        unit = x.shape[dim] // self.counts[self.rank]
        tallest = max(self.counts) * unit
        x = x.movedim(dim, 0)
        padded = x.new_zeros((tallest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        dist.all_gather(parts, padded)
        kept = [part[: count * unit] for part, count in zip(parts, self.counts, strict=True)]
        return torch.cat(kept).movedim(0, dim)


def divide_rows(num_rows: int) -> Rows | None:
    """None when there are fewer rows than ranks: everyone then does the whole picture."""
    return Rows(num_rows) if num_rows >= dist.get_world_size() else None


def is_first_rank() -> bool:
    return dist.get_rank() == 0


def _both_ways(sent: Tensor, received: Tensor, peer: int) -> list[dist.P2POp]:
    return [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
