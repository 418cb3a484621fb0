"""The names of attention kernels, parallel implementations and precisions, and what fits what.

Owns the rules that can be told from names alone, so that a config file is refused before a GPU is
asked for. The kernels are in attention.py, the implementations in parallel.py and
xfuser_backend.py. Pure: no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Attention = Literal["auto", "sdpa", "cudnn", "flash_attn", "flash_attn_4", "hopper", "sage", "fp8"]
ParallelBackend = Literal["own", "xfuser"]
Precision = Literal["bf16", "fp8"]
"""Of the large products of the blocks: "bf16" is the weights' dtype, whichever that is."""

ATTENTION_BACKENDS: tuple[str, ...] = get_args(Attention)
PARALLEL_BACKENDS: tuple[str, ...] = get_args(ParallelBackend)
PRECISIONS: tuple[str, ...] = get_args(Precision)

WITHOUT_LSE = {"own": {"sage", "fp8"}, "xfuser": {"sage", "fp8", "flash_attn_4"}}
"""Per parallel implementation the kernels that give it no log-sum-exp, which a ring needs.

SageAttention 1.0 and our quantised kernel have none. FlashAttention 4 has one, but xfuser 0.7 does
not ask it for it.
"""


def check_backends(*, attention: str, parallel_backend: str, ring_degree: int) -> None:
    """Raises ValueError, in one sentence, for names that do not exist or do not go together."""
    for name, known in ((attention, ATTENTION_BACKENDS), (parallel_backend, PARALLEL_BACKENDS)):
        if name not in known:
            kind = "attention" if known is ATTENTION_BACKENDS else "parallel"
            raise ValueError(f"unknown {kind} backend {name!r}: use one of {', '.join(known)}")
    without = WITHOUT_LSE[parallel_backend]
    if ring_degree > 1 and attention in without:
        having = [name for name in ATTENTION_BACKENDS[1:] if name not in without]
        owner = "" if parallel_backend == "own" else f" under {parallel_backend}"
        raise ValueError(
            f"attention backend {attention} gives no log-sum-exp{owner}, which ring {ring_degree}"
            f" needs: use one of {', '.join(having)}, or ring 1"
        )
    if parallel_backend == "xfuser" and attention == "sage":
        raise ValueError(
            "attention backend sage does not work under xfuser, which expects SageAttention 2:"
            " use another one, or parallel backend own"
        )
    if parallel_backend == "xfuser" and attention in ("hopper", "fp8"):
        raise ValueError(
            f"attention backend {attention} is not known to xfuser: use another one, or parallel"
            " backend own"
        )


def check_precision(precision: str, *, dtype: str, shard_weights: bool, offload: bool) -> None:
    """Raises ValueError, in one sentence, for what fp8 products do not go together with.

    `dtype` as in an expert's options; "float32" is an error with fp8, whose results are bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if precision != "fp8":
        return
    for option, chosen in (("shard_weights", shard_weights), ("offload", offload)):
        if chosen:
            raise ValueError(f"precision fp8 and {option} exclude each other: choose one")
    if dtype == "float32":
        raise ValueError("precision fp8 gives bfloat16 results: leave out dtype float32")
