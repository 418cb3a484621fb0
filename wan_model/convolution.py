"""The VAE's 3 x 3 x 3 convolution: its definition, and the choice of our kernel on a Hopper GPU.

The kernel is `convolution_hopper.cu`, loaded and launched by `hopper`. It sums in float32 and
rounds once, after the bias. Knows no layers.

Shapes: B videos, C and O channels in and out, T frames, H x W pixels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_model import hopper

WHO = "convolution"
ROWS, COLS, CHANNELS, THREADS = 6, 64, 32, 512  # as in convolution_hopper.cu
RINGS = {16: (5, 18), 96: (3, 7), 128: (3, 5)}
"""Output channels of a tile -> patches of the input and weights that shared memory has room for."""
CUDNN_SPEED = ((512, 0.93), (384, 0.7), (256, 0.9), (0, 0.7))
"""From so many channels in on, cuDNN's speed on an H200 in terms of our products' (`convolutions`
of benchmarks/results/vae-h200.json)."""


def causal_conv3d(
    x_BCTHW: Tensor, weight_OCKKK: Tensor, bias_O: Tensor | None, padding_h: int
) -> Tensor:
    """[B, O, T - 2, H - 2 + 2 * padding_h, W]: no padding in time, zeros beyond the edges of W.

    Of tensors laid out as [B, T, H, W, C] the result is laid out so too.
    """
    if _fits(x_BCTHW, weight_OCKKK, bias_O) and _pays(x_BCTHW, weight_OCKKK, padding_h):
        return by_kernel(x_BCTHW, weight_OCKKK, bias_O, padding_h)
    return F.conv3d(x_BCTHW, weight_OCKKK, bias_O, padding=(0, padding_h, 1))


def by_kernel(
    x_BCTHW: Tensor, weight_OCKKK: Tensor, bias_O: Tensor | None, padding_h: int
) -> Tensor:
    """The same by our kernel, of tensors that fit it."""
    x_BTHWC = x_BCTHW.permute(0, 2, 3, 4, 1)
    b, t, h, w, _ = x_BTHWC.shape
    out_BTHWO = x_BTHWC.new_empty(b, t - 2, h - 2 + 2 * padding_h, w, weight_OCKKK.shape[0])
    with torch.cuda.device_of(x_BCTHW):
        for x_THWC, out_THWO in zip(x_BTHWC, out_BTHWO, strict=True):
            _launch(x_THWC, weight_OCKKK, bias_O, out_THWO, padding_h)
    return out_BTHWO.permute(0, 4, 1, 2, 3)


def warm_up(weights: Iterable[Tensor]) -> None:
    """Loads every kernel that convolutions with some of these weights could use."""
    for weight in weights:
        if _has_kernel(weight):
            with torch.cuda.device_of(weight):
                _kernel(tile_channels(weight.shape[0])).load()


def tile_channels(num_out: int) -> int:
    """Output channels of a tile: what fills up the fewest, and of equals the most."""
    if num_out <= 16:
        return 16
    return min((128, 96), key=lambda n: -(-num_out // n) * n)


def _fits(x_BCTHW: Tensor, weight_OCKKK: Tensor, bias_O: Tensor | None) -> bool:
    tensors = (x_BCTHW, weight_OCKKK) if bias_O is None else (x_BCTHW, weight_OCKKK, bias_O)
    return (
        _has_kernel(weight_OCKKK)
        and all(x.dtype == torch.bfloat16 for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d)
        and x_BCTHW.data_ptr() % 16 == 0
    )


def _has_kernel(weight_OCKKK: Tensor) -> bool:
    num_out = weight_OCKKK.shape[0]
    return (
        weight_OCKKK.is_cuda
        and weight_OCKKK.dtype == torch.bfloat16
        and weight_OCKKK.shape[2:] == (3, 3, 3)
        and weight_OCKKK.shape[1] % CHANNELS == 0
        and (num_out <= 16 or num_out % 8 == 0)
        and weight_OCKKK.is_contiguous(memory_format=torch.channels_last_3d)
        and weight_OCKKK.data_ptr() % 16 == 0
        and hopper.has_bindings()
        and hopper.is_hopper(weight_OCKKK.device.index)
    )


def _pays(x_BCTHW: Tensor, weight_OCKKK: Tensor, padding_h: int) -> bool:
    """Whether our kernel is the quicker one: it loses less of its work than cuDNN is slower."""
    _, c, t, h, w = x_BCTHW.shape
    shape = (t - 2, h - 2 + 2 * padding_h, w)
    cudnn_speed = next(speed for least, speed in CUDNN_SPEED if c >= least)
    share = share_wanted(shape, weight_OCKKK.shape[0], hopper.num_processors(x_BCTHW.device.index))
    return share > cudnn_speed


def share_wanted(shape: tuple[int, int, int], num_out: int, num_processors: int) -> float:
    """How much of what the multiprocessors multiply, for `shape` frames, rows and columns out, is
    wanted: tiles reach over the edges, and the last ones leave multiprocessors idle."""
    t, h, w = shape
    num_tiles = _num_tiles(shape, num_out)
    num_made = -(-num_tiles // num_processors) * num_processors
    num_made *= tile_channels(num_out) * ROWS * COLS
    # A few channels are a part of a tile for cuDNN too.
    return max(num_out, 16) * t * h * w / num_made


def _num_tiles(shape: tuple[int, int, int], num_out: int) -> int:
    t, h, w = shape
    return -(-num_out // tile_channels(num_out)) * t * -(-h // ROWS) * -(-w // COLS)


def _launch(
    x_THWC: Tensor, weight_OCKKK: Tensor, bias_O: Tensor | None, out_THWO: Tensor, padding_h: int
) -> None:
    num_frames, h, w, num_out = out_THWO.shape
    frames_in, rows_in, _, c = x_THWC.shape
    n = tile_channels(num_out)
    x_map = hopper.tensor_map(
        WHO, x_THWC.data_ptr(), (c, w, rows_in, frames_in),
        (2 * c, 2 * c * w, 2 * c * w * rows_in), (CHANNELS, COLS + 2, ROWS + 2, 1),
    )  # fmt: skip
    weight_map = hopper.tensor_map(  # [O, 27, C] read as [27, O, C]
        WHO, weight_OCKKK.data_ptr(), (c, num_out, 27), (2 * c * 27, 2 * c), (CHANNELS, n, 3)
    )
    num_blocks = -(-num_out // n)
    num_tiles = _num_tiles((num_frames, h, w), num_out)
    pointers = (0 if bias_O is None else bias_O.data_ptr(), out_THWO.data_ptr())
    numbers = (num_tiles, num_blocks, c // CHANNELS, num_frames, h, w, num_out, padding_h)
    _kernel(n).launch(
        (min(num_tiles, hopper.num_processors(x_THWC.device.index)), 1),
        (x_map, weight_map, *pointers, *numbers),
        (None, None, *[ctypes.c_void_p] * len(pointers), *[ctypes.c_int] * len(numbers)),
    )


@functools.cache
def _kernel(n: int) -> hopper.Kernel:
    num_patches, num_weights = RINGS[n]
    patch_bytes, weight_bytes = (ROWS + 2) * (COLS + 2) * CHANNELS * 2, 3 * n * CHANNELS * 2
    barriers = 16 * (num_patches + num_weights)
    return hopper.Kernel(
        who=WHO, file="convolution_hopper.cu", name="convolution", num_threads=THREADS,
        shared_bytes=num_patches * patch_bytes + num_weights * weight_bytes + barriers,
        macros=(("N", n), ("PATCHES", num_patches), ("WEIGHTS", num_weights)),
    )  # fmt: skip
