"""Draws a benchmark's JSON: of step a forward, of vae a decode, of load the speed of loading.

Owns the presentation only; which benchmark it was is seen from its rows.

    python -m benchmarks.plot benchmarks/results/step-h200.json --output out/step-h200.png
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BARS = (  # of a forward: precision, implementation, colour
    ("fp8-attention", "ours", "#0e5a3e"),
    ("fp8", "ours", "#1b7f5a"),
    ("bf16", "ours", "#3aa17e"),
    ("bf16", "diffusers-compiled", "#b0a8b9"),
    ("bf16", "diffusers-eager", "#d6d1da"),
)
OURS, OTHER = "#3aa17e", "#d6d1da"
INCHES_PER_BAR, FEWEST_BARS = 0.8, 3  # a panel of fewer is as wide as that


@dataclass(frozen=True, kw_only=True)
class Bar:
    """`label` is written above it, `note` in it; `line` is the height of a mark across it."""

    name: str
    height: float
    colour: str
    label: str
    note: str = ""
    line: float | None = None


Panels = dict[str, list[Bar]]
"""Title -> the bars of one panel."""


def forwards(content: dict) -> tuple[str, Panels]:
    """A panel per case; a bar is the median, the line across it what its kernels take alone."""
    rows = {(row["case"], row["precision"], row["impl"]): row for row in content["rows"]}
    panels: Panels = {row["case"]: [] for row in content["rows"]}
    for case, bars in panels.items():
        for precision, impl, colour in BARS:
            if row := rows.get((case, precision, impl)):
                bars.append(
                    Bar(
                        name=f"{impl.replace('-', chr(10))}\n{precision}",
                        height=row["seconds"],
                        colour=colour,
                        label=f"{row['seconds']:.2f}",
                        line=row.get("floor_s") if impl == "ours" else None,
                    )
                )
    return "seconds of one forward", panels


def decodes(content: dict) -> tuple[str, Panels]:
    """A panel per case, the quickest first; the peak memory is in the bar."""
    panels: Panels = {row["case"]: [] for row in content["rows"]}
    for row in sorted(content["rows"], key=lambda row: row["seconds"]):
        is_ours = row["impl"] == "ours"
        how = [f"chunk {row['chunk']}"] if is_ours else []
        if is_ours and not row["together"]:
            how.append("channels first")
        panels[row["case"]].append(
            Bar(
                name="\n".join([row["impl"], *how, row["dtype"].replace("bfloat", "bf")]),
                height=row["seconds"],
                colour=OURS if is_ours else OTHER,
                label=f"{row['seconds']:.2f}",
                note=f"{row['peak_bytes'] / 1e9:.1f}\nGB",
            )
        )
    return "seconds of one decode", {f"VAE {case}": panels[case] for case in sorted(panels)}


def loading(content: dict) -> tuple[str, Panels]:
    """Where the bytes come from is a panel; in a load's bar is its share of the plain read."""
    speeds = {row["what"]: row["gb_per_s"] for row in content["rows"]}
    panels: Panels = {}
    for title, source in (("from the disk", "cold"), ("from the page cache", "cached")):
        read = speeds[f"read {source}"]
        panels[title] = [_speed("read\nonly", read, OTHER)]
        loads = {what: speed for what, speed in speeds.items() if what.startswith(f"load {source}")}
        for what in sorted(loads, key=lambda what: (len(what), what)):
            name = what.replace(f" {source}", "").replace(", 1 readers", ", 1 reader")
            share = f"{100 * loads[what] / read:.0f} %\nof read"
            panels[title].append(_speed(name.replace(", ", "\n"), loads[what], OURS, share))
    panels["to the GPU"] = [_speed("pinned\ncopy", speeds["pinned copy"], OTHER)]
    return "GB/s", panels


def _speed(name: str, speed: float, colour: str, note: str = "") -> Bar:
    return Bar(name=name, height=speed, colour=colour, label=f"{speed:.3g}", note=note)


KINDS = (  # the fields that a benchmark's rows have and the others' have not
    ({"case", "precision", "impl"}, forwards),
    ({"case", "dtype", "impl"}, decodes),
    ({"what", "gb_per_s"}, loading),
)


def draw(content: dict, path: Path) -> None:
    """Raises ValueError for results of another benchmark."""
    fields = set((content.get("rows") or [{}])[0])
    panels_of = next((panels_of for needed, panels_of in KINDS if needed <= fields), None)
    if panels_of is None:
        raise ValueError(f"rows of {sorted(fields)} are not those of step, vae or load")
    unit, panels = panels_of(content)
    widths = [INCHES_PER_BAR * max(FEWEST_BARS, len(bars)) for bars in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(sum(widths), 3.2), width_ratios=widths, squeeze=False
    )
    for panel, (title, bars) in zip(axes[0], panels.items(), strict=True):
        draw_panel(panel, title, bars)
    axes[0][0].set_ylabel(f"{unit}, {content['gpu']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(panel: plt.Axes, title: str, bars: list[Bar]) -> None:
    for place, bar in enumerate(bars):
        panel.bar(place, bar.height, color=bar.colour, width=0.7)
        panel.text(place, bar.height, bar.label, ha="center", va="bottom")
        panel.text(place, bar.height / 2, bar.note, ha="center", va="center", fontsize=8)
        if bar.line:
            panel.hlines(bar.line, place - 0.35, place + 0.35, "black", lw=1)
    middle, half = (len(bars) - 1) / 2, max(FEWEST_BARS, len(bars)) / 2
    panel.set_xlim(middle - half, middle + half)
    panel.set_xticks(range(len(bars)), [bar.name for bar in bars], fontsize=8)
    panel.set_title(title)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.12)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.output)


if __name__ == "__main__":
    main()
