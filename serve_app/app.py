"""The front door: `build(config)` is the whole graph on one screen.

Owns which deployment gets which options and which handles. Knows nothing about what any of them
does inside; options were checked and completed in config.py.

    client -> Ingress -> job table <- Pipeline -> PromptExtender (if there is one)
                                               -> TextEncoder
                                               -> VAE (image)
                                               -> HighNoiseExpert, LowNoiseExpert
                                               -> VAE (video)
"""

# No `from __future__ import annotations` here: Serve reads build's annotation to parse `args`.
import logging
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from cluster.errand import call_in_worker
from cluster.spec import GroupSpec
from serve_app.artifacts import Artifacts
from serve_app.config import ServiceConfig
from serve_app.ingress import make_ingress_app
from serve_app.jobs import JobStore, check_database
from serve_app.logs import log_as_serve_does
from serve_app.pipeline import Pipeline
from serve_app.prompt_extension import PromptExtender, engine_of
from serve_app.stages import VAE, Expert, Stage, StageStores, TextEncoder
from serve_app.topology import (
    ExpertGroups,
    PromptExtenderGroups,
    ResolvedService,
    StageGroups,
)

# build() runs in a task of Ray's: what Serve's own logger is given there is shown and kept.
logger = logging.getLogger("ray.serve.wan")

ENGINE_MODULE = "wan_model.engine"

KERNELS_ON_DISK = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}
"""FlashAttention 4 compiles for 2 s otherwise, each time; Triton keeps its kernels anyway."""


def build(config: ServiceConfig) -> Application:
    """The Serve application of a config file's `args`. Raises ValueError before anything starts.

    The environment is that of the running Ray, not that of the shell with `serve run` in it.
    """
    service = config.resolve(_wan_configs(config))
    check_database(service.job_store_url, sum(node["Alive"] for node in ray.nodes()))
    log_environment(service)
    return graph(service)


def log_environment(service: ResolvedService) -> None:
    """What the environment and its defaults have come to, without what is secret in it."""
    num_keys = len(service.http.api_key_digests)
    database = urlsplit(service.job_store_url).scheme.partition("+")[0]
    artifacts = urlsplit(service.artifacts_url)
    where = f"{artifacts.netloc.rpartition('@')[2]}{artifacts.path}"
    if artifacts.scheme:
        where = f"{artifacts.scheme}://{where}"
    logger.info("API keys: %d; job table: %s; artifacts: %s", num_keys, database, where)
    if not num_keys:
        logger.warning(
            "WAN_API_KEYS is not set where Ray was started: whoever reaches this service may use it"
            " and sees every job"
        )


def graph(service: ResolvedService, *, engine_module: str = ENGINE_MODULE) -> Application:
    """Every deployment and its handles. `engine_module` has the engines that the groups run."""
    stages: dict[str, Application] = {}
    if (extender := service.prompt_extender) is not None:
        stages[extender.name] = _stage(PromptExtender, extender, service, engine_module)
    for groups in service.text_encoders.values():
        stages[groups.name] = _stage(TextEncoder, groups, service, engine_module)
    for groups in service.vaes.values():
        stages[groups.name] = _stage(VAE, groups, service, engine_module)
    for groups in service.experts.values():
        stages[groups.name] = _stage(Expert, groups, service, engine_module)
    pipeline = serve.deployment(
        Pipeline,
        name="Pipeline",
        num_replicas=service.pipeline.num_replicas,
        ray_actor_options={"num_cpus": service.pipeline.num_cpus},
        max_ongoing_requests=100,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
    ).bind(service, stages)
    return serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=service.ingress.num_replicas,
        ray_actor_options={"num_cpus": service.ingress.num_cpus},
        max_ongoing_requests=service.ingress.max_active,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
    ).bind(service, pipeline)


@serve.ingress()
class Ingress:
    """One HTTP replica: the ASGI app of ingress.py with this service's stores. Keeps nothing."""

    async def __init__(self, service: ResolvedService, pipeline: Any) -> None:
        log_as_serve_does()
        self.service = service
        self.pipeline = pipeline
        self.store = await JobStore.open(
            service.job_store_url, retention_s=service.jobs.retention_s
        )

    def __serve_build_asgi_app__(self) -> Any:
        return make_ingress_app(
            store=self.store,
            artifacts=Artifacts(self.service.artifacts_url),
            models=self.service.served_models,
            settings=self.service.http,
            readiness=self._readiness,
        )

    async def _readiness(self) -> dict[str, bool]:
        try:
            return await self.pipeline.readiness.remote()
        except (RayError, RayServeException):  # it is being replaced
            return {"Pipeline": False}


def _stage(
    kind: type[Stage], groups: StageGroups, service: ResolvedService, engine_module: str
) -> Application:
    spec = group_spec(kind, groups, engine_module)
    return serve.deployment(
        kind,
        name=groups.name,
        max_ongoing_requests=groups.max_active_jobs,
        graceful_shutdown_timeout_s=max(5.0, 2 * getattr(groups, "segment_s", 5.0)),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=1,
        health_check_timeout_s=10,
        **replica_options(groups),
        **spec.deployment_options(),
    ).bind(
        groups.name,
        spec,
        StageStores(job_store_url=service.job_store_url, artifacts_url=service.artifacts_url),
    )


def replica_options(groups: StageGroups) -> dict[str, Any]:
    """How many replicas Serve runs: a number, or as many as the calls under way need."""
    if not groups.autoscales:
        return {"num_replicas": groups.max_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": groups.min_replicas,
            "max_replicas": groups.max_replicas,
            "target_ongoing_requests": groups.max_active_jobs,
        }
    }


def group_spec(kind: type[Stage], groups: StageGroups, engine_module: str) -> GroupSpec:
    """What a stage's group runs: the engine's import string and its options."""
    engine = f"{engine_module}:{kind.__name__}Engine"
    engine_kwargs: dict[str, Any] = {
        "checkpoint": groups.checkpoint,
        "revision": groups.revision,
        "device": "auto",
        "dtype": groups.dtype,
    }
    if kind is VAE and groups.num_workers > 1:
        engine_kwargs["split_rows"] = True
    strategy = "STRICT_PACK"
    if isinstance(groups, ExpertGroups):
        strategy = groups.placement_strategy
        engine_kwargs |= {
            "expert": groups.expert.value,
            "loras": tuple((lora.path, lora.strength) for lora in groups.lora),
            "ulysses_degree": groups.ulysses_degree,
            "ring_degree": groups.ring_degree,
            "cfg_parallel": groups.cfg_parallel,
            "attention": groups.attention,
            "parallel_backend": groups.parallel_backend,
            "shard_weights": groups.shard_weights,
            "offload": groups.offload,
            "precision": groups.precision,
        }
    if isinstance(groups, PromptExtenderGroups):
        engine, engine_kwargs = engine_of(groups)
    return GroupSpec(
        engine=engine,
        engine_kwargs=engine_kwargs,
        num_workers=groups.num_workers,
        num_gpus_per_worker=groups.num_gpus,
        num_cpus_per_worker=groups.num_cpus,
        strategy=strategy,
        # The stage's name, for whoever looks at a worker process from outside.
        worker_env={"WAN_STAGE": groups.name} | KERNELS_ON_DISK | groups.worker_env,
        start_timeout_s=groups.start_timeout_s,
        step_timeout_s=groups.step_timeout_s,
    )


def _wan_configs(config: ServiceConfig) -> dict[str, Any]:
    """What each model's checkpoint is. Read by a worker process: this one never loads torch."""
    return {
        name: call_in_worker(
            "wan_model.weights:read_config", checkpoint=model.checkpoint, revision=model.revision
        )
        for name, model in config.models.items()
    }
