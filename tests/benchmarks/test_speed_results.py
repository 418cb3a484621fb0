"""The measures of quality, and how the stored speed results are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plot import decodes, draw, loading
from benchmarks.quality import psnr_db, ssim

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SPEED = (ROOT / "README.md").read_text().split("## Speed on one H200", 1)[1]


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


# ------------------------------------------------------------------------- the README's tables


def table(first_cell: str) -> list[list[str]]:
    """The cells of each row of the README's table that begins so."""
    lines = SPEED.split(f"| {first_cell}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_readmes_forwards_are_the_stored_ones() -> None:
    stored_rows = stored("step-h200")["rows"]
    rows = {(row["case"], row["precision"], row["impl"]): row for row in stored_rows}
    columns = [
        ("fp8-attention", "ours"), ("fp8", "ours"), ("bf16", "ours"),
        ("bf16", "diffusers-compiled"), ("bf16", "diffusers-eager"),
    ]  # fmt: skip
    *forwards, memory, error = table("| ours, fp8 and `attention: fp8` |")
    for case, (_, *cells) in zip(("480p", "720p", "ti2v-704p"), forwards, strict=True):
        made = [rows[case, *column] for column in columns]
        assert cells[:5] == [f"{row['seconds']:.2f} s" for row in made], case
        ours, compiled = made[2:4]
        assert cells[5] == f"{ours['seconds'] / compiled['seconds']:.2f}"
    made = [rows["480p", *column] for column in columns]
    assert memory[1:6] == [f"{row['peak_bytes'] / 1e9:.1f} GB" for row in made]
    told = [float(cell.removesuffix(" %")) for cell in error[1:6]]
    assert told == [float(f"{100 * row['error']:.2g}") for row in made]


def test_the_gpu_does_not_wait_in_a_stored_forward() -> None:
    content = stored("step-h200")
    rows = {(r["case"], r["precision"]): r for r in content["rows"] if r["impl"] == "ours"}
    shares = []
    for profile in content["profile"]:
        kernels_s = sum(kernel["ms"] for kernel in profile["kernels"]) / 1000
        shares.append(kernels_s / rows[profile["case"], profile["precision"]]["seconds"])
    assert len(shares) == 3
    assert f"{100 * min(shares):.1f} to {100 * max(shares):.1f} % in all three precisions" in SPEED


def test_the_readmes_decodes_are_the_stored_ones() -> None:
    rows = {
        (row["case"], row["impl"]): f"{row['seconds']:.2f} s, {row['peak_bytes'] / 1e9:.1f} GB"
        for row in reversed(stored("vae-h200")["rows"])  # the first of a case and implementation
    }
    for case, (_, *cells) in zip(
        ("2.1 1280x720x81", "2.2 1280x704x121"), table("decoding a video"), strict=True
    ):
        assert cells == [rows[case, "ours"], rows[case, "diffusers"]]


def test_the_readmes_jobs_are_the_stored_ones() -> None:
    order = {"bf16": 0, "fp8": 1, "fp8-attention": 2}
    rows = sorted(
        stored("job-h200")["rows"], key=lambda row: (row["case"], order[row["precision"]])
    )
    cells = table("whole jobs, models loaded")
    assert len(cells) == len(rows)
    for row, (name, *numbers) in zip(rows, cells, strict=True):
        stages = row["stages"]
        denoising = sum(seconds for stage, seconds in stages.items() if "expert" in stage)
        told = (row["seconds"], denoising, stages["decode and mp4"])
        assert numbers == [f"{seconds:.1f}" for seconds in told]
        kind = {"bf16": "bf16", "fp8": "fp8", "fp8-attention": "fp8 and `attention: fp8`"}
        assert name.endswith(kind[row["precision"]])


def test_the_readmes_quality_is_the_stored_one() -> None:
    rows = [row for row in stored("quality")["rows"] if row["num_steps"] == 40]
    told = table("experts in |")
    order = ["bf16", "fp8", "fp8-attention", "float32, VAE bf16", 0.03, 0.07]
    by_kind = {row.get("cache") or row["precision"]: row for row in rows}
    for kind, (_, forward, latents, psnr, ssims, judged) in zip(order, told, strict=True):
        row = by_kind[kind]
        for cell, name in ((forward, "forward_error"), (latents, "trajectory_error")):
            told_error = float(cell.removesuffix(" %")) if cell else 0
            assert told_error == float(f"{100 * row.get(name, 0):.2g}"), (kind, name)
        assert psnr == f"{row['psnr_db']:.1f} / {row['lowest_psnr_db']:.1f} dB"
        assert ssims == f"{row['ssim']:.3f} / {row['lowest_ssim']:.3f}"
        assert judged == f"{12 * row['all']:.0f} of 12"


def test_the_readmes_trajectories_are_the_stored_ones() -> None:
    rows = {
        (row["case"], row["precision"]): row
        for name in ("trajectories-h200", "job-h200")
        for row in stored(name)["rows"]
    }
    titles = list(dict.fromkeys(case for case, _ in rows))
    told = table("trajectories at full size")
    for title, (_, beside, *cells) in zip(titles, told, strict=True):
        assert rows[title, beside]["trajectory_error"] == 0
        for precision, cell in zip(("bf16", "fp8", "fp8-attention"), cells, strict=True):
            told_error = float(cell.removesuffix(" %") or 0)
            error = rows[title, precision]["trajectory_error"]
            assert told_error == float(f"{100 * error:.2g}")
    for precision, precise in (("bf16", "197.5"), ("fp8", "158.3"), ("fp8-attention", "132.3")):
        assert f"{rows[titles[0], precision]['seconds']:.1f}" == precise
        assert f"{precise} s" in SPEED


def test_the_readmes_scaling_is_the_stored_one() -> None:
    rows = {(row["impl"], row["way"]): row for row in stored("parallel-h200x2")["rows"]}
    expected = []
    ours = [("ours", way) for way in ("ulysses", "ring", "cfg")]
    for impl, way in (*ours, ("diffusers", "ulysses")):
        alone, both = rows[impl, "one GPU"]["seconds"] * (1 + (way == "cfg")), rows[impl, way]
        error = f"{100 * both['relative_rms_error']:.2g}".removesuffix(".0")
        scaling = f"{100 * both['scaling']:.1f} %"
        expected.append([f"{alone:.2f} s", f"{both['seconds']:.2f} s", scaling, error])
    told = [row[1:] for row in table("| one GPU | two GPUs |")]
    assert [[*row[:3], row[3].removesuffix(" %")] for row in told] == expected


def test_the_readmes_comparison_with_xfuser_is_the_stored_one() -> None:
    rows = {(row["impl"], row["way"]): row for row in stored("xfuser-h200x2")["rows"]}
    told = {impl: cells for impl, *cells in table("| one GPU | Ulysses 2 | ring 2 |")}
    for (impl, way), row in rows.items():
        name = {"xfuser": "xfuser, on our networks", "diffusers": "Diffusers"}.get(impl, impl)
        cells = told[name]
        assert cells[("one GPU", "ulysses", "ring").index(way)] == f"{row['seconds']:.3f} s"


def test_the_readmes_precisions_of_a_group_are_the_stored_ones() -> None:
    rows = {(row["name"], row["way"]): row for row in stored("precisions-h200x2")["rows"]}
    names = ("bf16 hopper", "fp8", "fp8, attention fp8", "bf16 plain blocks")
    *told, (_, _, seconds, scaling, error) = table("| one GPU | Ulysses 2 | scaling | difference |")
    for name, (_, *cells) in zip(names, told, strict=True):
        one, two = rows[name, "one GPU"], rows[name, "ulysses 2"]
        assert cells[:2] == [f"{row['seconds']:.3f} s" for row in (one, two)]
        assert cells[2:] == [f"{100 * two['scaling'][name]:.1f} %", "0"]
        assert two["relative_rms"][name] == 0
    sharded = rows["bf16 fsdp", "ulysses 2"]
    beside = sharded["scaling"]["bf16 plain blocks"]
    assert (seconds, scaling) == (f"{sharded['seconds']:.3f} s", f"{100 * beside:.1f} %")
    assert error == "0" and sharded["relative_rms"]["bf16 plain blocks"] == 0


def test_the_readmes_layouts_are_the_stored_ones() -> None:
    content = stored("headline-h200x2")
    names = ("split 1:1", "2 whole models", "one group")
    for row, name, (_, *cells) in zip(
        content["throughput"], names, table("layout | ready after"), strict=True
    ):
        found = row["figures"]
        high, low = (found["stages"][f"{e}NoiseExpert"]["call_s"]["mean"] for e in ("High", "Low"))
        busiest = max(stage["busy_share"] for stage in found["stages"].values())
        assert row["layout"] == name and found["num_completed"] == 6
        assert cells == [
            f"{row['start_s']:.0f} s", f"{found['jobs_per_hour']:.0f}",
            f"{found['latency_s']['p95']:.1f} s", f"{high:.1f} and {low:.1f} s",
            f"{100 * busiest:.0f} %",
        ]  # fmt: skip
    recovery = content["recovery"]
    assert f"{recovery['seconds_to_recovery']:.1f} s, {recovery['num_lost']} of" in SPEED
    assert recovery["num_jobs"] == 18
    told = {"split 1:1, after the recovery": 696, "2 whole models": 609, "one group": 533}
    for name, ended in content["decodes_ended_s"].items():
        at_once = 2 if name == "2 whole models" else 1  # they leave in pairs
        every_s = (ended[-1] - ended[at_once - 1]) / (len(ended) - at_once)
        assert round(3600 / every_s) == told[name] and str(told[name]) in SPEED
