"""Results as a table and a plot: `python -m benchmarks.report RESULT.json [...]`.

Prints one table (markdown that reads as plain text) with a column per result, and draws a Gantt
plot: a row per stage replica, against time, coloured by job. Owns the presentation only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.trace import JobTrace, Run, Span, figures

Rows = list[list[str]]
MAX_JOBS_IN_LEGEND = 16


def comparison(runs: Sequence[Run]) -> str:
    """One table for all runs; with several, also the ratio of each throughput to the last's."""
    return markdown([["", *(run.name for run in runs)], *_rows([figures(r.jobs) for r in runs])])


def _rows(found: Sequence[dict[str, Any]]) -> Rows:
    rows = [
        ["jobs completed", *(f"{f['num_completed']} of {f['num_jobs']}" for f in found)],
        ["refused (429), tried again", *(str(f["num_refusals"]) for f in found)],
        ["duration, s", *(_number(f["duration_s"]) for f in found)],
        ["jobs/hour", *(_number(f["jobs_per_hour"], 0) for f in found)],
    ]
    if len(found) > 1:
        last = found[-1]["jobs_per_hour"]
        ratios = [f["jobs_per_hour"] / last if last and f["jobs_per_hour"] else None for f in found]
        rows.append(["throughput ratio to the last", *(_number(r, 2) for r in ratios)])
    for key, label in (("latency_s", "latency"), ("queue_s", "queue time")):
        for part in ("p50", "p95", "p99"):
            rows.append([f"{label} {part}, s", *(_number(_of(f[key], part), 2) for f in found)])
    for part in ("mean", "most"):
        values = [_of(f["stages_busy_at_once"], part) for f in found]
        rows.append([f"stages busy at once, {part}", *(_number(v, 2) for v in values)])
    for stage in dict.fromkeys(name for f in found for name in f["stages"]):
        mine = [f["stages"].get(stage) for f in found]
        rows.append([f"{stage}: busy", *(_percent(_of(s, "busy_share")) for s in mine)])
        per_job = [_per_job(s, f) for s, f in zip(mine, found, strict=True)]
        rows.append([f"{stage}: busy s per job", *per_job])
    return rows


def markdown(rows: Rows) -> str:
    """The first row is the header, the first column text, the rest numbers."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def gantt(runs: Sequence[Run], path: Path) -> None:
    """One plot per run below each other, on one scale of seconds since the run's first submit.

    Raises ValueError when no run has a completed job.
    """
    runs = [run for run in runs if any(job.timings for job in run.jobs)]
    if not runs:
        raise ValueError("no run has a completed job: there is nothing to plot")
    # Imported here: the tables need no matplotlib, and the service's installation has none.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows_of = [replica_rows(run.jobs) for run in runs]
    heights = [len(rows) + 1.5 for rows in rows_of]
    figure = Figure(figsize=(13, 0.45 * sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(runs), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    for axis, run, rows in zip(axes, runs, rows_of, strict=True):
        _draw(axis, run, rows)
    axes[-1].set_xlabel("seconds since the first submit")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axis: Any, run: Run, rows: list[tuple[str, str]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors
    start = min(job.submitted_at for job in run.jobs)
    row_of = {row: number for number, row in enumerate(rows)}
    for number, job in enumerate(run.jobs):
        colour = colours[number % len(colours)]
        for span in job.timings:
            # The edge makes a call of milliseconds visible.
            axis.barh(
                row_of[span.stage, span.replica], span.seconds, left=span.started_at - start,
                height=0.8, color=colour, edgecolor=colour, linewidth=0.6, alpha=0.85,
            )  # fmt: skip
    axis.set_yticks(range(len(rows)), [_label(row, rows) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    pace = figures(run.jobs)["jobs_per_hour"]
    axis.set_title(f"{run.name}: {len(run.jobs)} jobs, {_number(pace, 0)} jobs/hour", loc="left")
    if len(run.jobs) <= MAX_JOBS_IN_LEGEND:
        handles = [
            axis.barh(0, 0, color=colours[number % len(colours)], label=f"job {number + 1}")
            for number in range(len(run.jobs))
        ]
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)


def replica_rows(jobs: Sequence[JobTrace]) -> list[tuple[str, str]]:
    """(stage, replica), stages in the order in which jobs go through them."""
    spans: list[Span] = sorted((s for job in jobs for s in job.timings), key=lambda s: s.started_at)
    stages = list(dict.fromkeys(span.stage for span in spans))
    pairs = dict.fromkeys((span.stage, span.replica) for span in spans)
    return sorted(pairs, key=lambda pair: stages.index(pair[0]))


def _label(row: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """The stage, numbered where it has several replicas."""
    same = [other for other in rows if other[0] == row[0]]
    return row[0] if len(same) == 1 else f"{row[0]} {same.index(row) + 1}"


def _of(values: dict[str, Any] | None, name: str) -> float | None:
    return None if values is None else values[name]


def _per_job(stage: dict[str, Any] | None, found: dict[str, Any]) -> str:
    return _number(None if stage is None else stage["busy_s"] / found["num_completed"], 2)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--gantt", type=Path, help="where the plot goes (default: RESULT.png)")
    args = parser.parse_args(argv)
    path = args.gantt or args.results[0].with_suffix(".png")
    try:
        runs = [Run.load(result) for result in args.results]
        print(comparison(runs))
        gantt(runs, path)
    except ImportError as error:
        print(f"no plot: {error}; pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"saved {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
