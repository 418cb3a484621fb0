"""From options to topology: fills in "auto", shares stages, refuses options without effect.

Owns the rules between options, and nothing else: the options are config.py's, the results
topology.py's. Pure: no environment, no files, no Ray. Every ValueError is one line that names the
option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from serve_app.served_model import ServedModel, StageProfile
from serve_app.topology import (
    Device,
    Dtype,
    ExpertGroups,
    JobSettings,
    LoRA,
    ResolvedModel,
    StageGroups,
)
from wan_model.backends import check_backends, check_precision
from wan_model.config import Expert, WanConfig
from wan_model.params import VideoParams

if TYPE_CHECKING:
    from serve_app.config import (
        ExpertStageConfig,
        JobsConfig,
        ModelConfig,
        ServiceConfig,
        StageConfig,
    )

SharedStage = Literal["text_encoder", "vae", "high_noise_expert", "low_noise_expert"]
Groups = dict[str, StageGroups]

_DEPLOYMENT_NAMES = {
    "text_encoder": "TextEncoder",
    "vae": "VAE",
    Expert.HIGH_NOISE: "HighNoiseExpert",
    Expert.LOW_NOISE: "LowNoiseExpert",
}


def topology(
    config: ServiceConfig, wan_configs: Mapping[str, WanConfig], *, created: int
) -> tuple[dict[str, ResolvedModel], Groups, Groups]:
    """The models, and the text encoder and VAE deployments by name."""
    if set(wan_configs) != set(config.models):
        given, served = sorted(wan_configs), sorted(config.models)
        raise ValueError(f"the models served are {served}, but the configurations are of {given}")
    if config.jobs.has("max_queued_s"):
        for name, model in config.models.items():
            if model.profile is None:
                raise ValueError(f"jobs.max_queued_s has no effect on {name} without its profile")
    text_encoders, text_encoder_of = _shared(config, "text_encoder", wan_configs)
    vaes, vae_of = _shared(config, "vae", wan_configs)
    models = {
        name: ResolvedModel(
            served=_served_model(name, model, wan_configs[name], created),
            experts=_experts(config, name, wan_configs),
            text_encoder=text_encoder_of[name],
            vae=vae_of[name],
        )
        for name, model in config.models.items()
    }
    return models, text_encoders, vaes


def _shared(
    config: ServiceConfig, stage: SharedStage, wan_configs: Mapping[str, WanConfig]
) -> tuple[Groups, dict[str, str]]:
    """The deployments of a stage, one per distinct weights, and which of them a model uses."""
    users: dict[tuple[str, str | None], list[str]] = {}
    source_of = {name: _source(config, name, stage, wan_configs) for name in config.models}
    for name, source in source_of.items():
        weights = config.models[source].checkpoint, config.models[source].revision
        users.setdefault(weights, []).append(name)
    base = _DEPLOYMENT_NAMES[stage]
    groups, deployment_of = {}, {}
    for (checkpoint, revision), models in users.items():
        name = base if len(users) == 1 else f"{base}-{source_of[models[0]]}"
        groups[name] = StageGroups(
            name=name,
            checkpoint=checkpoint,
            revision=revision,
            num_workers=getattr(getattr(config, stage), "num_workers", 1),
            **stage_options(stage, getattr(config, stage)),
        )
        deployment_of |= dict.fromkeys(models, name)
    return groups, deployment_of


def _source(
    config: ServiceConfig, name: str, stage: SharedStage, wan_configs: Mapping[str, WanConfig]
) -> str:
    """The served model whose weights `name` uses for a shared stage."""
    option = f"{stage}_from"
    source = getattr(config.models[name], option)
    if source is None:
        return name
    where = f"models.{name}.{option}: {source}"
    if source not in config.models or source == name:
        raise ValueError(f"{where} is not another served model; there are {list(config.models)}")
    if (further := getattr(config.models[source], option)) is not None:
        raise ValueError(f"{where} takes its own from {further}: name {further} here")
    if "expert" in stage:
        _check_same_expert(config, name, stage, where)
    elif getattr(wan_configs[source], stage) != getattr(wan_configs[name], stage):
        raise ValueError(f"{where} has another kind of {stage}: remove {option}")
    return source


def _check_same_expert(config: ServiceConfig, name: str, stage: SharedStage, where: str) -> None:
    model = config.models[name]
    source = config.models[getattr(model, f"{stage}_from")]
    if model.has(stage):
        raise ValueError(f"models.{name}.{stage} has no effect beside {stage}_from: remove one")
    if (model.checkpoint, model.revision) != (source.checkpoint, source.revision):
        raise ValueError(f"{where} has another checkpoint: remove {stage}_from")


def _served_model(name: str, model: ModelConfig, row: WanConfig, created: int) -> ServedModel:
    given = model.defaults.model_dump(exclude_none=True, exclude={"solver", "cache"})
    if row.num_experts == 1 and "boundary_ratio" in given:
        raise ValueError(f"models.{name}.defaults.boundary_ratio has no effect on one expert")
    config = replace(row, **given)
    max_area, max_num_frames = model.max_area, model.max_num_frames
    if max_num_frames == "auto":
        stride_t = row.vae.stride[0]
        max_num_frames = (2 * config.num_frames - 1) // stride_t * stride_t + 1
    served = ServedModel(
        name=name,
        config=config,
        created=created,
        default_solver=model.defaults.solver,
        default_cache=model.defaults.cache,
        max_area=config.width * config.height if max_area == "auto" else max_area,
        max_num_frames=max_num_frames,
        max_num_steps=model.max_num_steps,
        profile=_profile(name, model, config),
    )
    _check_defaults(served)
    return served


def _check_defaults(model: ServedModel) -> None:
    """A request that names no number must be a legal one."""
    try:
        params = VideoParams.for_model(
            model.config, solver=model.default_solver, cache=model.default_cache
        )
    except ValueError as error:
        raise ValueError(f"models.{model.name}.defaults: {error}") from None
    try:
        model.check_limits(params)
    except ValueError as error:
        raise ValueError(
            f"models.{model.name}: the defaults are past a limit: {error}: raise it (max_area,"
            " max_num_frames, max_num_steps) or lower the defaults"
        ) from None


def _profile(name: str, model: ModelConfig, config: WanConfig) -> StageProfile | None:
    given = model.profile
    if given is None:
        return None
    if config.num_experts == 1 and given.has("step_low_noise_s"):
        raise ValueError(f"models.{name}.profile.step_low_noise_s has no effect on one expert")
    low_s = given.step_low_noise_s
    return StageProfile(
        num_tokens=given.num_tokens,
        text_encode_s=given.text_encode_s,
        image_encode_s=given.image_encode_s,
        step_high_noise_s=given.step_high_noise_s,
        step_low_noise_s=given.step_high_noise_s if low_s == "auto" else low_s,
        decode_s=given.decode_s,
    )


def _experts(
    config: ServiceConfig, name: str, wan_configs: Mapping[str, WanConfig]
) -> dict[Expert, ExpertGroups]:
    model, row = config.models[name], wan_configs[name]
    for option in ("low_noise_expert", "low_noise_expert_from"):
        if row.num_experts == 1 and model.has(option):
            raise ValueError(f"models.{name}.{option} has no effect: the model has one expert")
    return {expert: _expert_groups(config, name, expert, wan_configs) for expert in row.experts}


def _expert_groups(
    config: ServiceConfig, name: str, expert: Expert, wan_configs: Mapping[str, WanConfig]
) -> ExpertGroups:
    stage: SharedStage = f"{expert.value}_expert"
    source = _source(config, name, stage, wan_configs)
    model, where = config.models[source], f"models.{source}.{stage}"
    options: ExpertStageConfig = getattr(model, stage)
    num_workers, ulysses_degree = _degrees(where, options)
    num_heads = wan_configs[source].transformer.num_heads
    if num_heads % ulysses_degree:
        raise ValueError(
            f"{where}: {num_heads} heads do not divide by ulysses {ulysses_degree}:"
            " take a divisor, and ring_degree or cfg_parallel for the rest"
        )
    if num_workers == 1 and options.has("placement_strategy"):
        raise ValueError(f"{where}.placement_strategy has no effect on one worker")
    _check_implementation(where, options, num_workers)
    return ExpertGroups(
        name=_DEPLOYMENT_NAMES[expert] + ("" if len(config.models) == 1 else f"-{source}"),
        checkpoint=model.checkpoint,
        revision=model.revision,
        expert=expert,
        num_workers=num_workers,
        ulysses_degree=ulysses_degree,
        ring_degree=options.ring_degree,
        cfg_parallel=options.cfg_parallel,
        attention=options.attention,
        parallel_backend=options.parallel_backend,
        shard_weights=options.shard_weights,
        offload=options.offload,
        precision=options.precision,
        placement_strategy=options.placement_strategy,
        segment_s=options.segment_s,
        lora=tuple(LoRA(path=lora.path, strength=lora.strength) for lora in options.lora),
        **stage_options(where, options),
    )


def _check_implementation(where: str, options: ExpertStageConfig, num_workers: int) -> None:
    """Of the kernel, the parallel implementation and where weights lie: what cannot be together."""
    try:
        check_backends(
            attention=options.attention,
            parallel_backend=options.parallel_backend,
            ring_degree=options.ring_degree,
        )
        check_precision(
            options.precision,
            dtype=options.dtype if options.num_gpus else "auto",  # a CPU emulates it
            shard_weights=options.shard_weights,
            offload=options.offload,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if options.parallel_backend == "xfuser" and not options.num_gpus:
        raise ValueError(f"{where}: parallel_backend xfuser needs GPUs, num_gpus is 0: use own")
    if num_workers == 1:
        for option in ("parallel_backend", "shard_weights"):
            if getattr(options, option) not in ("own", False):
                raise ValueError(f"{where}.{option} has no effect on one worker")
    if options.offload and not options.num_gpus:
        raise ValueError(f"{where}.offload has no effect without a GPU")
    if options.offload and options.shard_weights:
        raise ValueError(f"{where}: shard_weights and offload exclude each other: choose one")


def _degrees(where: str, options: ExpertStageConfig) -> tuple[int, int]:
    """(num_workers, ulysses_degree) with "auto" filled in."""
    cfg, ring = 2 if options.cfg_parallel else 1, options.ring_degree
    workers, ulysses = options.num_workers, options.ulysses_degree
    if ulysses == "auto":
        ulysses = 1 if workers == "auto" else max(1, workers // (cfg * ring))
    if workers == "auto":
        workers = cfg * ring * ulysses
    if cfg * ring * ulysses != workers:
        unit = "GPUs" if options.num_gpus == 1 else "workers"
        raise ValueError(
            f"{where}: cfg {cfg} * ring {ring} * ulysses {ulysses} = {cfg * ring * ulysses}"
            f" != {workers} {unit}"
        )
    return workers, ulysses


def stage_options(where: str, options: StageConfig) -> dict[str, Any]:
    """The fields that a StageConfig and a StageGroups share, resolved."""
    low = high = options.num_replicas
    if options.autoscaling is not None:
        if options.has("num_replicas"):
            raise ValueError(f"{where}.num_replicas has no effect beside autoscaling")
        low, high = options.autoscaling.min_replicas, options.autoscaling.max_replicas
        if low > high:
            raise ValueError(f"{where}.autoscaling: min_replicas {low} > max_replicas {high}")
    device: Device = "cuda" if options.num_gpus else "cpu"
    auto_dtype: Dtype = "bfloat16" if device == "cuda" else "float32"
    return {
        "min_replicas": low,
        "max_replicas": high,
        "num_gpus": options.num_gpus,
        "num_cpus": options.num_cpus,
        "device": device,
        "dtype": auto_dtype if options.dtype == "auto" else options.dtype,
        "max_active_jobs": options.max_active_jobs,
        "start_timeout_s": options.start_timeout_s,
        "step_timeout_s": options.step_timeout_s,
        "worker_env": dict(options.worker_env),
    }


def job_settings(options: JobsConfig) -> JobSettings:
    if options.max_failures < options.max_attempts:
        raise ValueError(
            f"jobs: max_failures {options.max_failures} < max_attempts {options.max_attempts}:"
            " the failures in all are not fewer than those since the last checkpoint"
        )
    return JobSettings(
        lease_s=options.lease_s,
        max_attempts=options.max_attempts,
        max_failures=options.max_failures,
        retention_s=options.retention_s,
        keep_boundary_states=options.keep_boundary_states,
    )
