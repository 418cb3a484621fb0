"""What `wan` shows: a progress bar, tables, one-line answers.

Owns every layout. A terminal gets a live bar, a file or a pipe one line per stage; both on standard
error, so that standard output holds only results. Knows nothing about HTTP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from serve_app.client.doctor import Check
from serve_app.client.service import Json
from serve_app.client.watch import Progress

Show = Callable[[Progress | str], None]
"""Takes what happened to the video, or a sentence about the connection."""


@contextlib.contextmanager
def following(video_id: str) -> Iterator[Show]:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console, video_id)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(f"{video_id} sent", total=100, ends_at=None)

        def show(news: Progress | str) -> None:
            if isinstance(news, str):
                bar.update(task, description=news, ends_at=None)
                return
            left_s = news.seconds_left
            bar.update(
                task,
                description=headline(news),
                completed=news.progress,
                ends_at=None if left_s is None else time.monotonic() + left_s,
            )

        yield show


class _Lines:
    """One line whenever the headline's stage changes."""

    def __init__(self, console: Console, video_id: str) -> None:
        self._console, self._video_id, self._last = console, video_id, ""

    def __call__(self, news: Progress | str) -> None:
        if isinstance(news, str):
            line = key = news
        else:
            left = "" if news.seconds_left is None else f", {_duration(news.seconds_left)} left"
            line, key = f"{headline(news)}, {news.progress} %{left}", f"{news.status} {news.stage}"
        if key != self._last:
            self._console.print(f"{self._video_id}: {line}", markup=False, soft_wrap=True)
            self._last = key


class _TimeLeft(ProgressColumn):
    """Counts down between two pieces of news."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        ends_at = task.fields.get("ends_at")
        if ends_at is None or task.finished:
            return Text("")
        return Text(f"{_duration(max(0.0, ends_at - time.monotonic()))} left", style="cyan")


def headline(progress: Progress) -> str:
    if progress.status == "queued":
        before = progress.queue_position
        return f"queued, {before} before it" if before else "queued"
    if progress.ended or progress.stage is None:
        return progress.status
    if 0 < progress.step < progress.num_steps:
        return f"{progress.stage}, step {progress.step} of {progress.num_steps}"
    return progress.stage


def videos_table(videos: list[Json], *, now: float) -> Table:
    table = Table("id", "status", "done", "left", "age", "model", "size", "prompt", box=None)
    for video in videos:
        running = video["status"] == "in_progress" and video["stage"]
        left_s = video["seconds_left"]
        table.add_row(
            video["id"],
            f"{video['stage']} {video['step']}/{video['num_inference_steps']}"
            if running
            else video["status"],
            f"{video['progress']} %",
            "" if left_s is None else _duration(left_s),
            _duration(max(0.0, now - video["created_at"])),
            video["model"],
            f"{video['size']}x{video['num_frames']}",
            Text(_shortened(video["prompt"])),
        )
    return table


def video_table(video: Json) -> Table:
    """Every field that says something, then when which stage worked on it."""
    table = Table(box=None, show_header=False)
    for name, value in video.items():
        if value in (None, "", []) or value is False or name in ("object", "timings"):
            continue
        if name.endswith("_at"):
            value = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        elif isinstance(value, dict):
            value = ", ".join(f"{key}: {part}" for key, part in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(name, Text(str(value)))
    for timing in video.get("timings", []):
        steps = f", steps {timing['from_step']} to {timing['to_step']}"
        since_s = timing["started_at"] - video["created_at"]
        table.add_row(
            timing["stage"],
            f"{timing['busy_s']:.1f} s of work, {since_s:.1f} s after submission"
            + (steps if timing["to_step"] > timing["from_step"] else ""),
        )
    return table


def models_table(models: list[Json]) -> Table:
    table = Table("model", "task", "size", "frames", "fps", "steps", "most frames", box=None)
    for model in models:
        numbers = ("num_frames", "fps", "num_inference_steps", "max_num_frames")
        table.add_row(model["id"], model["task"], model["size"], *(str(model[n]) for n in numbers))
    return table


def check_line(check: Check) -> Text:
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    line = Text.assemble(
        (f"{check.status:<5}", styles[check.status]), f"{check.name}: {check.found}"
    )
    return line.append(f"; {check.advice}" if check.advice else "", style="dim")


def _shortened(text: str, length: int = 48) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
