"""The loading benchmark writes its checkpoint into a folder of its own, and leaves the others."""

import json
import sys

from benchmarks import load


def test_a_dry_run_measures_every_way_and_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder, output = tmp_path / "models", tmp_path / "load.json"
    folder.mkdir()
    (folder / "precious.safetensors").write_text("years of work")
    words = ["--tiny", "--device", "cpu", "--folder", str(folder), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["load", *words])
    load.main()
    assert [path.name for path in folder.iterdir()] == ["precious.safetensors"]
    content = json.loads(output.read_text())
    assert content["failures"] == {}
    measured = {row["what"] for row in content["rows"]}
    assert {"write", "read cold", "read cached", "load cold"} <= measured
