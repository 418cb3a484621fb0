"""The fused row operations: each equals its definition, as a kernel and without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_kernels import DEVICE, use_kernels

from wan_model import row_ops
from wan_model.row_ops import FP8, Change, RowLayout

LAYOUT = RowLayout(num_tokens=5, num_clean=2)
DIM = 48  # three pieces of 16 in the kernels
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture(params=["definition", "kernel"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernel":
        use_kernels(monkeypatch, row_ops)
    elif DEVICE == "cuda":
        monkeypatch.setattr(row_ops, "_uses_kernels", lambda x: False)


def spread(rows_BGD: Tensor) -> Tensor:
    """[2, 2, D] -> [10, D]: two samples of five tokens, of which the first two are clean."""
    return torch.cat([rows_BGD[sample, [0, 0, 1, 1, 1]] for sample in range(2)])


@pytest.mark.usefixtures("either")
def test_a_sum_that_is_not_stored_is_normed_and_made_again_with_the_next_change() -> None:
    x = draw(10, DIM)
    y1, y2 = (draw(10, DIM, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    gate, scale, shift = (draw(2, 2, DIM, seed=s) for s in (4, 5, 6))
    first, second = Change(y=y1, gate=gate), Change(y=y2)
    sum1 = x + spread(gate) * y1.float()
    sum2 = sum1 + y2.float()
    before = x.clone()
    how = {"eps": EPS, "out_dtype": torch.float32}

    out = row_ops.add_norm(x, (first,), scale, shift, LAYOUT, **how, store=False)
    expected = F.layer_norm(sum1, (DIM,), eps=EPS) * spread(scale) + spread(shift)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)

    out = row_ops.add_norm(x, (first, second), scale, shift, LAYOUT, **how)
    expected = F.layer_norm(sum2, (DIM,), eps=EPS) * spread(scale) + spread(shift)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, sum2, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("either")
def test_without_a_change_only_the_norm_is_left() -> None:
    x, one = draw(10, DIM), draw(1, 1, DIM, seed=1)
    layout = RowLayout(num_tokens=5)
    out = row_ops.add_norm(x, (), one, one, layout, eps=EPS, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    expected = F.layer_norm(draw(10, DIM), (DIM,), eps=EPS) * one[0] + one[0]
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=2**-8)


@pytest.mark.usefixtures("either")
def test_queries_and_keys_are_normed_and_rotated_and_values_are_left_alone() -> None:
    qkv = draw(10, 3 * DIM)
    weights = (draw(DIM, seed=1), draw(DIM, seed=2))
    angle = draw(5, 4, seed=3)  # heads of 8
    before = qkv.clone()
    row_ops.norm_rope(qkv, weights, (angle.cos(), angle.sin()), LAYOUT, eps=EPS)
    turn = torch.polar(torch.ones_like(angle), angle).repeat(2, 1)[:, None]
    for i, weight in enumerate(weights):
        normed = F.rms_norm(before[:, i * DIM : (i + 1) * DIM], (DIM,), weight, EPS)
        pairs = torch.view_as_complex(normed.view(10, -1, 4, 2).contiguous())
        expected = torch.view_as_real(pairs * turn).reshape(10, DIM)
        torch.testing.assert_close(qkv[:, i * DIM : (i + 1) * DIM], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(qkv[:, 2 * DIM :], before[:, 2 * DIM :])


@pytest.mark.usefixtures("either")
def test_gelu_is_its_tanh_form() -> None:
    x = draw(10, DIM)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(
        row_ops.gelu(x, out_dtype=torch.float32), expected, atol=1e-6, rtol=1e-5
    )


def test_a_quantised_row_is_within_half_a_step_and_its_largest_value_is_kept() -> None:
    """Definition only: Triton's interpreter rounds to fp8 differently from a GPU."""
    x = draw(10, DIM) * torch.logspace(-6, 6, 10, device=DEVICE)[:, None]
    rows = row_ops.quantise_rows(x.cpu())
    assert rows.values.dtype == FP8
    error = (rows.dequantise() - x.cpu()).abs()
    step = 2.0**-4  # of a float8_e4m3fn: three bits after the first, half of the last
    assert (error <= step * x.cpu().abs() + 2.0**-10 * rows.scale).all()
    largest = x.cpu().abs().amax(1)
    torch.testing.assert_close(rows.dequantise().abs().amax(1), largest)


def test_quantising_after_gelu_is_both() -> None:
    x = draw(10, DIM).cpu()
    joined = row_ops.gelu(x, out_dtype=FP8)
    apart = row_ops.quantise_rows(F.gelu(x, approximate="tanh"))
    assert torch.equal(joined.dequantise(), apart.dequantise())
