"""The running services of the end-to-end tests: three tiny models behind one `serve run`."""

import pytest
from live_service import live, service_args

from wan_model.tiny.checkpoint import write_tiny_checkpoint

TASKS = {"t2v": "t2v-A14B", "i2v": "i2v-A14B", "ti2v": "ti2v-5B"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Served name -> folder of a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: root / name for name in TASKS}
    for name, task in TASKS.items():
        write_tiny_checkpoint(folders[name], task=task, seed=5)
    return folders


@pytest.fixture(scope="session")
def service(tmp_path_factory, checkpoints):
    """t2v, i2v and ti2v in one service; i2v shares t2v's text encoder and VAE."""
    args = service_args(checkpoints)
    args["models"]["i2v"] |= {"text_encoder_from": "t2v", "vae_from": "t2v"}
    with live(tmp_path_factory.mktemp("service"), args) as running:
        yield running
