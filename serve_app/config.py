"""The configuration of the whole service, and the only file that reads the environment.

Owns every option and its default. `ServiceConfig` is what a Serve config file's `args` hold; its
`resolve()` turns it, once, into the frozen values of topology.py: "auto" became numbers, and an
option without effect an error (the rules are in resolve.py). Knows nothing about Ray or torch.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, StringConstraints

from serve_app import resolve
from serve_app.resolve_extender import prompt_extender
from serve_app.resolve_webhooks import webhook_settings
from serve_app.topology import (
    Dtype,
    HttpSettings,
    ReplicaSettings,
    ResolvedService,
)
from wan_model.backends import Attention, ParallelBackend, Precision
from wan_model.config import WanConfig

DEFAULT_DATA_DIR = "~/.local/share/wan-serve"
Auto = Literal["auto"]
ServedName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def has(self, option: str) -> bool:
        """Whether the file states this option, rather than leaving its default."""
        return option in self.model_fields_set


class AutoscalingConfig(_Options):
    """Replicas of one deployment move between these; instead of `num_replicas`."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt


class StageConfig(_Options):
    """The groups of one stage. `num_gpus` and `num_cpus` are per worker; 0 GPUs means CPU.

    `dtype` "auto" is float32 on CPU, bfloat16 on a GPU.
    """

    num_replicas: PositiveInt = 1
    autoscaling: AutoscalingConfig | None = None
    num_gpus: float = Field(default=1.0, ge=0, le=1)
    num_cpus: float = Field(default=1.0, gt=0)
    dtype: Dtype | Auto = "auto"
    max_active_jobs: PositiveInt = 2
    start_timeout_s: PositiveFloat = 1800.0
    step_timeout_s: PositiveFloat = 600.0
    worker_env: dict[str, str] = {}


class VAEStageConfig(StageConfig):
    """The VAE's groups. With several workers a group decodes a video together, each its rows."""

    num_workers: PositiveInt = 1


class LoRAConfig(_Options):
    path: str
    strength: float = 1.0


class ExpertStageConfig(StageConfig):
    """An expert's groups: (2 if cfg_parallel else 1) * ring_degree * ulysses_degree workers.

    "auto": `num_workers` is that product; `ulysses_degree` is what the workers leave to it.
    For cards too small for an expert: `shard_weights` divides it over a group's workers, `offload`
    keeps it in host memory and two of its blocks on the GPU. `precision` fp8 (8.9 and newer) is
    quicker and smaller, and not the same video; a CPU emulates it slowly.
    """

    num_workers: PositiveInt | Auto = "auto"
    ulysses_degree: PositiveInt | Auto = "auto"
    ring_degree: PositiveInt = 1
    cfg_parallel: bool = False
    attention: Attention = "auto"
    parallel_backend: ParallelBackend = "own"
    shard_weights: bool = False
    offload: bool = False
    precision: Precision = "bf16"
    placement_strategy: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    segment_s: PositiveFloat = 10.0
    lora: list[LoRAConfig] = []


class ProfileConfig(_Options):
    """Measured seconds of one model at a size of `num_tokens` tokens; see StageProfile."""

    num_tokens: PositiveInt
    text_encode_s: float = Field(default=0.0, ge=0)
    image_encode_s: float = Field(default=0.0, ge=0)
    step_high_noise_s: PositiveFloat
    step_low_noise_s: PositiveFloat | Auto = "auto"
    decode_s: float = Field(default=0.0, ge=0)


class ModelDefaults(_Options):
    """Replace the defaults of the model's row; a request may still say otherwise."""

    width: PositiveInt | None = None
    height: PositiveInt | None = None
    num_frames: PositiveInt | None = None
    fps: PositiveInt | None = None
    num_steps: PositiveInt | None = None
    shift: PositiveFloat | None = None
    guidance_high_noise: float | None = Field(default=None, ge=0)
    guidance_low_noise: float | None = Field(default=None, ge=0)
    boundary_ratio: float | None = Field(default=None, ge=0, le=1)
    negative_prompt: str | None = None
    solver: Literal["unipc", "dpm++", "euler"] = "unipc"
    cache: float | None = Field(default=None, gt=0, le=1)


class ModelConfig(_Options):
    """One served model. `max_area` "auto" is the default width * height, `max_num_frames` "auto"
    twice the default frames. Models with one checkpoint share their text encoder and VAE by
    themselves; `text_encoder_from` and `vae_from` name another served model to share with.
    `high_noise_expert_from` and `low_noise_expert_from` do so for an expert of the same
    checkpoint: a low-noise LoRA under a name of its own costs one more expert, not two."""

    checkpoint: str
    revision: str | None = None
    text_encoder_from: ServedName | None = None
    vae_from: ServedName | None = None
    high_noise_expert_from: ServedName | None = None
    low_noise_expert_from: ServedName | None = None
    high_noise_expert: ExpertStageConfig = ExpertStageConfig()
    low_noise_expert: ExpertStageConfig = ExpertStageConfig()
    defaults: ModelDefaults = ModelDefaults()
    max_area: PositiveInt | Auto = "auto"
    max_num_frames: PositiveInt | Auto = "auto"
    max_num_steps: PositiveInt = 100
    profile: ProfileConfig | None = None


class JobsConfig(_Options):
    """The queue's bounds and the life of a job. `max_queued_s` counts predicted seconds.

    `max_attempts` bounds the failures since the last checkpoint, `max_failures` those in all: a job
    that comes a little further before it kills each group must end too. A kept boundary state is
    four times the latents (75 MiB at 720p and 81 frames); branches begin with it.
    """

    max_queued_jobs: PositiveInt = 1000
    max_queued_s: PositiveFloat = 86_400.0
    lease_s: PositiveFloat = 30.0
    max_attempts: PositiveInt = 5
    max_failures: PositiveInt = 25
    retention_s: PositiveFloat = 7 * 86_400.0
    keep_boundary_states: bool = True


class ImagesConfig(_Options):
    """What a request's image may be. `url_hosts` may hold host names (whose public addresses are
    fetched), addresses and networks (10.0.0.0/8): private ones only if listed as such.
    `max_wait_s` is how long POST /v1/images/generations may take, the queue included."""

    max_bytes: PositiveInt = 10 * 2**20
    max_pixels: PositiveInt = 36_000_000
    url_hosts: list[str] = []
    max_wait_s: PositiveFloat = 300.0


class WebhooksConfig(_Options):
    """Where `video.completed` and `video.failed` are posted (default: WAN_WEBHOOK_URL), signed with
    WAN_WEBHOOK_SECRET. A receiver that is down gets 16 tries over 6 hours by default."""

    url: str | None = None
    timeout_s: PositiveFloat = 10.0
    max_attempts: PositiveInt = 16
    first_retry_s: PositiveFloat = 5.0
    max_retry_s: PositiveFloat = 3600.0


class PromptExtensionConfig(StageConfig):
    """Who writes prompts out for requests with `prompt_extend`. With "off" such a request is 400.

    `checkpoint` and `vl_checkpoint` are folders or Hub names of Qwen2.5 and Qwen2.5-VL, or
    DashScope's names of its models; its key is in DASH_API_KEY, another base URL in DASH_API_URL.
    `timeout_s` bounds the work on one prompt, `max_wait_s` the wait for its turn; past either the
    job takes its original prompt.
    """

    backend: Literal["off", "local_qwen", "dashscope"] = "off"
    checkpoint: str | Auto = "auto"
    vl_checkpoint: str | Auto = "auto"
    target_language: Literal["zh", "en"] = "en"
    timeout_s: PositiveFloat = 60.0
    max_wait_s: PositiveFloat = 300.0
    max_new_tokens: PositiveInt = 512


class ReplicasConfig(_Options):
    """A deployment without GPUs: the ingress or the pipeline."""

    num_replicas: PositiveInt = 1
    num_cpus: float = Field(default=1.0, ge=0)
    max_active: PositiveInt


class ServiceConfig(_Options):
    """`args` of the Serve config file. The first model is the one a request gets that names none.

    `ingress.max_active` bounds the open HTTP requests (an event stream is one) per replica,
    `pipeline.max_active` the jobs in flight per replica, of all models: each model has at most two
    more than its experts take. `data_dir`, `job_store_url` and `artifacts_url` default to
    WAN_DATA_DIR, WAN_JOB_STORE_URL and WAN_ARTIFACTS_URL: credentials belong in the environment.
    """

    models: dict[ServedName, ModelConfig] = Field(min_length=1)
    text_encoder: StageConfig = StageConfig()
    vae: VAEStageConfig = VAEStageConfig()
    prompt_extension: PromptExtensionConfig = PromptExtensionConfig()
    ingress: ReplicasConfig = ReplicasConfig(max_active=500)
    pipeline: ReplicasConfig = ReplicasConfig(max_active=64)
    jobs: JobsConfig = JobsConfig()
    images: ImagesConfig = ImagesConfig()
    webhooks: WebhooksConfig = WebhooksConfig()
    data_dir: Path | None = None
    job_store_url: str | None = None
    artifacts_url: str | None = None

    def resolve(
        self,
        wan_configs: Mapping[str, WanConfig],
        *,
        environ: Mapping[str, str] = os.environ,
        now: float | None = None,
    ) -> ResolvedService:
        """`wan_configs`: what each served model's checkpoint is. Raises ValueError with a line
        that says which option is wrong and what to do."""
        created = int(time.time() if now is None else now)
        models, text_encoders, vaes = resolve.topology(self, wan_configs, created=created)
        extender = prompt_extender(self.prompt_extension, wan_configs.values(), environ)
        data_dir = self._data_dir(environ)
        return ResolvedService(
            models=models,
            text_encoders=text_encoders,
            vaes=vaes,
            prompt_extender=extender,
            http=HttpSettings(
                extends_prompts=extender is not None,
                api_key_digests=_api_key_digests(environ),
                max_queued_jobs=self.jobs.max_queued_jobs,
                max_queued_s=self.jobs.max_queued_s,
                max_image_bytes=self.images.max_bytes,
                max_image_pixels=self.images.max_pixels,
                image_url_hosts=tuple(host.lower() for host in self.images.url_hosts),
                max_image_wait_s=self.images.max_wait_s,
            ),
            jobs=resolve.job_settings(self.jobs),
            webhooks=webhook_settings(
                self.webhooks,
                default_url=environ.get("WAN_WEBHOOK_URL", ""),
                secrets=environ.get("WAN_WEBHOOK_SECRET", ""),
            ),
            ingress=ReplicaSettings(**self.ingress.model_dump()),
            pipeline=ReplicaSettings(**self.pipeline.model_dump()),
            data_dir=data_dir,
            job_store_url=self.job_store_url
            or environ.get("WAN_JOB_STORE_URL")
            or f"sqlite:///{data_dir / 'jobs.sqlite'}",
            artifacts_url=self.artifacts_url
            or environ.get("WAN_ARTIFACTS_URL")
            or str(data_dir / "artifacts"),
        )

    def _data_dir(self, environ: Mapping[str, str]) -> Path:
        if self.data_dir is not None and self.job_store_url and self.artifacts_url:
            raise ValueError("data_dir has no effect beside job_store_url and artifacts_url")
        default = environ.get("WAN_DATA_DIR") or DEFAULT_DATA_DIR
        return Path(self.data_dir or default).expanduser().absolute()


def _api_key_digests(environ: Mapping[str, str]) -> tuple[str, ...]:
    text = environ.get("WAN_API_KEYS", "")
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if text and not keys:
        raise ValueError("WAN_API_KEYS is set but holds no key: unset it or give keys")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
