"""Sequence parallelism (Ulysses x ring) and cfg parallelism on torch.distributed.

Owns the process groups inside a GPU group and every collective of a forward. The transformer asks
for `shard`, `attention` and `gather` and knows no rank; on one rank all three are the identity.
The same lines run under gloo and NCCL.

Shapes: B batch, S tokens, N = S / sp_degree tokens of this rank (the last ranks may hold padding),
H heads, D head_dim. Rank = cfg_rank * sp_degree + ring_rank * ulysses_degree + ulysses_rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from wan_model.attention import attention, attention_with_lse
from wan_model.config import ParallelDims


class SequenceParallel:
    """Divides the tokens of one forward over the ranks of a mesh.

    Every rank holds the same inputs before `shard` and the same outputs after `gather`. Token
    counts that do not divide are padded at the end; padded keys are cut off before they could be
    attended to.
    """

    def __init__(self, mesh: Mesh | None = None, attention_backend: str = "auto") -> None:
        self.mesh = mesh
        self.attention_backend = attention_backend
        self.degree = mesh.dims.sp_degree if mesh else 1

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of `x` along `dim`, zero-padded to a multiple of the degree."""
        if self.degree == 1:
            return x
        num_tokens = x.shape[dim]
        num_local = -(-num_tokens // self.degree)
        start = min(self.mesh.sp_rank * num_local, num_tokens)
        part = x.narrow(dim, start, min(num_local, num_tokens - start))
        if part.shape[dim] == num_local:
            return part
        padding = [0, 0] * (x.dim() - dim - 1) + [0, num_local - part.shape[dim]]
        return F.pad(part, padding)

    def gather(self, x_BND: Tensor, num_tokens: int) -> Tensor:
        """The whole sequence [B, S, D] from everyone's part, padding cut off."""
        if self.degree == 1:
            return x_BND
        parts = [torch.empty_like(x_BND) for _ in range(self.degree)]
        dist.all_gather(parts, x_BND.contiguous(), group=self.mesh.sp_group)
        return torch.cat(parts, dim=1)[:, :num_tokens]

    def attention(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, num_tokens: int) -> Tensor:
        """Self-attention over the whole sequence, for this rank's queries -> [B, N, H, D]."""
        if self.degree == 1:
            return attention(q_BNHD, k_BNHD, v_BNHD, self.attention_backend)
        dims = self.mesh.dims
        q, k, v = (self._scatter_heads(x) for x in (q_BNHD, k_BNHD, v_BNHD))
        if dims.ring_degree == 1:
            out = attention(q, k[:, :num_tokens], v[:, :num_tokens], self.attention_backend)
        else:
            out = self._ring_attention(q, k, v, num_tokens)
        return self._gather_heads(out)

    def _scatter_heads(self, x_BNHD: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N u, H / u, D]: all tokens of this ring block, some heads."""
        u = self.mesh.dims.ulysses_degree
        if u == 1:
            return x_BNHD
        b, n, h, d = x_BNHD.shape
        sent = x_BNHD.reshape(b, n, u, h // u, d).permute(2, 0, 1, 3, 4).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.mesh.ulysses_group)
        return received.permute(1, 0, 2, 3, 4).reshape(b, u * n, h // u, d)

    def _gather_heads(self, x_BLHD: Tensor) -> Tensor:
        """The inverse of `_scatter_heads`."""
        u = self.mesh.dims.ulysses_degree
        if u == 1:
            return x_BLHD
        b, n_u, h, d = x_BLHD.shape
        sent = x_BLHD.reshape(b, u, n_u // u, h, d).permute(1, 0, 2, 3, 4).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.mesh.ulysses_group)
        return received.permute(1, 2, 0, 3, 4).reshape(b, n_u // u, u * h, d)

    def _ring_attention(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, num_tokens: int):
        """Attends to one ring block after another while the next one travels.

        Blocks are merged by their log-sum-exp (Ring Attention, 2310.01889):
        out = out - sigmoid(lse_b - lse) (out - out_b), lse = lse - logsigmoid(lse - lse_b).
        """
        ring, rank = self.mesh.dims.ring_degree, self.mesh.ring_rank
        block_len = k_BLHD.shape[1]
        kv = torch.stack([k_BLHD, v_BLHD])
        out = lse = None
        for hop in range(ring):
            if hop + 1 < ring:
                next_kv, pending = self._send_around(kv)
            owner = (rank - hop) % ring
            num_keys = min(block_len, num_tokens - owner * block_len)
            if num_keys > 0:
                block_out, block_lse = attention_with_lse(
                    q_BLHD, kv[0][:, :num_keys], kv[1][:, :num_keys], self.attention_backend
                )
                out, lse = _merge(out, lse, block_out.float(), block_lse.float()[..., None])
            if hop + 1 < ring:
                for work in pending:
                    work.wait()
                kv = next_kv
        return out.to(q_BLHD.dtype)

    def _send_around(self, kv: Tensor) -> tuple[Tensor, list[dist.Work]]:
        received = torch.empty_like(kv)
        following, preceding = self.mesh.ring_neighbours
        group = self.mesh.ring_group
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, kv, following, group),
                dist.P2POp(dist.irecv, received, preceding, group),
            ]
        )
        return received, work


def _merge(
    out: Tensor | None, lse: Tensor | None, block_out: Tensor, block_lse: Tensor
) -> tuple[Tensor, Tensor]:
    if out is None:
        return block_out, block_lse
    merged = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return merged, lse - F.logsigmoid(lse - block_lse)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place and process groups. Made once, by every rank, with `make_mesh`."""

    dims: ParallelDims
    rank: int
    ulysses_group: dist.ProcessGroup
    ring_group: dist.ProcessGroup
    sp_group: dist.ProcessGroup
    cfg_group: dist.ProcessGroup

    @property
    def sp_rank(self) -> int:
        return self.rank % self.dims.sp_degree

    @property
    def ring_rank(self) -> int:
        return self.sp_rank // self.dims.ulysses_degree

    @property
    def cfg_rank(self) -> int:
        """0 predicts with the prompt, 1 with the negative prompt."""
        return self.rank // self.dims.sp_degree

    @property
    def ring_neighbours(self) -> tuple[int, int]:
        """(global rank to send to, global rank to receive from)."""
        u, ring = self.dims.ulysses_degree, self.dims.ring_degree
        first = self.rank - self.ring_rank * u
        return tuple(first + (self.ring_rank + step) % ring * u for step in (1, -1))

    def exchange_cfg(self, noise_pred: Tensor) -> tuple[Tensor, Tensor]:
        """(noise_pred_cond, noise_pred_uncond) from the two halves; equal on every rank."""
        parts = [torch.empty_like(noise_pred) for _ in range(2)]
        dist.all_gather(parts, noise_pred.contiguous(), group=self.cfg_group)
        return parts[0], parts[1]


@functools.cache
def make_mesh(dims: ParallelDims, *, num_heads: int) -> Mesh | None:
    """Splits the default process group by `dims`; None on one rank. Collective.

    Made once per process: both experts of a video use the same groups. Raises ValueError when the
    degrees do not fit the number of ranks or heads.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    dims.check(world_size=world_size, num_heads=num_heads)
    if world_size == 1:
        return None
    ranks = torch.arange(world_size).view(-1, dims.ring_degree, dims.ulysses_degree)
    rows = {
        "ulysses_group": ranks.reshape(-1, dims.ulysses_degree),
        "ring_group": ranks.permute(0, 2, 1).reshape(-1, dims.ring_degree),
        "sp_group": ranks.reshape(-1, dims.sp_degree),
        "cfg_group": ranks.reshape(-1, dims.sp_degree).T,
    }
    return Mesh(
        dims=dims,
        rank=dist.get_rank(),
        **{name: dist.new_subgroups_by_enumeration(row.tolist())[0] for name, row in rows.items()},
    )
