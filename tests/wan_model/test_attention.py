"""Kernels of other packages: called as they want to be called, and not believed without a look.

The packages need a GPU; attention_packages.py stands in for them with the same signatures.
"""

from types import SimpleNamespace

import attention_packages
import pytest
import torch

from wan_model import hopper_attention, xfuser_backend
from wan_model.attention import attention, attention_with_lse, check_kernel, resolve_backend
from wan_model.backends import check_backends
from wan_model.engine import ExpertEngine

HERE = {"device": "cpu", "dtype": torch.float32, "head_dim": 16}
BACKENDS = {
    "flash_attn 2": "flash_attn",
    "flash_attn 3": "flash_attn",
    "flash_attn_4": "flash_attn_4",
    "sage": "sage",
}


@pytest.fixture(autouse=True)
def forget_checks():
    yield
    check_kernel.cache_clear()


def tensors():
    """More queries than keys, so that a swapped pair or layout cannot go unseen."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(2, length, 3, 16, generator=draw) for length in (9, 7, 7)]


@pytest.mark.parametrize("package", BACKENDS)
def test_a_package_is_called_as_it_wants_to_be(monkeypatch, package):
    attention_packages.install(monkeypatch, package)
    q, k, v = tensors()
    expected, lse_BHL = attention_packages.definition(q, k, v)
    keys = k.clone()
    backend = BACKENDS[package]
    torch.testing.assert_close(attention(q, k, v, backend), expected)
    assert torch.equal(k, keys), "text keys are used again in the next step"
    if backend != "sage":
        out, lse = attention_with_lse(q, k, v, backend)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, lse_BHL.transpose(1, 2))
    check_kernel(backend, **HERE, needs_lse=backend != "sage")


def test_flash_attention_3_goes_before_2(monkeypatch):
    attention_packages.install(monkeypatch, "flash_attn 2", flash_attn_func=None)
    attention_packages.install(monkeypatch, "flash_attn 3")
    q, k, v = tensors()
    expected, _ = attention_packages.definition(q, k, v)
    torch.testing.assert_close(attention(q, k, v, "flash_attn"), expected)


@pytest.mark.parametrize(
    ("backend", "what"),
    [("flash_attn", "pip install flash-attn"), ("flash_attn_4", "pip install flash-attn-4"),
     ("sage", "pip install sageattention")],
)  # fmt: skip
def test_a_package_that_is_missing_is_one_sentence(backend, what):
    with pytest.raises(ValueError, match=f"{backend} is not installed: .*{what}") as caught:
        check_kernel(backend, **HERE, needs_lse=False)
    assert "\n" not in str(caught.value)


def zero_lse(q, k, v, **_):
    out, lse = attention_packages.definition(q, k, v)
    return out, torch.zeros_like(lse), None


def lse_of_wrong_shape(q, k, v, **_):
    out, lse = attention_packages.definition(q, k, v)
    return out, lse.transpose(1, 2), None


def zeros(q, k, v, **_):
    return torch.zeros_like(q)


def fails(q, k, v, **_):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nsee the docs")


@pytest.mark.parametrize(
    ("function", "needs_lse", "message"),
    [
        (zero_lse, True, "returns log-sum-exp with an error of 100 %"),
        (lse_of_wrong_shape, True, "returns log-sum-exp of shape"),
        (zeros, False, "returns attention with an error of 100 %"),
        (fails, False, "cannot run here .*head_dim 16.*: FlashAttention only supports Ampere"),
    ],
)
def test_a_kernel_that_returns_something_else_is_refused(monkeypatch, function, needs_lse, message):
    attention_packages.install(monkeypatch, "flash_attn 2", flash_attn_func=function)
    with pytest.raises(ValueError, match=message) as caught:
        check_kernel("flash_attn", **HERE, needs_lse=needs_lse)
    assert "\n" not in str(caught.value)


def test_an_expert_looks_at_its_kernel_before_it_loads_its_weights(monkeypatch, tiny):
    attention_packages.install(monkeypatch, "flash_attn 2", flash_attn_func=zeros)
    options = {"checkpoint": str(tiny("t2v-A14B")), "expert": "high_noise", "device": "cpu"}
    with pytest.raises(ValueError, match="returns attention with an error of 100 %"):
        ExpertEngine(**options, attention="flash_attn")
    attention_packages.install(monkeypatch, "flash_attn 3")
    ExpertEngine(**options, attention="flash_attn").warm_up()


def test_a_ring_with_a_kernel_that_has_no_log_sum_exp_is_refused_by_name():
    check_backends(attention="sage", parallel_backend="own", ring_degree=1)
    with pytest.raises(ValueError, match="sage gives no log-sum-exp, which ring 2 needs: use one"):
        check_backends(attention="sage", parallel_backend="own", ring_degree=2)
    with pytest.raises(ValueError, match="flash_attn_4 gives no log-sum-exp under xfuser"):
        check_backends(attention="flash_attn_4", parallel_backend="xfuser", ring_degree=2)
    with pytest.raises(ValueError, match="sage gives no log-sum-exp"):
        attention_with_lse(*tensors(), "sage")
    with pytest.raises(ValueError, match="unknown parallel backend 'deepspeed': use one of own"):
        check_backends(attention="sdpa", parallel_backend="deepspeed", ring_degree=1)


def test_on_a_gpu_the_fastest_kernel_there_is_is_chosen(monkeypatch):
    like = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(hopper_attention, "fits", lambda q: False)
    assert resolve_backend("auto", like) == "cudnn"
    attention_packages.install(monkeypatch, "flash_attn_4")
    assert resolve_backend("auto", like) == "flash_attn_4"
    assert resolve_backend("cudnn", like) == "cudnn"
    monkeypatch.setattr(hopper_attention, "fits", lambda q: q is like)
    assert resolve_backend("auto", like) == "hopper"
    assert resolve_backend("auto", like, among=xfuser_backend.KERNELS) == "flash_attn_4"
