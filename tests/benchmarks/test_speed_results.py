"""The measures of quality, and how the stored speed results are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plot import decodes, draw, loading
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


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["step-h200", "vae-h200", "load-h200"])
def test_the_stored_results_can_be_drawn(tmp_path: Path, name: str) -> None:
    draw(stored(name), tmp_path / "figure.png")
    picture = (tmp_path / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


@pytest.mark.parametrize("name", ["row-kernels-h200", "overhead"])
def test_results_of_another_benchmark_are_not_drawn(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not those of step, vae or load"):
        draw(stored(name), tmp_path / "figure.png")


def test_the_stored_forwards_have_all_fields() -> None:
    for row in stored("step-h200")["rows"]:
        assert row["case"] in ("480p", "720p", "ti2v-704p")
        assert row["precision"] in ("bf16", "fp8", "fp8-attention")
        assert min(row["seconds"], row["peak_bytes"], row["error"]) > 0


def test_every_stored_decode_has_a_bar_beside_diffusers() -> None:
    content = stored("vae-h200")
    _, panels = decodes(content)
    assert sum(len(bars) for bars in panels.values()) == len(content["rows"])
    for bars in panels.values():
        assert {bar.name.split()[0] for bar in bars} == {"ours", "diffusers"}


def test_a_load_is_drawn_as_a_share_of_reading_the_same_source() -> None:
    speeds = {"read cold": 2.0, "load cold": 1.5, "read cached": 20.0, "pinned copy": 50.0}
    speeds |= {"load cached, 16 readers": 10.0, "load cached, 1 readers": 15.0, "write": 1.0}
    rows = [{"what": what, "gb_per_s": speed} for what, speed in speeds.items()]
    _, panels = loading({"rows": rows})
    notes = {title: [bar.note for bar in bars] for title, bars in panels.items()}
    assert notes == {
        "from the disk": ["", "75 %\nof read"],
        "from the page cache": ["", "75 %\nof read", "50 %\nof read"],
        "to the GPU": [""],
    }
