"""What the service consists of, resolved: which deployments, with which groups, of which weights.

Owns the frozen values that config.py's `resolve()` makes and everything else takes; no value here
is "auto" or missing. Knows nothing about YAML, the environment, Ray, HTTP or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    def autoscales(self) -> bool:
        return self.min_replicas < self.max_replicas

    def num_places(self, num_running: int) -> int:
        """Calls to let through to `num_running` replicas. Where Serve adds replicas, as many as all
        of them could take: it adds them for calls that wait with it, not for jobs in our lines."""
        return (self.max_replicas if self.autoscales else num_running) * self.max_active_jobs

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
    attention: str
    parallel_backend: str
    shard_weights: bool
    offload: bool
    precision: str
    placement_strategy: str
    segment_s: float
    lora: tuple[LoRA, ...]


@dataclass(frozen=True, kw_only=True)
class PromptExtenderGroups(StageGroups):
    """The language models that write prompts out; a checkpoint is None when no job can need it.

    `checkpoint` is for text, `vl_checkpoint` for text with a picture. `timeout_s` counts the work
    on one prompt, `max_wait_s` what comes before it.
    """

    checkpoint: str | None
    vl_checkpoint: str | None
    backend: Literal["local_qwen", "dashscope"]
    target_language: Literal["zh", "en"]
    timeout_s: float
    max_wait_s: float
    max_new_tokens: int
    api_key: str = field(repr=False)
    api_url: str | None


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
    extends_prompts: bool = False
    max_queued_jobs: int
    max_queued_s: float
    max_image_bytes: int
    max_image_pixels: int
    image_url_hosts: tuple[str, ...]
    max_image_wait_s: float

    @property
    def max_body_bytes(self) -> int:
        """Two images as base64, and 1 MiB for everything else."""
        return 2 * (self.max_image_bytes * 4 // 3 + 4) + 2**20


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The life of a job: how long a lease holds, how many failures end it (since its last
    checkpoint, and in all), how long it is kept, whether with the state that branches need."""

    lease_s: float
    max_attempts: int
    max_failures: int
    retention_s: float
    keep_boundary_states: bool


@dataclass(frozen=True, kw_only=True)
class WebhookSettings:
    """Where ends of videos are announced. `secrets` are keys: kept out of every printed form.

    After a failed attempt the wait doubles from `first_retry_s` to `max_retry_s`.
    """

    url: str = field(repr=False)  # it may hold a token
    secrets: tuple[bytes, ...] = field(repr=False)
    timeout_s: float
    max_attempts: int
    first_retry_s: float
    max_retry_s: float


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
    prompt_extender: PromptExtenderGroups | None = None
    http: HttpSettings
    jobs: JobSettings
    webhooks: WebhookSettings | None
    ingress: ReplicaSettings
    pipeline: ReplicaSettings
    data_dir: Path
    job_store_url: str
    artifacts_url: str

    @property
    def served_models(self) -> dict[str, ServedModel]:
        return {name: model.served for name, model in self.models.items()}

    @property
    def experts(self) -> dict[str, ExpertGroups]:
        """The expert deployments by name; models may share one."""
        models = self.models.values()
        return {groups.name: groups for model in models for groups in model.experts.values()}

    @property
    def stages(self) -> tuple[StageGroups, ...]:
        """Every deployment of groups once."""
        extenders = () if self.prompt_extender is None else (self.prompt_extender,)
        shared = (*self.text_encoders.values(), *self.vaes.values())
        return (*extenders, *shared, *self.experts.values())

    @property
    def max_gpus(self) -> float:
        """GPUs in use when every deployment has its largest number of replicas."""
        return sum(stage.max_gpus for stage in self.stages)
