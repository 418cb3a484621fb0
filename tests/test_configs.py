"""Every Serve config file in configs/ is valid: for Serve, and for build() with its model's row."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import ServiceConfig
from wan_model.config import ROWS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def resolved(path: Path):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [application] = schema.applications
    assert application.import_path == "serve_app.app:build"
    config = ServiceConfig.model_validate(application.args)
    rows = {name: ROWS[name] for name in config.models}
    return config.resolve(rows, environ={"WAN_DATA_DIR": "/data"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_is_valid(path):
    resolved(path)


def test_the_eight_gpu_configs_use_eight_gpus():
    paths = [path for path in CONFIGS if path.stem.endswith("8gpu")]
    assert len(paths) == 3
    for path in paths:
        assert resolved(path).max_gpus == pytest.approx(8)


def test_two_models_share_one_text_encoder_and_one_vae():
    service = resolved(ROOT / "configs" / "t2v_i2v_a14b_8gpu.yaml")
    assert list(service.text_encoders) == ["TextEncoder"]
    assert list(service.vaes) == ["VAE"]


def test_the_small_card_config_fits_one_card():
    service = resolved(ROOT / "configs" / "ti2v_5b_24gb.yaml")
    assert service.max_gpus == 1
