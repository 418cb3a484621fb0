"""The measures of quality, and that the stored speed results can be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plot import draw
from benchmarks.quality import psnr_db, ssim

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def noise(seed: int, strength: float) -> np.ndarray:
    return strength * np.random.default_rng(seed).standard_normal((2, 24, 32, 3))


def test_psnr_and_ssim_fall_with_noise_and_are_perfect_for_equal_videos() -> None:
    exact = (128 + noise(0, 30)).clip(0, 255).astype(np.uint8)
    near, far = (
        (exact + noise(1, strength)).round().clip(0, 255).astype(np.uint8) for strength in (4, 30)
    )
    # Noise of 4 and rounding: 10 log10(255^2 / (16 + 1/12)).
    assert psnr_db(near, exact) == pytest.approx(36.07, abs=0.2)
    assert ssim(exact, exact) == pytest.approx(1.0)
    assert 0.95 < ssim(near, exact) < 1 and ssim(far, exact) < 0.7
    assert psnr_db(exact, exact) > 80


def test_the_stored_forwards_have_all_fields_and_can_be_drawn(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "step-h200.json").read_text())
    for row in content["rows"]:
        assert row["case"] in ("480p", "720p", "ti2v-704p")
        assert row["precision"] in ("bf16", "fp8", "fp8-attention")
        assert min(row["seconds"], row["peak_bytes"], row["error"]) > 0
    draw(content, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
