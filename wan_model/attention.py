"""The one place where an attention kernel is chosen and called.

Owns the table of kernels: which package each needs, how it is called, and how it gives its
log-sum-exp, if it has one. Knows nothing about ranks, masks or models: keys that must not be seen
are not passed in. Packages are imported when their kernel is first used.

Shapes: B batch, L queries, S keys, H heads, D head_dim. Kernels take and return [B, L, H, D]; a
log-sum-exp leaves this file as float32 [B, L, H].
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_model import hopper_attention
from wan_model.backends import ATTENTION_BACKENDS, WITHOUT_LSE
from wan_model.quantised_attention import quantised_attention

WithLSE = tuple[Tensor, Tensor]

WIDE_TILES = {"tile_mn": (192, 128), "mma_pv_is_rs": False, "num_threads": 512}
"""Of FlashAttention 4 at head_dim 128 on an H200: 2.6 % less time than its own choice."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """`modules`: what it can be imported from, the first that is there; () for what is always here.

    `tolerance`: how far its largest error may be from what attention is, in largest values. Wrong
    kernels are at 1.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    run_with_lse: Callable[[Tensor, Tensor, Tensor], WithLSE] | None = None
    modules: tuple[str, ...] = ()
    install: str = ""
    tolerance: float = 0.05


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, L, H, D]. Every key is attended to."""
    name = resolve_backend(backend, q_BLHD)
    return _KERNELS[name].run(q_BLHD, k_BSHD, v_BSHD)


def attention_with_lse(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, backend: str = "auto"
) -> WithLSE:
    """The same, and log(sum(exp(scores))) as float32 [B, L, H].

    Raises ValueError for a kernel that has no log-sum-exp to give.
    """
    name = resolve_backend(backend, q_BLHD)
    run = _KERNELS[name].run_with_lse
    if run is None:
        raise ValueError(
            f"attention backend {name} gives no log-sum-exp, which ring attention needs:"
            f" use one of {', '.join(n for n, k in _KERNELS.items() if k.run_with_lse)}"
        )
    return run(q_BLHD, k_BSHD, v_BSHD)


def resolve_backend(backend: str, q: Tensor, *, among: Collection[str] = ATTENTION_BACKENDS) -> str:
    """The kernel's name; "auto" is the fastest of `among` that there is for tensors like `q`."""
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype == torch.float32:  # the fast ones are 16 bit only
            return "sdpa"
        if "hopper" in among and hopper_attention.fits(q):
            return "hopper"
        if "flash_attn_4" in among and _first_module(_KERNELS["flash_attn_4"]):
            return "flash_attn_4"
        return "cudnn"
    if backend not in _KERNELS:
        known = ", ".join(ATTENTION_BACKENDS)
        raise ValueError(f"unknown attention backend {backend!r}: use one of {known}")
    return backend


@functools.cache
def check_kernel(
    backend: str, *, device: str, dtype: torch.dtype, head_dim: int, needs_lse: bool
) -> None:
    """Runs a kernel once on small numbers and compares it with the definition.

    Raises ValueError, in one sentence, when its package is missing, when it cannot run on these
    tensors, or when what it returns is not attention: there are kernels that return zeros where
    their log-sum-exp should be, and a ring would then be silently wrong.
    """
    shape = (1, 160, 2, head_dim)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(3))
    name = resolve_backend(backend, q)
    kernel = _KERNELS[name]
    if kernel.modules and _first_module(kernel) is None:
        raise ValueError(
            f"attention backend {name} is not installed: {kernel.install}, or use another backend"
        )
    lse = None
    try:
        if needs_lse:
            out, lse = attention_with_lse(q, k, v, name)
        else:
            out = attention(q, k, v, name)
    except ValueError:
        raise
    except Exception as error:  # whatever a kernel raises for a card or a shape it does not know
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        where = f"{device}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
        raise ValueError(f"attention backend {name} cannot run here ({where}): {reason}") from error
    scores = torch.einsum("blhd,bshd->blhs", q.float(), k.float()) * head_dim**-0.5
    expected = torch.einsum("blhs,bshd->blhd", scores.softmax(-1), v.float())
    _compare(name, "attention", out, expected)
    if lse is not None:
        _compare(name, "log-sum-exp", lse, scores.logsumexp(-1))


def _compare(name: str, what: str, got: Tensor, expected: Tensor) -> None:
    if got.shape == expected.shape:
        error = ((got.float() - expected).abs().max() / expected.abs().max()).item()
        if error < _KERNELS[name].tolerance:
            return
        what = f"{what} with an error of {100 * error:.0f} %"
    else:
        what = f"{what} of shape {list(got.shape)} instead of {list(expected.shape)}"
    raise ValueError(f"attention backend {name} returns {what}: use another backend or version")


def _first_module(kernel: Kernel) -> str | None:
    """The first of a kernel's modules that is installed. Imports the parents of its name only."""
    for module in kernel.modules:
        try:
            if importlib.util.find_spec(module) is not None:
                return module
        except ImportError:  # its parent package is not there, or of another torch
            continue
    return None


def _import(name: str) -> ModuleType:
    return importlib.import_module(_first_module(_KERNELS[name]) or _KERNELS[name].modules[0])


# ------------------------------------------------------------------------------- torch's kernels


def _sdpa(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """On a GPU the first of these that takes the tensors; cuDNN takes all 16 bit ones."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> WithLSE:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if q.device.type == "cpu":
        out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:  # the only kernel with a log-sum-exp that takes float32
        out, lse_BHL, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True
        )
    else:
        return _cudnn_with_lse(q_BLHD, k_BSHD, v_BSHD)
    return out.transpose(1, 2), lse_BHL[..., : q.shape[2]].transpose(1, 2)


def _cudnn(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> WithLSE:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    out, lse_BHL, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse_BHL.reshape(q.shape[:3]).transpose(1, 2)


# ---------------------------------------------------------------------- kernels of other packages


def _flash_attn(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    out = _import("flash_attn").flash_attn_func(q_BLHD, k_BSHD, v_BSHD)
    return out[0] if isinstance(out, tuple) else out  # early versions of 3 add the log-sum-exp


def _flash_attn_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> WithLSE:
    """Version 2 returns (out, lse, probabilities), version 3 (out, lse); lse is [B, H, L]."""
    function = _import("flash_attn").flash_attn_func
    out, lse_BHL, *_ = function(q_BLHD, k_BSHD, v_BSHD, return_attn_probs=True)
    return out, lse_BHL[..., : q_BLHD.shape[1]].transpose(1, 2)


def _flash_attn_4(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    package = _import("flash_attn_4")
    if q_BLHD.shape[3] == 128 and _takes_wide_tiles(q_BLHD.device):
        return package.interface._flash_attn_fwd(q_BLHD, k_BSHD, v_BSHD, **WIDE_TILES)[0]
    out = package.flash_attn_func(q_BLHD, k_BSHD, v_BSHD)
    return out[0] if isinstance(out, tuple) else out


@functools.cache
def _takes_wide_tiles(device: torch.device) -> bool:
    """On Hopper, and where this version of the package lets its tiles be chosen."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    function = getattr(_import("flash_attn_4").interface, "_flash_attn_fwd", None)
    return (
        function is not None and WIDE_TILES.keys() <= inspect.signature(function).parameters.keys()
    )


def _flash_attn_4_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> WithLSE:
    out, lse_BHL = _import("flash_attn_4").flash_attn_func(q_BLHD, k_BSHD, v_BSHD, return_lse=True)
    return out, lse_BHL.transpose(1, 2)


def _sage(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """SageAttention 1.0: int8 scores. It smooths the keys in place, so it gets its own copy."""
    return _import("sage").sageattn(q_BLHD, k_BSHD.clone(), v_BSHD, tensor_layout="NHD")


_KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(run=_sdpa, run_with_lse=_sdpa_with_lse),
    "cudnn": Kernel(run=_cudnn, run_with_lse=_cudnn_with_lse),
    "flash_attn": Kernel(
        run=_flash_attn,
        run_with_lse=_flash_attn_with_lse,
        modules=("flash_attn_interface", "flash_attn.flash_attn_interface"),
        install="build FlashAttention 3 (Hopper) or pip install flash-attn (2)",
    ),
    "flash_attn_4": Kernel(
        run=_flash_attn_4,
        run_with_lse=_flash_attn_4_with_lse,
        modules=("flash_attn.cute",),
        install="pip install flash-attn-4",
    ),
    "hopper": Kernel(
        run=hopper_attention.hopper_attention,
        run_with_lse=hopper_attention.hopper_attention_with_lse,
    ),
    "sage": Kernel(run=_sage, modules=("sageattention",), install="pip install sageattention"),
    # With an fp8 probability and value, each up to 6 % off, the largest error is 4 to 5 %.
    "fp8": Kernel(run=quantised_attention, tolerance=0.1),
}

assert {n for n, k in _KERNELS.items() if k.run_with_lse is None} == WITHOUT_LSE["own"]
