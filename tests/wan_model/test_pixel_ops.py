"""The pixel operations between the VAE's convolutions: each equals its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_kernels import DEVICE, use_kernels

from wan_model import pixel_ops
from wan_model.fused_vae import phase_weights
from wan_model.vae import duplicate_up

DIM = 12  # no power of two: the kernels mask the rest


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(autouse=True, params=["definition", "kernel"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "kernel":
        use_kernels(monkeypatch, pixel_ops)
    elif DEVICE == "cuda":
        monkeypatch.setattr(pixel_ops, "_uses_kernels", lambda x: False)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_norm_is_of_the_pixel_with_its_bias(has_bias: bool) -> None:
    x, bias, gamma = draw(700, DIM), draw(DIM, seed=1), draw(DIM, seed=2)
    out = torch.empty_like(x)
    pixel_ops.norm_silu(x, bias if has_bias else None, gamma, out)
    total = x + bias if has_bias else x
    expected = F.silu(F.normalize(total, dim=1) * DIM**0.5 * gamma)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_a_sum_has_both_parts_and_the_bias() -> None:
    h, x, bias = draw(700, DIM), draw(700, DIM, seed=1), draw(DIM, seed=2)
    expected = h + x + bias
    pixel_ops.add(h, x, bias)
    torch.testing.assert_close(h, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("in_time", "is_first"), [(False, True), (True, True), (True, False)])
def test_joined_phases_are_a_convolution_of_the_doubled_picture_and_the_repeated_source(
    in_time: bool, is_first: bool
) -> None:
    ft = 1 + in_time
    source = draw(1, 24, 2, 3, 5, seed=1)
    num_dropped = int(in_time and is_first)
    x = draw(2 * ft - num_dropped, DIM, 3, 5, seed=2)
    weight, bias = draw(DIM, DIM, 3, 3, seed=3), draw(DIM, seed=4)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    repeated = duplicate_up(source, out_dim=DIM, in_time=in_time, is_first=is_first)
    expected = expected + repeated[0].transpose(0, 1)
    phases = F.conv2d(x, phase_weights(weight), padding=1).permute(0, 2, 3, 1).contiguous()
    out = pixel_ops.join_phases(
        phases, bias, source[0].permute(1, 2, 3, 0).contiguous(),
        frames_per_source=ft, num_dropped=num_dropped,
    )  # fmt: skip
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected, atol=2e-5, rtol=1e-5)


def test_joined_phases_need_no_source() -> None:
    phases, bias = draw(1, 3, 4, 4 * DIM), draw(DIM, seed=1)
    out = pixel_ops.join_phases(phases, bias, None)
    assert out.shape == (1, 4, 6, DIM)
    torch.testing.assert_close(out[0, 3, 2], phases[0, 2, 1, 2 * DIM : 3 * DIM] + bias)
