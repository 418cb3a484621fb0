"""The scaling benchmark on two CPU processes: every way is timed, compared and written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_dry_run_writes_a_row_per_way_and_says_what_was_skipped(tmp_path):
    output = tmp_path / "parallel.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "benchmarks.parallel",
        "--dry-run",
        "--repeats",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(output.read_text())
    rows = {(row["impl"], row["way"]): row for row in content["rows"]}
    assert content["num_ranks"] == 2
    for way in ("ulysses", "ring", "cfg"):
        row = rows["ours", way]
        assert row["relative_rms_error"] < 1e-5
        assert row["scaling"] > 0
    assert "xfuser is not installed" in rows["xfuser", "ulysses"]["skipped"]
    assert "skipped" in rows["diffusers", "ulysses"], "its context parallelism needs a GPU"
