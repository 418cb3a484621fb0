"""The quantised attention: near to attention, and the kernels equal to their definition."""

import pytest
import torch
from triton_kernels import DEVICE, use_kernels

from wan_model import quantised_attention as ops
from wan_model.attention import check_kernel
from wan_model.backends import check_backends
from wan_model.parallel import SequenceParallel

SHAPES = [(1, 160, 160, 2, 128), (2, 70, 300, 3, 32), (1, 640, 640, 1, 64)]  # B, L, S, H, D


def tensors(b, num_queries, num_keys, h, d, dtype=torch.float32):
    """Keys and values as models have them: with a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, n, h, d, generator=generator) for n in (num_queries, num_keys, num_keys)
    )
    k += 3 * torch.randn(d, generator=generator)
    v += torch.randn(d, generator=generator)
    return [x.to(DEVICE, dtype) for x in (q, k, v)]


def exactly(q, k, v):
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v.double())


def relative_rms(got, expected):
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_within_what_fp8_can_hold(monkeypatch, shape):
    monkeypatch.setattr(ops, "_uses_kernels", lambda x: False)
    q, k, v = tensors(*shape)
    expected = exactly(q, k, v)
    around_mean = expected - v.double().mean(1, keepdim=True)
    assert (ops.quantised_attention(q, k, v) - expected).square().mean().sqrt() < (
        0.05 * around_mean.square().mean().sqrt()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_compute_what_is_defined(monkeypatch, shape):
    q, k, v = tensors(*shape)
    monkeypatch.setattr(ops, "_uses_kernels", lambda x: False)
    expected = ops.quantised_attention(q, k, v)
    use_kernels(monkeypatch, ops)
    made = ops.quantised_attention(q, k, v)
    assert relative_rms(made, expected) < 0.005  # a score at the edge of two roundings
    assert (made - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_kernels_take_parts_of_one_tensor(monkeypatch):
    """As the fused blocks have them: q, k and v between each other."""
    use_kernels(monkeypatch, ops)
    parts = torch.stack(tensors(1, 150, 150, 2, 32), dim=2).unbind(2)
    assert not parts[0].is_contiguous()
    whole = ops.quantised_attention(*(part.contiguous() for part in parts))
    assert torch.equal(ops.quantised_attention(*parts), whole)


@pytest.mark.parametrize("without", ["k", "v"])
def test_without_a_mean_taken_off_the_error_grows(monkeypatch, without):
    monkeypatch.setattr(ops, "_uses_kernels", lambda x: False)
    q, k, v = tensors(1, 160, 160, 2, 128)
    k, v = k + 100, v + 100
    expected, means = exactly(q, k, v), ops._means(k, v)
    error = relative_rms(ops._definition(q, k, v, means), expected)
    getattr(means, without).zero_()
    if without == "v":
        means.v_scale.copy_(v.abs().amax(1) / ops.FP8_MAX)
    assert relative_rms(ops._definition(q, k, v, means), expected) > 3 * error


def test_a_head_dim_without_a_kernel_is_one_sentence(monkeypatch):
    use_kernels(monkeypatch, ops)
    with pytest.raises(ValueError, match="fp8 knows head_dim 32, 64, 128, not 48"):
        ops.quantised_attention(*tensors(1, 8, 8, 1, 48))


def test_a_text_is_attended_to_exactly_and_a_ring_is_refused():
    q, k, v = tensors(1, 70, 20, 2, 32)
    sp = SequenceParallel(attention_backend="fp8")
    torch.testing.assert_close(
        sp.cross_attention(q, k, v).double(), exactly(q, k, v), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(sp.attention(q, k, v, 20), ops.quantised_attention(q, k, v))
    with pytest.raises(ValueError, match="fp8 gives no log-sum-exp"):
        check_backends(attention="fp8", parallel_backend="own", ring_degree=2)
    with pytest.raises(ValueError, match="fp8 is not known to xfuser"):
        check_backends(attention="fp8", parallel_backend="xfuser", ring_degree=1)


def test_it_passes_the_check_that_every_kernel_passes_before_it_is_believed():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    check_kernel("fp8", device=DEVICE, dtype=dtype, head_dim=128, needs_lse=False)
