"""Groups on several nodes, and the death of one: several raylets on this machine, fake GPUs.

The cluster needs a process of its own, since one process has one Ray; see nodes_scenario.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIO = Path(__file__).with_name("nodes_scenario.py")


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_groups_pack_and_spread_over_nodes_and_a_dead_node_ends_only_its_own_groups(tmp_path):
    result = tmp_path / "seen.json"
    done = subprocess.run(
        [sys.executable, str(SCENARIO), str(result)],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    seen = json.loads(result.read_text())
    print(seen)
    assert len(set(seen["packed_nodes"])) == 1
    assert len(set(seen["spread_nodes"])) == 2
    assert seen["sum_over_two_nodes"] == 3.0
    assert seen["death"] == "RankDied"
    assert seen["detected_s"] < 1.0
    assert seen["other_group_lives"]
    assert seen["sum_after_a_new_node_came"] == 3.0
