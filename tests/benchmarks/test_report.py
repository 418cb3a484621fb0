"""The table and the plot of a recorded result."""

from pathlib import Path

import pytest

from benchmarks.report import comparison, gantt, main, markdown, replica_rows
from benchmarks.trace import JobTrace, Run, Span, figures

RECORDED = Path(__file__).parent / "recorded_run.json"


def test_the_table_shows_the_figures_of_each_run():
    run = Run.load(RECORDED)
    lines = comparison([run, run]).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    pace = figures(run.jobs)["jobs_per_hour"]
    assert [cell.strip() for cell in cells["jobs/hour"]] == [f"{pace:.0f}"] * 2
    assert [cell.strip() for cell in cells["throughput ratio to the last"]] == ["1.00"] * 2
    for stage in ("TextEncoder", "HighNoiseExpert", "LowNoiseExpert", "VAE"):
        assert cells[f"{stage}: busy"][0].strip().endswith("%")
    assert len({len(line) for line in lines}) == 1  # a table in plain text too


def test_stages_missing_from_one_run_leave_its_cells_empty():
    run = Run.load(RECORDED)
    failed = JobTrace(id="v", model="m", status="failed", submitted_at=0.0, completed_at=1.0)
    nothing = Run(name="nothing", options={}, environment={}, jobs=(failed,), started_at=0.0)
    [row] = [line for line in comparison([run, nothing]).splitlines() if "VAE: busy  " in line]
    assert row.split("|")[3].strip() == "-"


def test_rows_are_stages_in_the_order_of_their_use_with_one_row_per_replica():
    spans = [
        Span(stage="high", replica="b", started_at=2, ended_at=3, busy_s=1),
        Span(stage="text", replica="x", started_at=1, ended_at=2, busy_s=1),
        Span(stage="high", replica="a", started_at=4, ended_at=5, busy_s=1),
    ]
    job = JobTrace(id="v", model="m", status="completed", submitted_at=0, completed_at=6,
                   timings=tuple(spans))  # fmt: skip
    assert replica_rows([job]) == [("text", "x"), ("high", "b"), ("high", "a")]


def test_the_report_prints_a_table_and_draws_a_plot(tmp_path, capsys):
    plot = tmp_path / "plots" / "gantt.png"
    assert main([str(RECORDED), str(RECORDED), "--gantt", str(plot)]) == 0
    assert "jobs/hour" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_completed_job_have_no_plot(tmp_path):
    nothing = Run(name="nothing", options={}, environment={}, jobs=(), started_at=0.0)
    with pytest.raises(ValueError, match="nothing to plot"):
        gantt([nothing], tmp_path / "no.png")


def test_a_missing_result_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err


def test_markdown_has_a_header_and_a_rule():
    assert markdown([["a", "x"], ["bb", "10"]]) == "| a   |   x |\n| --- | --: |\n| bb  |  10 |"
