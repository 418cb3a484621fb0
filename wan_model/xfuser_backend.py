"""Self-attention over a sequence by xfuser's USP, instead of our own Ulysses x ring.

Owns the translation between the two: xfuser's process groups, its runtime state, its layout and
its names of kernels. Everything else (sharding, padding, gathering, cfg) stays ours. Written for
xfuser 0.7; imported, with all it pulls in, only when it was chosen. It needs a CUDA device.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from typing import Any

import torch
from torch import Tensor

from wan_model.attention import resolve_backend
from wan_model.backends import check_backends
from wan_model.config import ParallelDims
from wan_model.parallel import Mesh, SequenceParallel

KERNELS = {"sdpa": "SDPA_FLASH", "cudnn": "CUDNN", "flash_attn_4": "FLASH_4"}
"""Our names -> members of xfuser's AttentionBackendType; flash_attn is FLASH_3 or FLASH."""


class XfuserSequenceParallel(SequenceParallel):
    """`SequenceParallel` whose attention is xfuser's."""

    def __init__(self, mesh: Mesh, attention: str, *, num_heads: int, device: str) -> None:
        """Collective. Raises ValueError where xfuser is missing or cannot run."""
        super().__init__(mesh, attention)
        self.kernel = xfuser_kernel(attention, mesh.dims, device=device)
        self.usp = _start(mesh, self.kernel, num_heads=num_heads, device=device)

    def attention(self, q_BNHD: Tensor, k_BNHD: Tensor, v_BNHD: Tensor, num_tokens: int) -> Tensor:
        """As `SequenceParallel.attention`; under a ring the tokens must divide."""
        if self.degree == 1:
            return super().attention(q_BNHD, k_BNHD, v_BNHD, num_tokens)
        padded = q_BNHD.shape[1] * self.degree
        if padded != num_tokens and self.mesh.dims.ring_degree > 1:
            raise ValueError(
                f"{num_tokens} tokens % (ring {self.mesh.dims.ring_degree} * ulysses"
                f" {self.mesh.dims.ulysses_degree}) = {num_tokens % self.degree} != 0: xfuser's"
                " ring would attend to padding; use parallel backend own or ring 1"
            )
        q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BNHD, v_BNHD))
        cut = {"valid_kv_len": num_tokens} if padded != num_tokens else None
        out_BHND = self.usp(q, k, v, attention_kwargs=cut)
        return out_BHND.transpose(1, 2)


def xfuser_kernel(attention: str, dims: ParallelDims, *, device: str) -> str:
    """The name, in xfuser, of a kernel of ours. Raises ValueError for one it cannot use."""
    name = attention
    if name == "auto":
        like = torch.empty(0, dtype=torch.bfloat16, device=device)
        name = resolve_backend("auto", like, among=KERNELS)
        if name == "flash_attn_4" and dims.ring_degree > 1:
            name = "cudnn"  # xfuser does not ask FlashAttention 4 for its log-sum-exp
    check_backends(attention=name, parallel_backend="xfuser", ring_degree=dims.ring_degree)
    if name == "flash_attn":
        return "FLASH_3" if importlib.util.find_spec("flash_attn_interface") else "FLASH"
    return KERNELS[name]


def _start(mesh: Mesh, kernel: str, *, num_heads: int, device: str) -> Any:
    """Makes xfuser's groups beside ours, on the same ranks; its USP function. Raises ValueError
    where there is no device for it."""
    distributed, config, usp = _import()
    dims = mesh.dims
    if distributed.model_parallel_is_initialized():  # there is one set of groups in a process
        importlib.import_module(distributed.__name__ + ".parallel_state").destroy_model_parallel()
    # Ranks are numbered alike: cfg outside, ring, Ulysses inside.
    local_rank = torch.device(device).index or 0
    try:
        distributed.init_distributed_environment(
            world_size=dims.world_size, rank=mesh.rank, local_rank=local_rank
        )
    except RuntimeError as error:  # PyTorch for CUDA, but no GPU
        raise _not_here("started", error) from error
    distributed.initialize_model_parallel(
        classifier_free_guidance_degree=2 if dims.cfg_parallel else 1,
        sequence_parallel_degree=dims.sp_degree,
        ulysses_degree=dims.ulysses_degree,
        ring_degree=dims.ring_degree,
    )
    options = config.xFuserArgs(
        ulysses_degree=dims.ulysses_degree,
        ring_degree=dims.ring_degree,
        use_cfg_parallel=dims.cfg_parallel,
        attention_backend=kernel,
    )
    engine_config, _ = options.create_config()
    # The runtime state wants a pipeline for the number of heads that its transformer has.
    transformer = types.SimpleNamespace(config=types.SimpleNamespace(num_attention_heads=num_heads))
    distributed.initialize_runtime_state(
        types.SimpleNamespace(transformer=transformer), engine_config
    )
    return usp.USP


def _import() -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("xfuser") is None:
        raise ValueError(
            "parallel backend xfuser is not installed: pip install 'wan-serve[xfuser]',"
            " or use parallel backend own"
        )
    names = ("xfuser.core.distributed", "xfuser.config", "xfuser.model_executor.layers.usp")
    try:
        return tuple(importlib.import_module(name) for name in names)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise _not_here("imported", error) from error


def _not_here(done: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"parallel backend xfuser cannot be {done} ({reason}): it needs a CUDA device and"
        " Triton; use parallel backend own elsewhere"
    )
