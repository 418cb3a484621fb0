"""The blocks of a transformer as a chain of matrix products and fused row operations.

Owns the order of the operations when nothing is trained: what `Block.forward` computes, with every
residual add joined to the norm that follows it, across blocks too: both are one pass over memory,
which with fp8 linears quantises as well. Knows no rank.

Shapes as in `transformer`; R = B * N rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan_model.fp8 import Fp8Linear
from wan_model.parallel import SequenceParallel
from wan_model.row_ops import FP8, RowLayout, Rows, add_norm, gelu, norm_rope

if TYPE_CHECKING:
    from wan_model.transformer import Block, Head, TextContext

SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)


def run_blocks(
    blocks: nn.ModuleList,
    head: Head,
    x_BND: Tensor,
    modulation_BG6D: Tensor,
    e_BGD: Tensor,
    num_clean: int,
    rope: tuple[Tensor, Tensor],
    text: TextContext,
    sp: SequenceParallel,
    num_tokens: int,
) -> Tensor:
    """All blocks and the head's modulated norm: x [B, N, D] float32 (changed in place) -> [B, N, D]

    float32, ready for the head's linear. `num_clean` of this rank's tokens have timestep row 0.
    """
    layout = RowLayout(num_tokens=x_BND.shape[1], num_clean=num_clean)
    shape, eps = x_BND.shape, head.eps
    x = x_BND.contiguous().view(-1, shape[2])
    norms = _norms(blocks, head, modulation_BG6D, e_BGD)
    modulation = norms[0]
    y = add_norm(
        x, None, None, modulation[SCALE1], modulation[SHIFT1], layout, eps=eps,
        out_dtype=_input_dtype(blocks[0].self_attn.qkv),
    )  # fmt: skip
    for block, (k, v), modulation, following in zip(
        blocks, text, norms[:-1], norms[1:], strict=True
    ):
        y = _self_attention(block, y, layout, rope, sp, num_tokens)
        y = add_norm(
            x, y, modulation[GATE1], block.norm3.weight[None, None], block.norm3.bias[None, None],
            layout, eps=eps, out_dtype=_input_dtype(block.cross_attn.q),
        )  # fmt: skip
        y = _cross_attention(block, y, layout, k, v, sp)
        y = add_norm(
            x, y, None, modulation[SCALE2], modulation[SHIFT2], layout, eps=eps,
            out_dtype=_input_dtype(block.ffn[0]),
        )  # fmt: skip
        y = block.ffn[2](gelu(block.ffn[0](y), out_dtype=_input_dtype(block.ffn[2])))
        y = add_norm(
            x, y, modulation[GATE2], following[SCALE1], following[SHIFT1], layout, eps=eps,
            out_dtype=_input_dtype(following.linear),
        )  # fmt: skip
    return y.view(shape)


class _Modulation(list):
    """The six rows [B, G, D] of a block (of the head: two), and the linear its first norm feeds."""

    linear: nn.Module


def _norms(
    blocks: nn.ModuleList, head: Head, modulation_BG6D: Tensor, e_BGD: Tensor
) -> list[_Modulation]:
    """Of every block and, last, of the head; the scales have their 1 added."""
    own_L6D = torch.cat([block.modulation for block in blocks])
    rows = own_L6D[:, None, None] + modulation_BG6D
    rows[..., SCALE1, :] += 1
    rows[..., SCALE2, :] += 1
    made = [_Modulation(block_rows.unbind(-2)) for block_rows in rows]
    head_rows = head.modulation + e_BGD[:, :, None]
    head_rows[..., SCALE1, :] += 1
    made.append(_Modulation(head_rows.unbind(-2)))
    for modulation, block in zip(made, blocks, strict=False):
        modulation.linear = block.self_attn.qkv
    made[-1].linear = head.head
    return made


def _self_attention(
    block: Block,
    y: Rows,
    layout: RowLayout,
    rope: tuple[Tensor, Tensor],
    sp: SequenceParallel,
    num_tokens: int,
) -> Tensor:
    layer = block.self_attn
    qkv = layer.qkv(y)
    norm_rope(qkv, (layer.norm_q.weight, layer.norm_k.weight), rope, layout, eps=layer.norm_q.eps)
    qkv_BN3HD = qkv.view(-1, layout.num_tokens, 3, layer.num_heads, rope[0].shape[1] * 2)
    return layer.o(_rows(sp.attention(*qkv_BN3HD.unbind(2), num_tokens)))


def _cross_attention(
    block: Block, y: Rows, layout: RowLayout, k: Tensor, v: Tensor, sp: SequenceParallel
) -> Tensor:
    layer = block.cross_attn
    q = layer.q(y)
    norm_rope(q, (layer.norm_q.weight,), None, layout, eps=layer.norm_q.eps)
    q_BNHD = q.view(-1, layout.num_tokens, layer.num_heads, k.shape[-1])
    return layer.o(_rows(sp.cross_attention(q_BNHD, k, v)))


def _rows(x_BNHD: Tensor) -> Tensor:
    return x_BNHD.reshape(-1, x_BNHD.shape[2] * x_BNHD.shape[3])


def _input_dtype(linear: nn.Module) -> torch.dtype:
    return FP8 if isinstance(linear, Fp8Linear) else linear.weight.dtype
