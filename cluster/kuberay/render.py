"""RayService manifests for KubeRay, rendered from Serve config files so that the two cannot differ.

Owns what Kubernetes adds to a config: pods, GPUs, volume, secret. The config's text goes into
serveConfigV2 unchanged. Knows nothing about the service's own options.

    python -m cluster.kuberay.render            write every manifest of FLEETS beside this file
    python -m cluster.kuberay.render --check    fail if one of them is not what would be written
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RAY_VERSION = "2.60.0"
DATA_DIR = "/data"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The pods one Serve config runs on: a head without work and `num_nodes` GPU pods.

    config         path of the Serve config file, from the repository's root
    num_gpus       GPUs of one worker pod; num_cpus and memory_gib likewise
    data_claim     PersistentVolumeClaim (ReadWriteMany: every pod mounts it) at WAN_DATA_DIR, for
                   artifacts and downloaded checkpoints; None where the config names object storage
    secret         Secret whose keys become environment variables of every pod: API keys, the
                   database's and the object storage's credentials
    redis_address  host:port of a Redis that keeps Ray's cluster state over a loss of the head pod
    node_selector  label of the Kubernetes nodes that have the GPUs
    """

    name: str
    config: str
    image: str
    num_nodes: int
    num_gpus: int
    num_cpus: int
    memory_gib: int
    data_claim: str | None = "wan-data"
    secret: str = "wan-serve"
    redis_address: str | None = None
    node_selector: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for field in ("num_nodes", "num_gpus", "num_cpus", "memory_gib"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def manifest(self) -> Path:
        return HERE / f"rayservice-{self.name}.yaml"


IMAGE = "wan-serve:latest"
FLEETS = tuple(
    Fleet(
        name=config.replace("_", "-"),
        config=f"configs/{config}.yaml",
        image=IMAGE,
        num_nodes=1,
        num_gpus=8,
        num_cpus=64,
        memory_gib=512,
    )
    for config in ("t2v_a14b_8gpu", "i2v_a14b_8gpu", "t2v_i2v_a14b_8gpu")
)


def render(fleet: Fleet, serve_config: str) -> str:
    """The manifest's text. Raises ValueError for a config that cannot be reached in a cluster."""
    config = yaml.safe_load(serve_config)
    if not (isinstance(config, dict) and config.get("applications")):
        raise ValueError(f"{fleet.config}: not a Serve config, it has no applications")
    host = (config.get("http_options") or {}).get("host", "0.0.0.0")
    if host in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"{fleet.config}: http_options.host {host} answers only inside its pod; leave it out"
        )
    header = (
        f"# Written by `python -m cluster.kuberay.render` from {fleet.config}.\n"
        "# Change that file or FLEETS in render.py, not this one. serveConfigV2 is that config,\n"
        "# unchanged.\n"
    )
    return header + yaml.dump(
        _ray_service(fleet, serve_config), Dumper=_Dumper, sort_keys=False, width=100
    )


def _ray_service(fleet: Fleet, serve_config: str) -> dict[str, Any]:
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            # No work on the head: losing a worker pod must never lose the cluster's state.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": _pod(fleet, container="ray-head", num_cpus=4, memory_gib=16, num_gpus=0),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu",
                "replicas": fleet.num_nodes,
                "minReplicas": fleet.num_nodes,
                "maxReplicas": fleet.num_nodes,
                "rayStartParams": {},
                "template": _pod(
                    fleet,
                    container="ray-worker",
                    num_cpus=fleet.num_cpus,
                    memory_gib=fleet.memory_gib,
                    num_gpus=fleet.num_gpus,
                ),
            }
        ],
    }
    if fleet.redis_address:
        password = {"secretKeyRef": {"name": fleet.secret, "key": "REDIS_PASSWORD"}}
        cluster["gcsFaultToleranceOptions"] = {
            "redisAddress": fleet.redis_address,
            "redisPassword": {"valueFrom": password},
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": f"wan-{fleet.name}"},
        "spec": {
            # A second cluster beside the first would need every GPU twice; edits of serveConfigV2
            # are applied in place.
            "upgradeStrategy": {"type": "None"},
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": serve_config,
            "rayClusterConfig": cluster,
        },
    }


def _pod(
    fleet: Fleet, *, container: str, num_cpus: int, memory_gib: int, num_gpus: int
) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(num_cpus), "memory": f"{memory_gib}Gi"}
    if num_gpus:
        resources["nvidia.com/gpu"] = str(num_gpus)
    main: dict[str, Any] = {
        "name": container,
        "image": fleet.image,
        "resources": {"requests": resources, "limits": dict(resources)},
        "env": [{"name": "WAN_DATA_DIR", "value": DATA_DIR}],
        "envFrom": [{"secretRef": {"name": fleet.secret}}],
    }
    spec: dict[str, Any] = {"containers": [main]}
    if fleet.data_claim:
        main["env"].append({"name": "HF_HOME", "value": f"{DATA_DIR}/huggingface"})
        main["volumeMounts"] = [{"name": "data", "mountPath": DATA_DIR}]
        spec["securityContext"] = {"fsGroup": 1000}  # the image's user must be able to write there
        spec["volumes"] = [
            {"name": "data", "persistentVolumeClaim": {"claimName": fleet.data_claim}}
        ]
    if num_gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
        if fleet.node_selector:
            spec["nodeSelector"] = dict([fleet.node_selector])
    return {"spec": spec}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks and repeats equal values instead of naming them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    check = parser.parse_args().check
    stale = []
    for fleet in FLEETS:
        text = render(fleet, (ROOT / fleet.config).read_text())
        if check and not (fleet.manifest.exists() and fleet.manifest.read_text() == text):
            stale.append(fleet.manifest.name)
        elif not check:
            fleet.manifest.write_text(text)
    if stale:
        print(f"not as their configs say: {', '.join(stale)}; run without --check", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
