"""Draws a step benchmark's JSON: seconds of one forward, ours beside Diffusers', floors marked.

python -m benchmarks.plot benchmarks/results/step-h200.json --output out/step-h200.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BARS = (  # precision, implementation, colour
    ("fp8-attention", "ours", "#0e5a3e"),
    ("fp8", "ours", "#1b7f5a"),
    ("bf16", "ours", "#3aa17e"),
    ("bf16", "diffusers-compiled", "#b0a8b9"),
    ("bf16", "diffusers-eager", "#d6d1da"),
)


def draw(content: dict, path: Path) -> None:
    """A panel per case; a bar is the median, the line across it what its kernels take alone.

    Rows of an earlier session than the latest have a star.
    """
    rows = {(row["case"], row["precision"], row["impl"]): row for row in content["rows"]}
    latest = max(row.get("session", 0) for row in content["rows"])
    cases = list(dict.fromkeys(row["case"] for row in content["rows"]))
    figure, panels = plt.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.2), squeeze=False)
    for panel, case in zip(panels[0], cases, strict=True):
        bars = [(*bar, rows[case, *bar[:2]]) for bar in BARS if (case, *bar[:2]) in rows]
        for place, (_, impl, colour, row) in enumerate(bars):
            panel.bar(place, row["seconds"], color=colour, width=0.7)
            label = f"{row['seconds']:.2f}{'*' if row.get('session', 0) < latest else ''}"
            panel.text(place, row["seconds"], label, ha="center", va="bottom")
            if impl == "ours" and row.get("floor_s"):
                panel.hlines(row["floor_s"], place - 0.35, place + 0.35, "black", lw=1)
        names = [f"{impl.replace('-', chr(10))}\n{precision}" for precision, impl, *_ in bars]
        panel.set_xticks(range(len(bars)), names, fontsize=8)
        panel.set_title(case)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.12)
    panels[0][0].set_ylabel(f"seconds of one forward, {content['gpu']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.output)


if __name__ == "__main__":
    main()
