"""RayService manifests: equal to their Serve configs, and valid for KubeRay."""

import re
import tomllib
from dataclasses import replace

import pytest
import yaml

from cluster.kuberay.render import FLEETS, HERE, RAY_VERSION, ROOT, Fleet, render
from cluster.kuberay.validate import problems

CRD = ROOT.parent / "shared" / "kuberay" / "ray.io_rayservices.yaml"
CONFIG = """\
# a comment that must survive
applications:
- name: wan
  route_prefix: /
  import_path: serve_app.app:build
  args: {models: {wan-tiny: {checkpoint: "tiny"}}}
"""
FLEET = Fleet(
    name="test",
    config="configs/test.yaml",
    image="wan-serve:1",
    num_nodes=2,
    num_gpus=8,
    num_cpus=32,
    memory_gib=256,
)


@pytest.fixture(scope="module")
def crd():
    if not CRD.exists():
        pytest.skip(f"KubeRay's RayService CRD is not at {CRD}")
    return yaml.load(CRD.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def rendered(fleet=FLEET, config=CONFIG):
    return yaml.safe_load(render(fleet, config))


def test_the_config_goes_into_the_manifest_unchanged():
    assert rendered()["spec"]["serveConfigV2"] == CONFIG


def test_the_head_does_no_work_and_every_worker_pod_has_its_gpus():
    cluster = rendered()["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [workers] = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"] == 2
    [container] = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_a_fixed_fleet_is_never_rolled_over_to_a_second_cluster():
    assert rendered()["spec"]["upgradeStrategy"] == {"type": "None"}


@pytest.mark.parametrize(
    "fleet",
    [
        FLEET,
        replace(FLEET, redis_address="redis:6379", node_selector=("gpu", "h200")),
        replace(FLEET, data_claim=None),
    ],
    ids=["plain", "redis", "no volume"],
)
def test_a_rendered_manifest_is_valid_for_kuberay(fleet, crd):
    assert problems(rendered(fleet), crd) == []


def test_misspelt_fields_and_wrong_types_are_found(crd):
    manifest = rendered()
    [workers] = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    workers["maxReplicas"] = "two"
    workers["grupName"] = workers.pop("groupName")
    workers["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    manifest["spec"]["serveConfig"] = "x"
    text = "\n".join(problems(manifest, crd))
    for wrong in ("'two'", "'grupName'", "'groupName'", "'imagePullpolicy'", "'serveConfig'"):
        assert wrong in text, text
    assert problems({**manifest, "apiVersion": "ray.io/v2"}, crd)[0].startswith("ray.io/v2")


def test_a_config_that_listens_on_loopback_is_refused():
    with pytest.raises(ValueError, match="127.0.0.1 answers only inside its pod"):
        render(FLEET, "http_options: {host: 127.0.0.1}\n" + CONFIG)


def test_a_file_that_is_no_serve_config_is_refused():
    with pytest.raises(ValueError, match="no applications"):
        render(FLEET, "models: {}\n")


def test_a_fleet_without_gpus_is_refused():
    with pytest.raises(ValueError, match="num_gpus must be at least 1"):
        replace(FLEET, num_gpus=0)


@pytest.mark.parametrize("fleet", FLEETS, ids=lambda fleet: fleet.name)
def test_the_manifest_beside_the_code_is_what_its_config_renders_to(fleet, crd):
    text = fleet.manifest.read_text()
    expected = render(fleet, (ROOT / fleet.config).read_text())
    assert text == expected, "run python -m cluster.kuberay.render"
    assert problems(yaml.safe_load(text), crd) == []


def test_every_manifest_belongs_to_a_fleet():
    manifests = {path.name for path in HERE.glob("rayservice-*.yaml")}
    assert manifests <= {fleet.manifest.name for fleet in FLEETS}


def test_the_image_has_the_ray_of_the_manifests_and_a_version_of_every_dependency():
    image = ROOT / "cluster" / "image"
    assert f"ARG RAY_VERSION={RAY_VERSION}\n" in (image / "Dockerfile").read_text()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert pinned["ray"] == RAY_VERSION
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    assert needed <= {name.lower() for name in pinned}
