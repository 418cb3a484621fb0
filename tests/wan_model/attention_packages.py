"""The attention packages as far as we call them, on any device: the same names, the same order of
arguments, the same layouts and results, computed from the definition.

Written from flash-attn 2.8, the flash_attn_interface of FlashAttention 3, flash-attn-4 4.0.0b36 and
sageattention 1.0.6. `install(monkeypatch, name)` puts one where `import` finds it.
"""

import importlib.machinery
import sys
import types

import torch


def definition(q_BLHD, k_BSHD, v_BSHD):
    """(out [B, L, H, D], log-sum-exp [B, H, L])."""
    scores_BHLS = torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD) * q_BLHD.shape[-1] ** -0.5
    out = torch.einsum("bhls,bshd->blhd", scores_BHLS.softmax(-1), v_BSHD)
    return out, scores_BHLS.logsumexp(-1)


def flash_attn_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, softmax_scale, causal) == (0.0, None, False)
    out, lse = definition(q, k, v)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert (softmax_scale, causal, qv) == (None, False, None)
    out, lse = definition(q, k, v)
    return (out, lse) if return_attn_probs else out


def flash_attn_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, return_lse=False,
):  # fmt: skip
    """Returns a pair always; the second is None unless it was asked for."""
    assert (qv, gather_kv_indices, softmax_scale, causal) == (None, None, None, False)
    out, lse = definition(q, k, v)
    return out, (lse if return_lse else None)


def sage_1(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **ignored):
    """Changes `k`, and takes `return_lse` without heeding it, as the real one does."""
    assert (is_causal, sm_scale) == (False, None)
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k -= k.mean(dim=1, keepdim=True)
    out, _ = definition(q, k, v)
    return out if tensor_layout == "NHD" else out.transpose(1, 2)


PACKAGES = {
    "flash_attn 2": {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {"flash_attn_func": flash_attn_2},
    },
    "flash_attn 3": {"flash_attn_interface": {"flash_attn_func": flash_attn_3}},
    "flash_attn_4": {"flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_attn_4}},
    "sage": {"sageattention": {"sageattn": sage_1}},
}


def install(monkeypatch, package, **replaced):
    """Module name -> its contents; `replaced` functions stand in for the named ones."""
    for name, contents in PACKAGES[package].items():
        add_module(monkeypatch, name, **{n: replaced.get(n, f) for n, f in contents.items()})


def add_module(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    module.__path__ = []
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
