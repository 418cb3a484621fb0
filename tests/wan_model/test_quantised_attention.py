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


def unswizzled(rows):
    """[..., R, 128] bytes whose 16-byte piece c of row r lies at place c ^ (r % 8)."""
    row = torch.arange(rows.shape[-2], device=rows.device)[:, None] % 8
    piece = torch.arange(8, device=rows.device)[None] ^ row
    pieces = rows.view(torch.uint8).unflatten(-1, (8, 16))
    whole = pieces.gather(-2, piece[..., None].expand(pieces.shape))
    return whole.flatten(-2).view(rows.dtype)


def attended(operands, means, num_queries, head_dim):
    """What attention_fp8_hopper.cu makes of its operands, block after block: [B, L, H, D]."""
    q = unswizzled(operands.q).float() * operands.q_scale[..., None]
    place = torch.arange(128, device=q.device)
    key = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    highest = q.new_full((*q.shape[:2], 1), -torch.inf)
    out = q.new_zeros(*q.shape[:2], 136)
    for i in range(operands.k.shape[1]):
        k = unswizzled(operands.k[:, i]).float() * operands.k_scale[:, i, None, None]
        scores = q @ k.transpose(-1, -2)
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        p = torch.exp2(scores - highest + 8).clamp_max(ops.FP8_MAX).to(ops.FP8).float()
        values = unswizzled(operands.v[:, i]).float().transpose(-1, -2)
        out = out * torch.exp2(before - highest) + p[..., key] @ values
    b, h = means.k.shape[:2]
    out = (out[..., :head_dim] / out[..., 128:129])[:, :num_queries].unflatten(0, (b, h))
    return (out * means.v_scale[:, :, None] + means.v[:, :, None]).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_operands_laid_out_for_the_gpu_are_the_defined_ones(monkeypatch, shape):
    use_kernels(monkeypatch, ops)
    from wan_model import quantised_attention_kernels

    q, k, v = tensors(*shape)
    means = ops._means(k, v)
    made = attended(quantised_attention_kernels.lay_out(q, k, v, means), means, shape[1], shape[4])
    expected = ops._definition(q, k, v, means)
    assert relative_rms(made, expected) < 0.005  # a score at the edge of two roundings


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (1, 200, 5000, 2, 128)])
def test_the_kernel_computes_what_is_defined(shape):
    q, k, v = tensors(*shape)
    expected = ops._definition(q, k, v, ops._means(k, v))
    made = ops.quantised_attention(q, k, v)
    assert relative_rms(made, expected) < 0.01  # bfloat16, and sums of about 14 bits
    assert (made - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_over_many_keys_the_kernel_keeps_fewer_bits_than_is_defined():
    """Values without a mean: their averages nearly vanish beside what is added up."""
    q, k, v = tensors(1, 200, 32_760, 2, 128)
    v -= v.mean(1, keepdim=True)
    made, exact = ops.quantised_attention(q, k, v), exactly(q, k, v)
    assert relative_rms(made, exact) < 0.08  # 0.062 was seen


def test_parts_of_one_tensor_are_laid_out_like_whole_ones(monkeypatch):
    """As the fused blocks have them: q, k and v between each other."""
    use_kernels(monkeypatch, ops)
    from wan_model import quantised_attention_kernels

    parts = torch.stack(tensors(1, 150, 150, 2, 32), dim=2).unbind(2)
    assert not parts[0].is_contiguous()
    means = ops._means(*parts[1:])
    whole = quantised_attention_kernels.lay_out(*(part.contiguous() for part in parts), means)
    made = quantised_attention_kernels.lay_out(*parts, means)
    for name in ("q", "q_scale", "k", "k_scale", "v"):
        got, expected = (getattr(x, name).view(torch.uint8) for x in (made, whole))
        assert torch.equal(got, expected)


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


@pytest.mark.parametrize("head_dim", [130, 33])
def test_a_head_dim_without_a_kernel_is_one_sentence(monkeypatch, head_dim):
    use_kernels(monkeypatch, ops)
    from wan_model import quantised_attention_kernels

    q, k, v = tensors(1, 8, 8, 1, head_dim)
    with pytest.raises(ValueError, match=f"fp8 knows an even head_dim up to 128, not {head_dim}"):
        quantised_attention_kernels.lay_out(q, k, v, ops._means(k, v))


def test_a_sequence_is_attended_to_by_it_and_a_ring_is_refused():
    q, k, v = tensors(1, 70, 20, 2, 32)
    sp = SequenceParallel(attention_backend="fp8")
    assert torch.equal(sp.attention(q, k, v, 20), ops.quantised_attention(q, k, v))
    with pytest.raises(ValueError, match="fp8 gives no log-sum-exp"):
        check_backends(attention="fp8", parallel_backend="own", ring_degree=2)
    with pytest.raises(ValueError, match="fp8 is not known to xfuser"):
        check_backends(attention="fp8", parallel_backend="xfuser", ring_degree=1)


def test_it_passes_the_check_that_every_kernel_passes_before_it_is_believed():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    check_kernel("fp8", device=DEVICE, dtype=dtype, head_dim=128, needs_lse=False)
