"""The layouts of the headline runs fit their node, and what a kill cost is read off the spans."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import full_size_checkpoint
from benchmarks import headline as headline_module
from benchmarks.gpu_timing import OutOfTime
from benchmarks.headline import Headline
from benchmarks.layouts import layouts, recovery, running, serve_config
from benchmarks.trace import JobTrace, Span
from serve_app import demo, stages
from serve_app.app import group_spec
from serve_app.config import ServiceConfig
from wan_model.config import T2V_A14B
from wan_model.tiny.checkpoint import tiny_config
from wan_model.weights import open_checkpoint


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_every_layout_is_a_service_that_fits_the_node(num_gpus):
    for layout in layouts(num_gpus):
        assert layout.num_gpus == num_gpus
        args = serve_config(layout, Path("x"), on_cpu=False)["applications"][0]["args"]
        service = ServiceConfig.model_validate(args).resolve({"t2v": T2V_A14B}, environ={})
        assert service.max_gpus <= len(layout.gpus_as_ray_counts_them)
        experts = service.experts.values()
        for groups in experts:  # which refuses fractions of a GPU for several ranks
            assert group_spec(stages.Expert, groups, "wan_model.engine").num_workers <= num_gpus
        assert sum(e.max_replicas * e.num_workers for e in experts) == (
            2 * num_gpus if layout.shared else num_gpus
        )


def test_experts_that_share_gpus_find_each_one_three_times():
    shared = layouts(2)[2]
    assert shared.name == "one group" and shared.gpus_as_ray_counts_them == [0, 1, 0, 1, 0, 1]
    assert layouts(2)[0].gpus_as_ray_counts_them == [0, 1]


def test_the_splits_of_eight_are_those_of_the_plan():
    names = [layout.name for layout in layouts(8)]
    assert names == ["split 4:4", "8 whole models", "one group", "split 5:3", "split 3:5"]


def span(replica: str, at: float, stage: str = "HighNoiseExpert") -> Span:
    return Span(stage=stage, replica=replica, started_at=at, ended_at=at + 1, busy_s=1)


def job(status: str, *timings: Span) -> JobTrace:
    return JobTrace(
        id="v", model="t2v", status=status, submitted_at=0, completed_at=9, timings=timings
    )


def test_recovery_ends_when_the_successor_works():
    jobs = [
        job("completed", span("a", 1), span("b", 2)),
        job("completed", span("b", 6), span("c", 8), span("v", 5.5, stage="VAE")),
        job("failed", span("c", 12)),
    ]
    assert recovery(jobs, killed_at=5) == {
        "num_jobs": 3, "num_lost": 1, "seconds_to_recovery": 3,
    }  # fmt: skip
    assert recovery(jobs[:1], killed_at=5)["seconds_to_recovery"] is None


def headline_of(folder: Path) -> Headline:
    numbers = {"dry_run": True, "num_gpus": 8, "budget_s": 0.0}
    return Headline(SimpleNamespace(folder=folder, output=folder / "x.json", **numbers))


def test_a_layout_begins_without_the_jobs_of_an_interrupted_run(tmp_path, monkeypatch):
    left = tmp_path / "data" / "jobs.sqlite"
    left.parent.mkdir()
    left.write_text("jobs that would be gone on with")
    (tmp_path / "notes").write_text("not ours")
    monkeypatch.setattr(demo, "service", lambda *given: contextlib.nullcontext())
    with running(layouts(2)[0], Path("model"), tmp_path, on_cpu=True):
        assert not left.exists()
    assert (tmp_path / "notes").exists()


def test_a_checkpoint_that_was_cut_off_is_written_again(tmp_path, monkeypatch):
    written = []

    def write(folder: Path, *, device: str) -> None:
        folder.mkdir()  # an error where something is left
        written.append(folder)
        if len(written) == 1:
            raise OutOfTime("in the middle")
        (folder / "model_index.json").write_text("{}")

    monkeypatch.setattr(headline_module, "write_full_size_checkpoint", write)
    headline = headline_of(tmp_path)
    headline.args.dry_run = False
    with pytest.raises(OutOfTime):
        headline.write_checkpoint()
    headline.write_checkpoint()
    headline.write_checkpoint()
    assert len(written) == 2
    assert [path.name for path in headline.checkpoint.iterdir()] == ["model_index.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_table_says_what_was_not_done(tmp_path):
    headline = headline_of(tmp_path)
    headline.record.case("split 4:4", lambda: pytest.fail("it ran"), limit_s=100)
    assert "not done: split 4:4: OutOfTime: the run's budget is spent" in headline.table()


def test_both_experts_of_the_full_size_checkpoint_are_one_file(tmp_path, monkeypatch):
    tiny = tiny_config("t2v-A14B")
    config = replace(tiny, transformer=replace(tiny.transformer, text_dim=4096))
    monkeypatch.setattr(full_size_checkpoint, "T2V_A14B", config)
    full_size_checkpoint.write_full_size_checkpoint(tmp_path / "model", device="cpu")
    opened = open_checkpoint(str(tmp_path / "model"))
    assert opened.config.experts == config.experts
    high, low = (
        opened.load_transformer(expert, device="cpu", dtype=torch.bfloat16).state_dict()
        for expert in config.experts
    )
    assert high.keys() == low.keys() and all(torch.equal(high[name], low[name]) for name in high)
    files = list((tmp_path / "model").glob("transformer*/*.safetensors"))
    assert len(files) == 2 and files[0].samefile(files[1])
