"""The scaling benchmark on two CPU processes: every way is timed, compared and written down."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dry_run(output: Path, *options: str) -> dict:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "benchmarks.parallel", "--dry-run", "--repeats", "1", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_a_dry_run_writes_a_row_per_way_and_says_what_was_skipped(tmp_path):
    ways = ("ulysses", "ring", "cfg", "fsdp")
    content = dry_run(tmp_path / "parallel.json", "--ways", *ways)
    rows = {(row["impl"], row["way"]): row for row in content["rows"]}
    assert content["num_ranks"] == 2
    for way in ways:
        row = rows["ours", way]
        assert row["relative_rms_error"] < 1e-5
        assert row["scaling"] > 0
    assert "xfuser is not installed" in rows["xfuser", "ulysses"]["skipped"]
    assert "skipped" in rows["diffusers", "ulysses"], "its context parallelism needs a GPU"


def test_quantised_experts_are_compared_with_themselves(tmp_path):
    content = dry_run(tmp_path / "parallel.json", "--precision", "fp8-attention")
    assert (content["precision"], content["attention"]) == ("fp8-attention", "fp8")
    rows = {row["way"]: row for row in content["rows"]}
    assert rows.keys() == {"one GPU", "ulysses", "cfg"}, "a ring needs a log-sum-exp"
    assert rows["cfg"]["relative_rms_error"] == 0
    assert rows["ulysses"]["relative_rms_error"] < 0.1, "roundings tip: another forward of its kind"
