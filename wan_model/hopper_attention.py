"""Exact attention on a Hopper GPU by our own kernels: to a video's own tokens, which are many
(`attention_bf16_hopper.cu`), and to its text's, which are few (`text_attention_hopper.cu`).

Owns the operands they are given: tensor maps of q, k and v as they lie, of whatever they are parts.
The kernels are loaded and launched by `hopper`. Knows nothing about others.

Shapes: B batch, L queries, S keys, H heads; a head_dim of 128.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from wan_model import hopper

HEAD_DIM = 128
GROUPS = 3  # of four warps that multiply, as in both kernels; one more copies
QUERIES = GROUPS * 64  # of a block of threads
THREADS = 128 * (GROUPS + 1)
BOX = (64, 1, 64, 1)  # channels, heads, tokens, samples of a copy
RING_TILES = 5  # of 128 keys or values in flight
KERNEL = hopper.Kernel(
    who="attention backend hopper", file="attention_bf16_hopper.cu", name="exact_attention",
    num_threads=THREADS,
    shared_bytes=2 * HEAD_DIM * (QUERIES + RING_TILES * 128) + 8 * (1 + 2 * RING_TILES),
    macros=(("TILES", RING_TILES),),
)  # fmt: skip


MAX_TEXT_KEYS = 256
TEXT_SLOTS = {1: 9, 2: 5}  # tiles of 64 queries in flight, by blocks of 128 keys of a text


@functools.cache
def text_kernel(num_blocks: int) -> hopper.Kernel:
    """That of a text of at most `num_blocks` times 128 keys."""
    slots = TEXT_SLOTS[num_blocks]
    return hopper.Kernel(
        who="attention to the text", file="text_attention_hopper.cu", name="text_attention",
        num_threads=THREADS,
        shared_bytes=2 * HEAD_DIM * (2 * 128 * num_blocks + 64 * slots)
        + 4 * 128 * num_blocks + 8 * (1 + 2 * slots),
        macros=(("BLOCKS", num_blocks), ("SLOTS", slots)),
    )  # fmt: skip


def fits(q: Tensor) -> bool:
    """Whether there are kernels for tensors like `q`, on its device."""
    return _missing(q) is None


def _missing(q: Tensor) -> str | None:
    """What the kernel needs and has not."""
    if not q.is_cuda or not hopper.is_hopper(q.device.index):
        return "a Hopper GPU (compute capability 9.0): use another one"
    if q.dtype != torch.bfloat16 or q.shape[-1] != HEAD_DIM:
        return (
            f"bfloat16 and a head_dim of {HEAD_DIM}, not {str(q.dtype).removeprefix('torch.')} and"
            f" {q.shape[-1]}: use another one"
        )
    if not hopper.has_bindings():
        return "cuda-bindings of torch's CUDA version: pip install cuda-bindings"
    return None


def hopper_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, L, H, D]. ValueError where there is no kernel for it."""
    return _launch(q_BLHD, k_BSHD, v_BSHD, None)


def hopper_attention_with_lse(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and log(sum(exp(scores))) as float32 [B, L, H]."""
    lse_BLH = torch.empty(q_BLHD.shape[:3], dtype=torch.float32, device=q_BLHD.device)
    return _launch(q_BLHD, k_BSHD, v_BSHD, lse_BLH), lse_BLH


def _launch(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, lse_BLH: Tensor | None) -> Tensor:
    _check(KERNEL.who, q_BLHD, k_BSHD, v_BSHD)
    b, num_queries, h, d = q_BLHD.shape
    out = torch.empty((b, num_queries, h, d), dtype=q_BLHD.dtype, device=q_BLHD.device)
    pointers = (out.data_ptr(), 0 if lse_BLH is None else lse_BLH.data_ptr())
    grid, numbers = _grid(-(-num_queries // QUERIES), b * h), (num_queries, k_BSHD.shape[1], h, b)
    _run(KERNEL, grid, (q_BLHD, k_BSHD, v_BSHD), pointers, numbers)
    return out


def fits_text(q: Tensor, num_keys: int) -> bool:
    """Whether `text_attention` is there for so many keys."""
    return fits(q) and num_keys <= MAX_TEXT_KEYS


def text_attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, log_counts_BS: Tensor) -> Tensor:
    """`text_attention.text_attention`, where it `fits_text`. ValueError as above."""
    num_keys = k_BSHD.shape[1]
    kernel = text_kernel(-(-num_keys // 128))
    _check(kernel.who, q_BLHD, k_BSHD, v_BSHD)
    b, num_queries, h, d = q_BLHD.shape
    out = torch.empty((b, num_queries, h, d), dtype=q_BLHD.dtype, device=q_BLHD.device)
    log_counts = log_counts_BS.float().contiguous()
    # As many blocks for each head's tiles as all have a multiprocessor.
    num_processors = hopper.num_processors(q_BLHD.device.index)
    num_shares = max(1, min(-(-num_queries // 64), num_processors // (b * h)))
    grid, numbers = (b * h * num_shares, 1), (num_queries, num_keys, h, num_shares)
    pointers = (log_counts.data_ptr(), out.data_ptr())
    _run(kernel, grid, (q_BLHD, k_BSHD, v_BSHD), pointers, numbers)
    return out


def _check(who: str, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> None:
    if missing := _missing(q_BLHD):
        raise ValueError(f"{who} needs {missing}")
    b, _, h, d = q_BLHD.shape
    keys = (b, k_BSHD.shape[1], h, d)
    if not k_BSHD.shape == v_BSHD.shape == keys or not q_BLHD.dtype == k_BSHD.dtype == v_BSHD.dtype:
        raise ValueError(
            f"{who} needs keys and values of {list(keys)} in bfloat16, not {list(k_BSHD.shape)} in"
            f" {k_BSHD.dtype} and {list(v_BSHD.shape)} in {v_BSHD.dtype}"
        )


def _run(
    kernel: hopper.Kernel,
    grid: tuple[int, int],
    qkv: tuple[Tensor, Tensor, Tensor],
    pointers: tuple[int, ...],
    numbers: tuple[int, ...],
) -> None:
    """All our kernels' arguments: three maps, pointers, integers, the scores' scale in log2."""
    qkv = tuple(_mappable(x) for x in qkv)
    scale = math.log2(math.e) / math.sqrt(HEAD_DIM)
    types = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
    with torch.cuda.device_of(qkv[0]):
        kernel.launch(
            grid,
            (*(_map(kernel.who, x) for x in qkv), *pointers, *numbers, scale),
            (None, None, None, *types, ctypes.c_float),
        )


def _grid(num_tiles: int, num_heads: int) -> tuple[int, int]:
    """Two blocks, which share keys and values, for every two tiles of queries of a head; where
    their number is odd, one for each of the last ones, in pairs too. `place_of_block` is the
    inverse."""
    num_left = num_heads if num_tiles % 2 else 0
    return 2 * (num_tiles // 2 * num_heads + -(-num_left // 2)), 1


def _mappable(x: Tensor) -> Tensor:
    """As it is where TMA can read it: channels together, the rest in steps of 16 bytes."""
    steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    fits = x.stride(3) == 1 and all(s > 0 and s % 8 == 0 for s in steps) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _map(who: str, x_BLHD: Tensor):
    b, num_tokens, h, d = x_BLHD.shape
    # The step of a dimension of one is never taken, but has to be one that TMA takes.
    step_b, step_l, step_h = (
        2 * (x_BLHD.stride(i) if x_BLHD.shape[i] > 1 else d) for i in range(3)
    )
    return hopper.tensor_map(
        who, x_BLHD.data_ptr(), (d, h, num_tokens, b), (step_h, step_l, step_b), BOX
    )
