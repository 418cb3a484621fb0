"""The one place where an attention kernel is chosen and called.

Owns the list of kernels and which of them report a log-sum-exp (ring attention needs one).
Knows nothing about ranks, masks or models: keys that must not be seen are not passed in.

Shapes: B batch, L queries, S keys, H heads, D head_dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v -> [B, L, H, D]. Every key is attended to."""
    return _KERNELS[resolve_backend(backend, q_BLHD)](q_BLHD, k_BSHD, v_BSHD)


def attention_with_lse(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The same, and log(sum(exp(scores))) as float32 [B, L, H].

    Raises ValueError for a kernel that has no log-sum-exp to give.
    """
    name = resolve_backend(backend, q_BLHD)
    if name not in _KERNELS_WITH_LSE:
        raise ValueError(
            f"attention backend {name} reports no log-sum-exp, which ring attention needs:"
            f" use one of {', '.join(sorted(_KERNELS_WITH_LSE))}"
        )
    return _KERNELS_WITH_LSE[name](q_BLHD, k_BSHD, v_BSHD)


def resolve_backend(backend: str, q: Tensor) -> str:
    """The kernel's name; "auto" is the fastest that can be imported for tensors like `q`."""
    if backend == "auto":
        if q.device.type != "cuda" or q.dtype == torch.float32:  # the fast ones are 16 bit only
            return "sdpa"
        return "flash_attn_4" if _has_flash_attn_4() else "cudnn"
    if backend not in _KERNELS:
        raise ValueError(f"unknown attention backend {backend!r}: use one of {', '.join(_KERNELS)}")
    return backend


def _has_flash_attn_4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def _sdpa(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _sdpa_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    if q.device.type == "cpu":
        out, lse_BHL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse_BHL, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse_BHL[..., : q.shape[2]].transpose(1, 2)


def _cudnn(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BLHD, k_BSHD, v_BSHD)


def _cudnn_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    out, lse_BHL, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse_BHL.reshape(q.shape[:3]).transpose(1, 2)


def _flash_attn_4_with_lse(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func

    out, lse_BHL = flash_attn_func(q_BLHD, k_BSHD, v_BSHD, return_lse=True)
    return out, lse_BHL.transpose(1, 2)


def _flash_attn_4(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q_BLHD, k_BSHD, v_BSHD)
    return out[0] if isinstance(out, tuple) else out


_KERNELS: dict[str, Kernel] = {"sdpa": _sdpa, "cudnn": _cudnn, "flash_attn_4": _flash_attn_4}
_KERNELS_WITH_LSE = {
    "sdpa": _sdpa_with_lse,
    "cudnn": _cudnn_with_lse,
    "flash_attn_4": _flash_attn_4_with_lse,
}
