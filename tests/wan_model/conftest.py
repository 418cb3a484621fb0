"""Tiny checkpoints, written once per session: every task, both layouts, the same weights."""

from pathlib import Path

import pytest

from wan_model.tiny.checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(task, layout="diffusers") -> the folder of a checkpoint with random weights."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(task: str, layout: str = "diffusers") -> Path:
        if (task, layout) not in folders:
            path = tmp_path_factory.mktemp("tiny") / f"{task}-{layout}"
            write_tiny_checkpoint(path, task=task, layout=layout, seed=5)
            folders[task, layout] = path
        return folders[task, layout]

    return folder
