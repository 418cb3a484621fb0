"""xfuser 0.7 as far as we call it, on gloo: the same names and signatures, and the true result.

`install()` puts it where `import` finds it; `calls` then holds what its set-up was told.
"""

import importlib.machinery
import sys
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist

calls = {}


def init_distributed_environment(
    world_size=-1, rank=-1, distributed_init_method="env://", local_rank=-1, backend=None
):
    assert local_rank != -1, "it would be read from the environment"
    calls["environment"] = (world_size, rank, local_rank)


def initialize_model_parallel(
    data_parallel_degree=1, classifier_free_guidance_degree=1, sequence_parallel_degree=None,
    ulysses_degree=1, ring_degree=1, tensor_parallel_degree=1, pipeline_parallel_degree=1,
    fully_shard_degree=1, vae_parallel_size=0, use_parallel_vae=False, backend=None,
):  # fmt: skip
    assert sequence_parallel_degree == ulysses_degree * ring_degree
    assert "degrees" not in calls, "the real one asserts that it has no groups yet"
    calls["degrees"] = (classifier_free_guidance_degree, ring_degree, ulysses_degree)


def model_parallel_is_initialized():
    return "degrees" in calls


def destroy_model_parallel():
    del calls["degrees"]


def initialize_runtime_state(pipeline=None, engine_config=None):
    assert engine_config.ulysses_degree * engine_config.ring_degree * (
        2 if engine_config.use_cfg_parallel else 1
    ) == dist.get_world_size(), "the real one asserts this, in create_config"  # fmt: skip
    calls["runtime"] = (
        engine_config.attention_backend, pipeline.transformer.config.num_attention_heads,
    )  # fmt: skip


@dataclass
class xFuserArgs:
    model: str = ""
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    use_cfg_parallel: bool = False
    attention_backend: str | None = None

    def create_config(self):
        return self, None


def USP(
    query, key, value, dropout_p=0.0, is_causal=False, joint_query=None, joint_key=None,
    joint_value=None, joint_strategy=None, attn_layer=None, combine_qkv_a2a=None, backend=None,
    attention_kwargs=None, head_balance_layer=None, kv_head_repeat=1,
):  # fmt: skip
    """[B, H, S / ranks, D] each; keys after `valid_kv_len` are cut off, as in the real one."""
    calls["num_usp"] = calls.get("num_usp", 0) + 1
    parts = []
    for x in (query, key, value):
        parts.append([torch.empty_like(x).contiguous() for _ in range(dist.get_world_size())])
        dist.all_gather(parts[-1], x.contiguous())
    q, k, v = (torch.cat(part, dim=2) for part in parts)
    num_keys = (attention_kwargs or {}).get("valid_kv_len", k.shape[2])
    k, v = k[:, :, :num_keys], v[:, :, :num_keys]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]


MODULES = {
    "xfuser": {},
    "xfuser.core": {},
    "xfuser.core.distributed": {
        f.__name__: f
        for f in (
            init_distributed_environment, initialize_model_parallel,
            model_parallel_is_initialized, initialize_runtime_state,
        )
    },
    "xfuser.core.distributed.parallel_state": {"destroy_model_parallel": destroy_model_parallel},
    "xfuser.config": {"xFuserArgs": xFuserArgs},
    "xfuser.model_executor": {},
    "xfuser.model_executor.layers": {},
    "xfuser.model_executor.layers.usp": {"USP": USP},
}  # fmt: skip


def install():
    for name, contents in MODULES.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module
