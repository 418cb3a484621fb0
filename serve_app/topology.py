"""What the service consists of, resolved: which deployments, with which groups, of which weights.

Owns the frozen values that config.py's `resolve()` makes and everything else takes; no value here
is "auto" or missing. Knows nothing about YAML, the environment, Ray, HTTP or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve_app.served_model import ServedModel
from wan_model.config import Expert

Device = Literal["cuda", "cpu"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class StageGroups:
    """One deployment of GPU groups, resolved. `name` is the deployment's.

    `min_replicas == max_replicas` when the number is fixed.
    """

    name: str
    checkpoint: str
    revision: str | None
    min_replicas: int
    max_replicas: int
    num_workers: int
    num_gpus: float
    num_cpus: float
    device: Device
    dtype: Dtype
    max_active_jobs: int
    start_timeout_s: float
    step_timeout_s: float
    worker_env: dict[str, str]

    @property
    def max_gpus(self) -> float:
        return self.max_replicas * self.num_workers * self.num_gpus


@dataclass(frozen=True, kw_only=True)
class LoRA:
    path: str
    strength: float


@dataclass(frozen=True, kw_only=True)
class ExpertGroups(StageGroups):
    expert: Expert
    ulysses_degree: int
    ring_degree: int
    cfg_parallel: bool
    placement_strategy: str
    segment_s: float
    lora: tuple[LoRA, ...]


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """`text_encoder` and `vae` name entries of ResolvedService.text_encoders and .vaes."""

    served: ServedModel
    experts: dict[Expert, ExpertGroups]
    text_encoder: str
    vae: str


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """What the HTTP edge needs. Keys travel as SHA-256 digests; none means no authentication."""

    api_key_digests: tuple[str, ...]
    max_queued_jobs: int
    max_queued_s: float
    max_image_bytes: int
    max_image_pixels: int
    image_url_hosts: tuple[str, ...]

    @property
    def max_body_bytes(self) -> int:
        """Two images as base64, and 1 MiB for everything else."""
        return 2 * (self.max_image_bytes * 4 // 3 + 4) + 2**20


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The life of a job: how long a lease holds, how many failures end it, how long it is kept."""

    lease_s: float
    max_attempts: int
    retention_s: float


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """A deployment without GPUs. `max_active`: HTTP requests or jobs in flight per replica."""

    num_replicas: int
    num_cpus: float
    max_active: int


@dataclass(frozen=True, kw_only=True)
class ResolvedService:
    """Everything the graph is built from."""

    models: dict[str, ResolvedModel]
    text_encoders: dict[str, StageGroups]
    vaes: dict[str, StageGroups]
    http: HttpSettings
    jobs: JobSettings
    ingress: ReplicaSettings
    pipeline: ReplicaSettings
    data_dir: Path
    job_store_url: str
    artifacts_url: str

    @property
    def served_models(self) -> dict[str, ServedModel]:
        return {name: model.served for name, model in self.models.items()}

    @property
    def stages(self) -> tuple[StageGroups, ...]:
        """Every deployment of groups once."""
        experts = (groups for model in self.models.values() for groups in model.experts.values())
        return (*self.text_encoders.values(), *self.vaes.values(), *experts)

    @property
    def max_gpus(self) -> float:
        """GPUs in use when every deployment has its largest number of replicas."""
        return sum(stage.max_gpus for stage in self.stages)
