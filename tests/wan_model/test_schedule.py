"""The official grids: integers of the published tables, sigmas against Diffusers' formulas."""

import numpy as np
import pytest

from wan_model.config import I2V_A14B, T2V_A14B, TI2V_5B, Expert
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule

T2V_40 = """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915
907 898 888 877 865 852 837 819 799 776 749 717 678 631 571 492 386 235"""
I2V_40 = """999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846 833 818
803 786 768 749 728 706 681 654 624 591 555 514 468 416 356 288 208 113"""
TI2V_50 = """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873
863 854 843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302
241 172 92"""


def schedule(config=T2V_A14B, **given):
    return build_schedule(VideoParams.for_model(config, **given))


@pytest.mark.parametrize(
    ("config", "expected"), [(T2V_A14B, T2V_40), (I2V_A14B, I2V_40), (TI2V_5B, TI2V_50)]
)
def test_timesteps_are_the_official_integers(config, expected):
    assert schedule(config).timesteps == tuple(float(t) for t in expected.split())


def test_sigmas_are_the_official_formula_in_float32():
    base = np.linspace(float(np.float32(0.999)), 0, 41)[:-1]
    expected = (12 * base / (1 + 11 * base)).astype(np.float32)
    sigmas = schedule().sigmas
    assert sigmas[-1] == 0.0
    assert np.abs(np.array(sigmas[:-1]) - expected).max() <= 1e-7


@pytest.mark.parametrize(
    ("steps", "unipc_t2v", "unipc_i2v", "dpm_t2v"),
    [
        (4, 3, 2, 3), (6, 4, 3, 4), (8, 6, 3, 6), (10, 7, 4, 7), (20, 13, 8, 13),
        (30, 19, 11, 19), (40, 26, 15, 26), (50, 32, 18, 32),
    ],
)  # fmt: skip
def test_the_high_noise_expert_takes_the_official_number_of_steps(
    steps, unipc_t2v, unipc_i2v, dpm_t2v
):
    assert schedule(num_steps=steps).boundary_step == unipc_t2v
    assert schedule(I2V_A14B, num_steps=steps).boundary_step == unipc_i2v
    assert schedule(num_steps=steps, solver="dpm++").boundary_step == dpm_t2v


def test_the_official_boundary_lies_between_two_steps():
    made = schedule(num_steps=40)
    first_low = made.boundary_step
    assert made.timesteps[first_low - 1] >= 875 > made.timesteps[first_low]
    assert made.expert_at(first_low - 1) is Expert.HIGH_NOISE
    assert made.expert_at(first_low) is Expert.LOW_NOISE


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_the_boundary_compares_the_truncated_timestep(solver):
    """Only a boundary between two integers tells: 997.8 is below 997.5, being 997."""
    plain = schedule(solver=solver)
    exact = [1000 * sigma for sigma in plain.sigmas]
    step = next(i for i, t in enumerate(exact) if 0.6 < t % 1 < 0.9)
    made = schedule(solver=solver, boundary_ratio=(int(exact[step]) + 0.5) / 1000)
    assert made.boundary_step == step


def test_the_distilled_four_steps_are_shifted_once_and_keep_their_fractions():
    made = schedule(num_steps=4, solver="euler", shift=5.0)
    assert made.sigmas == pytest.approx((1.0, 0.9375, 0.8333333, 0.625, 0.0), abs=1e-7)
    assert made.timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0), abs=1e-3)
    assert made.boundary_step == 2
    assert schedule(I2V_A14B, num_steps=4, solver="euler").boundary_step == 2


def test_dpmpp_starts_at_sigma_one():
    made = schedule(solver="dpm++")
    assert made.sigmas[0] == 1.0
    assert made.timesteps[0] == 1000.0


def test_one_expert_takes_every_step():
    made = schedule(TI2V_5B)
    assert made.boundary_step == made.num_steps == 50


def test_a_hundred_steps_whose_integers_repeat_are_still_a_hundred():
    made = schedule(num_steps=100)
    assert len(set(made.timesteps)) < 100
    assert made.num_steps == 100
    assert all(a > b for a, b in zip(made.sigmas, made.sigmas[1:], strict=False))
