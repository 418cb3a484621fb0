"""The blocks of a transformer as a chain of matrix products and fused row operations.

Owns the order of the operations when nothing is trained: what `Block.forward` computes, with every
residual add joined to the norm that follows it, across blocks too: both are one pass over memory,
which with fp8 linears quantises as well. Knows no rank.

Shapes as in `transformer`; R = B * N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan_model.fp8 import Fp8Linear
from wan_model.parallel import SequenceParallel
from wan_model.row_ops import FP8, Change, RowLayout, Rows, add_norm, gelu, norm_rope
from wan_model.text_attention import TextKeys, text_attention

if TYPE_CHECKING:
    from wan_model.transformer import Block, Head, TextContext


def run_blocks(
    blocks: nn.ModuleList,
    head: Head,
    x_BND: Tensor,
    modulation_BG6D: Tensor,
    e_BGD: Tensor,
    num_clean: int,
    rope: tuple[Tensor, Tensor],
    texts: Sequence[TextContext],
    sp: SequenceParallel,
    num_tokens: int,
) -> list[Tensor]:
    """All blocks and the head's modulated norm -> for each text [B, N, D], for the head's linear.

    x [B, N, D] float32 is changed in place; `num_clean` of this rank's tokens have timestep row 0.
    The first block's self-attention, which knows no text, is computed once.
    """
    layout = RowLayout(num_tokens=x_BND.shape[1], num_clean=num_clean)
    shape, eps = x_BND.shape, head.eps
    stream = x_BND.contiguous().view(-1, shape[2])
    norms = _norms(blocks, head, modulation_BG6D, e_BGD)
    y = add_norm(
        stream, (), norms[0].scale1, norms[0].shift1, layout, eps=eps,
        out_dtype=_input_dtype(norms[0].linear),
    )  # fmt: skip
    y = _self_attention(blocks[0], y, layout, rope, sp, num_tokens)
    first = Change(y=blocks[0].self_attn.o(y), gate=norms[0].gate1)
    made = []
    for num_left, text in zip(reversed(range(len(texts))), texts, strict=True):
        x = stream.clone() if num_left else stream
        for block, keys, modulation, following in zip(
            blocks, text, norms[:-1], norms[1:], strict=True
        ):
            if block is blocks[0]:
                attended, first = first, first if num_left else None
            else:
                y = _self_attention(block, y, layout, rope, sp, num_tokens)
                attended = Change(y=block.self_attn.o(y), gate=modulation.gate1)
            # Not stored: the next sum takes it again, which reads 2 bytes and saves writing 4.
            y = add_norm(
                x, (attended,), block.norm3.weight[None, None], block.norm3.bias[None, None],
                layout, eps=eps, out_dtype=_input_dtype(block.cross_attn.q), store=False,
            )  # fmt: skip
            y = _cross_attention(block, y, layout, keys)
            looked_up = Change(y=block.cross_attn.o(y))
            y = add_norm(
                x, (attended, looked_up), modulation.scale2, modulation.shift2, layout, eps=eps,
                out_dtype=_input_dtype(block.ffn[0]),
            )  # fmt: skip
            del attended, looked_up
            y = _linear_gelu(block.ffn[0], y, out_dtype=_input_dtype(block.ffn[2]))
            change = Change(y=block.ffn[2](y), gate=modulation.gate2)
            y = add_norm(
                x, (change,), following.scale1, following.shift1, layout, eps=eps,
                out_dtype=_input_dtype(following.linear),
            )  # fmt: skip
            del change
        made.append(y.view(shape))
    return made


@dataclass(frozen=True, kw_only=True)
class _Modulation:
    """The rows [B, G, D] of a block, 1 added to the scales, and the linear its first norm feeds.

    The head has the first two only.
    """

    linear: nn.Module
    shift1: Tensor
    scale1: Tensor
    gate1: Tensor | None = None
    shift2: Tensor | None = None
    scale2: Tensor | None = None
    gate2: Tensor | None = None


def _norms(
    blocks: nn.ModuleList, head: Head, modulation_BG6D: Tensor, e_BGD: Tensor
) -> list[_Modulation]:
    """Of every block and, last, of the head."""
    own_L6D = torch.cat([block.modulation for block in blocks])
    rows_LBG6D = own_L6D[:, None, None] + modulation_BG6D
    rows_LBG6D[..., 1::3, :] += 1
    made = []
    for block, rows_BG6D in zip(blocks, rows_LBG6D, strict=True):
        shift1, scale1, gate1, shift2, scale2, gate2 = rows_BG6D.unbind(-2)
        made.append(
            _Modulation(
                linear=block.self_attn.qkv,
                shift1=shift1, scale1=scale1, gate1=gate1,
                shift2=shift2, scale2=scale2, gate2=gate2,
            )
        )  # fmt: skip
    shift, scale = (head.modulation + e_BGD[:, :, None]).unbind(-2)
    made.append(_Modulation(linear=head.head, shift1=shift, scale1=scale + 1))
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
    return _rows(sp.attention(*qkv_BN3HD.unbind(2), num_tokens))


def _cross_attention(block: Block, y: Rows, layout: RowLayout, text: TextKeys) -> Tensor:
    layer = block.cross_attn
    q = layer.q(y)
    norm_rope(q, (layer.norm_q.weight,), None, layout, eps=layer.norm_q.eps)
    q_BNHD = q.view(-1, layout.num_tokens, layer.num_heads, text.k.shape[-1])
    return _rows(text_attention(q_BNHD, text))


def _linear_gelu(linear: nn.Module, y: Rows, *, out_dtype: torch.dtype) -> Rows:
    if isinstance(y, Tensor) and y.is_cuda and out_dtype != FP8:
        # In the product's own last step on a GPU, before it rounds; GELU's tanh form there.
        return torch._addmm_activation(linear.bias, y, linear.weight.t(), use_gelu=True)
    return gelu(linear(y), out_dtype=out_dtype)


def _rows(x_BNHD: Tensor) -> Tensor:
    return x_BNHD.reshape(-1, x_BNHD.shape[2] * x_BNHD.shape[3])


def _input_dtype(linear: nn.Module) -> torch.dtype:
    return FP8 if isinstance(linear, Fp8Linear) else linear.weight.dtype
