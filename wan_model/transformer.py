"""WanTransformer: one expert, the velocity field of the flow.

Owns the forward pass. It knows no rank and no group: `sp` shards, attends and gathers, and one
forward serves every parallel layout. Parameter names are the official checkpoint's, except that
q, k, v (self) and k, v (cross) are each one fused linear.

Shapes: B batch, C channels, T H W latent grid, S tokens, N tokens of this rank, L text tokens,
D dim, G timestep rows (1, or 2 when the first frame is clean). Precision: the linears run in their
weights' dtype; residual stream, time path, modulation, norms and head stay float32.

`Block.forward` is the definition; on a GPU, and with fp8 linears, `fused_blocks` computes the same.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_model.config import TransformerConfig
from wan_model.fp8 import Fp8Linear
from wan_model.fused_blocks import run_blocks
from wan_model.parallel import SequenceParallel
from wan_model.row_ops import has_triton, kernels_fit
from wan_model.text_attention import TextKeys, count_rows, text_attention

TextContext = list[TextKeys]
"""One per block."""


def is_float32_island(name: str) -> bool:
    """Whether parameter `name` keeps float32 when the model runs in bfloat16."""
    parts = name.split(".")
    return parts[0] in ("time_embedding", "time_projection", "head") or any(
        part == "modulation" or part.startswith("norm") for part in parts
    )


class WanTransformer(nn.Module):
    """latents [B, C_in, T, H, W], timesteps [B, G], text -> noise_pred [B, C_out, T, H, W]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.fused: bool | None = None  # whether `run_blocks` stands in for `Block`; None: choose

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_text(self, prompt_embeds: list[Tensor]) -> TextContext:
        """[num_tokens, text_dim] per sample -> the cross-attention keys and values of each block.

        They depend on the prompt alone: once per job and expert is enough. Prompts are padded with
        zero rows to text_len and the padding is attended to, as the model was trained: a few rows
        are computed and counted as often as needed.
        """
        lengths = [len(e) for e in prompt_embeds]
        log_counts = count_rows(lengths, self.config.text_len, prompt_embeds[0].device)
        num_rows = log_counts.shape[1]
        text_BLD = torch.stack([F.pad(e, (0, 0, 0, num_rows - len(e))) for e in prompt_embeds])
        text_BLD = self.text_embedding(text_BLD.to(self.dtype))
        return [TextKeys(*block.keys_and_values(text_BLD), log_counts) for block in self.blocks]

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: TextContext, sp: SequenceParallel
    ) -> Tensor:
        """timesteps [B, 1], or [B, 2] = (first latent frame, all others). Returns float32."""
        return self.forward_each(latents, timesteps, [text], sp)[0]

    def forward_each(
        self, latents: Tensor, timesteps: Tensor, texts: list[TextContext], sp: SequenceParallel
    ) -> list[Tensor]:
        """`forward` with each of the texts, to the bit; what knows no text is computed once."""
        batch_size, _, t, h, w = latents.shape
        patch_t, patch_h, patch_w = self.config.patch_size
        grid = (t // patch_t, h // patch_h, w // patch_w)
        x_BSD = self.patch_embedding(latents.to(self.dtype)).flatten(2).transpose(1, 2)
        num_tokens = x_BSD.shape[1]

        e_BGD, modulation_BG6D = self._embed_time(timesteps)
        # The tokens of timestep row 0 come first. Counted on the CPU: the GPU is not waited for.
        clean_S = torch.arange(num_tokens) < grid[1] * grid[2] * (timesteps.shape[1] - 1)
        clean_N = sp.shard(clean_S, dim=0)
        rope = tuple(
            sp.shard(table, dim=0)
            for table in _rope_tables_once(grid, self.config.head_dim, latents.device)
        )
        x_BND = sp.shard(x_BSD, dim=1).float()
        if self.fused if self.fused is not None else self._should_fuse(x_BND):
            rows = (modulation_BG6D, e_BGD, int(clean_N.sum()), rope, texts, sp, num_tokens)
            made = [self.head.head(y) for y in run_blocks(self.blocks, self.head, x_BND, *rows)]
        else:
            clean_N1 = clean_N[:, None].to(x_BND.device) if timesteps.shape[1] == 2 else None
            made = []
            for text in texts:
                y_BND = x_BND
                for block, keys in zip(self.blocks, text, strict=True):
                    y_BND = block(y_BND, modulation_BG6D, clean_N1, rope, keys, sp, num_tokens)
                made.append(self.head(y_BND, e_BGD, clean_N1))
        return [self._unpatchify(sp.gather(y, num_tokens), grid, batch_size) for y in made]

    def _should_fuse(self, x: Tensor) -> bool:
        """With fp8 linears, and without gradients on a GPU whose kernels fit this width."""
        if isinstance(self.blocks[0].ffn[0], Fp8Linear):
            return True
        c = self.config
        return (
            x.is_cuda
            and not torch.is_grad_enabled()
            and has_triton()
            and kernels_fit(c.dim, c.ffn_dim, c.head_dim)
        )

    def _embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G] -> (e [B, G, D] for the head, [B, G, 6, D] for the blocks)."""
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
        angles = timesteps.double()[..., None] * torch.pow(10000.0, -exponent)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
        e_BGD = self.time_embedding(sinusoid)
        return e_BGD, self.time_projection(e_BGD).unflatten(-1, (6, self.config.dim))

    def _unpatchify(self, x_BSD: Tensor, grid: tuple[int, int, int], batch_size: int) -> Tensor:
        """Tokens hold (patch_t, patch_h, patch_w, C), channels fastest."""
        patch, channels = self.config.patch_size, self.config.out_channels
        x = x_BSD.view(batch_size, *grid, *patch, channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        sizes = [n * p for n, p in zip(grid, patch, strict=True)]
        return x.reshape(batch_size, channels, *sizes)


class Block(nn.Module):
    """Self-attention, cross-attention and FFN, each added to the float32 residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = _modulation(6, config.dim)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )

    def keys_and_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """What cross-attention looks at. The second way into a block: where weights are not
        always here (sharded, offloaded), both ways fetch them first."""
        return self.cross_attn.keys_and_values(text_BLD)

    def forward(
        self,
        x_BND: Tensor,
        modulation_BG6D: Tensor,
        clean_N1: Tensor | None,
        rope: tuple[Tensor, Tensor],
        text: TextKeys,
        sp: SequenceParallel,
        num_tokens: int,
    ) -> Tensor:
        modulation = (self.modulation + modulation_BG6D).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(m, clean_N1) for m in modulation)
        dtype = self.self_attn.qkv.weight.dtype
        y = layer_norm(x_BND, self.eps) * (1 + scale1) + shift1
        x_BND = x_BND + gate1 * self.self_attn(y.to(dtype), rope, sp, num_tokens)
        x_BND = x_BND + self.cross_attn(self.norm3(x_BND).to(dtype), text)
        y = layer_norm(x_BND, self.eps) * (1 + scale2) + shift2
        return x_BND + gate2 * self.ffn(y.to(dtype))


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.o = nn.Linear(config.dim, config.dim)

    def forward(
        self, x_BND: Tensor, rope: tuple[Tensor, Tensor], sp: SequenceParallel, num_tokens: int
    ) -> Tensor:
        q, k, v = self.qkv(x_BND).chunk(3, dim=-1)
        heads = (self.num_heads, -1)
        # The norms span all heads; only then are the heads split and rotated.
        q = rotate(self.norm_q(q).unflatten(-1, heads), rope).to(v.dtype)
        k = rotate(self.norm_k(k).unflatten(-1, heads), rope).to(v.dtype)
        return self.o(sp.attention(q, k, v.unflatten(-1, heads), num_tokens).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.o = nn.Linear(config.dim, config.dim)

    def keys_and_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(text_BLD).chunk(2, dim=-1)
        heads = (self.num_heads, -1)
        return self.norm_k(k).to(v.dtype).unflatten(-1, heads), v.unflatten(-1, heads).contiguous()

    def forward(self, x_BND: Tensor, text: TextKeys) -> Tensor:
        q = self.norm_q(self.q(x_BND)).to(text.k.dtype).unflatten(-1, (self.num_heads, -1))
        return self.o(text_attention(q, text).flatten(2))


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_channels)
        self.modulation = _modulation(2, config.dim)

    def forward(self, x_BND: Tensor, e_BGD: Tensor, clean_N1: Tensor | None) -> Tensor:
        modulation = (self.modulation + e_BGD[:, :, None]).unbind(2)
        shift, scale = (per_token(m, clean_N1) for m in modulation)
        return self.head(layer_norm(x_BND, self.eps) * (1 + scale) + shift)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without learned scale, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def per_token(rows_BGD: Tensor, clean_N1: Tensor | None) -> Tensor:
    """One timestep row broadcast over all tokens, or the clean row where `clean_N1` says so."""
    if clean_N1 is None:
        return rows_BGD
    return torch.where(clean_N1, rows_BGD[:, :1], rows_BGD[:, 1:])


def rope_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim / 2] of the 3D rotary embedding (RoFormer, 2104.09864, per axis).

    head_dim is split d - 4 (d // 6), 2 (d // 6), 2 (d // 6) over t, h, w; each part has its own
    frequencies 10000^(-2i / part).
    """
    third = 2 * (head_dim // 6)
    angles = []
    for axis, part in enumerate((head_dim - 2 * third, third, third)):
        exponent = torch.arange(0, part, 2, dtype=torch.float64, device=device) / part
        position = torch.arange(grid[axis], dtype=torch.float64, device=device)
        angle = position[:, None] * torch.pow(10000.0, -exponent)
        shape = [1, 1, 1, part // 2]
        shape[axis] = grid[axis]
        angles.append(angle.view(shape).expand(*grid, part // 2))
    table = torch.cat(angles, dim=-1).reshape(-1, head_dim // 2)
    return table.cos().float(), table.sin().float()


@functools.lru_cache(maxsize=8)
def _rope_tables_once(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rope_tables`, remembered: the steps of a job share one grid."""
    with torch.inference_mode(False):  # so that training may use them as well
        return rope_tables(grid, head_dim, device)


def rotate(x_BNHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates adjacent pairs (2i, 2i + 1) of every head by its token's angles."""
    cos, sin = (table[:, None] for table in rope)
    even, odd = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _modulation(num_rows: int, dim: int) -> nn.Parameter:
    """Of variance 1 / dim. Uniform: on the meta device a normal one imports torch._dynamo (1 s)."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, num_rows, dim).uniform_(-bound, bound))
