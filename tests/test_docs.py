"""The README is true: its tree names every module, its files exist, its commands can be parsed."""

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

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


def commands() -> list[tuple[str, str]]:
    """(module, its words) of every `python -m` and `torchrun ... -m` of our own in the README."""
    lines = README.replace("\\\n", " ")
    own = r"-m ((?:benchmarks|wan_model|cluster)[\w.]*)([^`\n]*)"
    return list(dict.fromkeys(re.findall(rf"(?:python|torchrun [^`\n]*) {own}", lines)))


class Parsed(Exception):
    """Where a command would begin to work."""


def test_the_readme_has_commands_of_every_kind():
    modules = {module for module, _ in commands()}
    assert {"wan_model.generate", "wan_model.tiny", "benchmarks.parallel"} <= modules
    assert any("--lora-high-noise" in words for _, words in commands()), "of the second line"


@pytest.mark.parametrize(("module", "words"), commands())
def test_every_command_of_the_readme_is_understood(monkeypatch, module, words):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *given):
        parse_args(parser, shlex.split(words))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    with pytest.raises((Parsed, SystemExit)) as ended:
        importlib.import_module(f"{module}.__main__" if is_package else module).main()
    assert ended.type is Parsed or ended.value.code == 0, "--help"


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"\b(TODO|TBD|FIGURES|LIMITS)\b", README)
