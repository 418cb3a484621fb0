"""What is asked for and when: the arrival process, the mix, the workload file."""

import base64

import pytest

from benchmarks.workload import SMALL_JOB, Weighted, Workload, poisson_arrivals


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_others():
    rate = {"jobs_per_minute": 60, "duration_s": 100}
    assert poisson_arrivals(**rate, seed=1) == poisson_arrivals(**rate, seed=1)
    assert poisson_arrivals(**rate, seed=1) != poisson_arrivals(**rate, seed=2)


def test_arrivals_rise_and_end_before_the_duration():
    arrivals = poisson_arrivals(jobs_per_minute=600, duration_s=50, seed=3)
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0 and arrivals[-1] < 50


def test_arrivals_have_the_mean_and_the_spread_of_a_poisson_process():
    arrivals = poisson_arrivals(jobs_per_minute=60, duration_s=10_000, seed=4)
    # 10,000 arrivals expected with a standard deviation of 100: four of those either way.
    assert 9_600 < len(arrivals) < 10_400
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    # Exponential gaps have variance mean^2; regular ones would have none.
    assert variance == pytest.approx(mean**2, rel=0.1)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rate must be above 0"):
        poisson_arrivals(jobs_per_minute=0, duration_s=10, seed=0)


def test_the_mix_follows_the_weights():
    workload = Workload(
        entries=(
            Weighted(body={"prompt": "a", "model": "often"}, weight=3),
            Weighted(body={"prompt": "b", "model": "seldom"}, weight=1),
        )
    )
    models = [body["model"] for body in workload.bodies(4000, seed=0)]
    assert 0.72 < models.count("often") / 4000 < 0.78


def test_two_runs_of_one_seed_ask_for_the_same_videos_with_other_prompts():
    first = Workload().bodies(5, seed=0, first_index=0)
    second = Workload().bodies(5, seed=0, first_index=5)
    assert [body["seed"] for body in first] == [0, 1, 2, 3, 4]
    without_prompt = [[body | {"prompt": ""} for body in run] for run in (first, second)]
    assert without_prompt[0] == without_prompt[1]
    assert len({body["prompt"] for body in first + second}) == 10


def test_a_seed_that_the_body_gives_is_kept():
    workload = Workload(entries=(Weighted(body={"prompt": "a", "seed": 7}),))
    assert [body["seed"] for body in workload.bodies(2, seed=0)] == [7, 7]


def test_a_workload_file_is_read_with_its_images(tmp_path):
    (tmp_path / "boat.png").write_bytes(b"pixels")
    path = tmp_path / "mix.yaml"
    path.write_text(
        "- weight: 3\n  body: {prompt: 'a circle, take {index}', size: 64x64}\n"
        "- body: {prompt: boat, model: i2v, input_reference: boat.png}\n"
    )
    circle, boat = Workload.read(path).entries
    assert circle == Weighted(weight=3, body={"prompt": "a circle, take {index}", "size": "64x64"})
    assert boat.weight == 1
    data = base64.b64encode(b"pixels").decode()
    assert boat.body["input_reference"] == {"image_url": f"data:image/png;base64,{data}"}


@pytest.mark.parametrize(
    "text", ["", "[]", "a: b", "- body: {}", "- {body: {prompt: a}, weight: 0}", "- {wait: 1}"]
)
def test_a_file_that_is_no_workload_is_refused_by_name(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.yaml"):
        Workload.read(path)


def test_the_default_is_one_small_job_of_the_first_model():
    assert Workload().entries == (SMALL_JOB,)
    assert "model" not in SMALL_JOB.body
