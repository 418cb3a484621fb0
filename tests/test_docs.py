"""The README is true: its tree names every module, its files exist, its commands can be parsed."""

import re
from pathlib import Path

import pytest

from wan_model.generate import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ("wan_model", "cluster", "serve_app")


def tree() -> dict[str, set[str]]:
    """Package -> the names that the README's tree lists in it."""
    block = README.split("```\nwan_model/ ", 1)[1].split("```", 1)[0]
    listed, package = {}, None
    for line in ("wan_model/ " + block).splitlines():
        if not line.startswith(" "):
            package = line.split("/", 1)[0]
            listed[package] = set()
        else:
            listed[package] |= set(re.findall(r"(?<=  )[a-z_0-9]+(?:\.py|/)(?=\s|$)", " " + line))
    return listed


def test_the_tree_names_every_module_and_nothing_else():
    for package in PACKAGES:
        there = {p.name for p in (ROOT / package).glob("*.py")} - {"__init__.py"}
        there |= {f"{p.name}/" for p in (ROOT / package).iterdir() if p.is_dir()} - {"__pycache__/"}
        assert tree()[package] == there, package


def test_every_file_the_readme_names_exists():
    named = re.findall(
        r"`((?:configs|tests|benchmarks|serve_app|wan_model|cluster)/[\w./-]+)`", README
    )
    assert len(named) > 8
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_every_make_target_the_readme_names_exists():
    targets = set(re.findall(r"make (\w+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "serve"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []


def test_every_flag_of_the_reference_command_in_the_readme_exists(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out
    commands = "\n".join(re.findall(r"```\n(python -m wan_model.generate.*?)```", README, re.S))
    flags = set(re.findall(r"--[a-z-]+", commands)) - {"--nproc_per_node", "--nproc"}
    assert "--lora-high-noise" in flags
    assert [flag for flag in flags if flag not in options] == []


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"\b(TODO|TBD|FIGURES|LIMITS)\b", README)
