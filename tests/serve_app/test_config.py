"""Options to topology: defaults, "auto", sharing, and options that would have no effect."""

import logging
from dataclasses import replace

import pytest
from pydantic import ValidationError

from serve_app import stages
from serve_app.app import group_spec, log_environment, logger
from serve_app.config import ServiceConfig
from wan_model.config import (
    I2V_A14B,
    T2V_A14B,
    TI2V_5B,
    WAN21_T2V_14B,
    WAN_TINY,
    Expert,
)

PROFILE = {"num_tokens": 320, "step_high_noise_s": 0.5}


def resolve(models, wan_configs=None, environ=None, **options):
    config = ServiceConfig.model_validate({"models": models, **options})
    wan_configs = wan_configs or dict.fromkeys(models, WAN_TINY)
    return config.resolve(wan_configs, environ=environ or {}, now=5.9)


def one(expert_options=None, wan_config=T2V_A14B, **model):
    """A service of one model; `expert_options` are its high-noise expert's."""
    model = {"checkpoint": "x", "high_noise_expert": expert_options or {}} | model
    return resolve({"m": model}, {"m": wan_config})


def high(service, name="m"):
    return service.models[name].experts[Expert.HIGH_NOISE]


def test_a_checkpoint_is_all_that_must_be_said():
    service = resolve({"wan-tiny": {"checkpoint": "x"}})
    names = [stage.name for stage in service.stages]
    assert names == ["TextEncoder", "VAE", "HighNoiseExpert", "LowNoiseExpert"]
    assert service.max_gpus == 4
    assert service.served_models["wan-tiny"].created == 5


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValidationError, match="models.m.high_noise_expert.ulyses_degree"):
        one({"ulyses_degree": 2})


def test_a_service_needs_a_model():
    with pytest.raises(ValidationError, match="models"):
        resolve({})


@pytest.mark.parametrize("name", ["", "a/b", "a#b", "-a", "a b", "x" * 65])
def test_served_names_fit_urls_and_deployment_names(name):
    with pytest.raises(ValidationError, match="models"):
        resolve({name: {"checkpoint": "x"}})


@pytest.mark.parametrize(
    ("options", "num_workers", "ulysses_degree"),
    [
        ({}, 1, 1),
        ({"ulysses_degree": 4}, 4, 4),
        ({"num_workers": 8}, 8, 8),
        ({"num_workers": 8, "cfg_parallel": True}, 8, 4),
        ({"num_workers": 8, "cfg_parallel": True, "ring_degree": 2}, 8, 2),
        ({"cfg_parallel": True, "ring_degree": 2}, 4, 1),
        ({"num_workers": 4, "ulysses_degree": 2, "ring_degree": 2}, 4, 2),
    ],
)
def test_auto_degrees_become_numbers(options, num_workers, ulysses_degree):
    groups = high(one(options))
    assert (groups.num_workers, groups.ulysses_degree) == (num_workers, ulysses_degree)


@pytest.mark.parametrize(
    ("options", "equation"),
    [
        (
            {"num_workers": 8, "cfg_parallel": True, "ulysses_degree": 8},
            "cfg 2 * ring 1 * ulysses 8 = 16 != 8 GPUs",
        ),
        ({"num_workers": 3, "ring_degree": 2}, "cfg 1 * ring 2 * ulysses 1 = 2 != 3 GPUs"),
        (
            {"num_workers": 2, "ulysses_degree": 4, "num_gpus": 0},
            "cfg 1 * ring 1 * ulysses 4 = 4 != 2 workers",
        ),
    ],
)
def test_degrees_that_do_not_multiply_up_are_refused_with_the_equation(options, equation):
    with pytest.raises(ValueError) as caught:
        one(options)
    assert str(caught.value) == f"models.m.high_noise_expert: {equation}"


def test_heads_must_divide_by_ulysses():
    with pytest.raises(ValueError, match="40 heads do not divide by ulysses 16"):
        one({"ulysses_degree": 16})


def test_dtype_follows_the_device_and_the_stage():
    on_gpu = resolve({"m": {"checkpoint": "x"}})
    on_cpu = resolve(
        {"m": {"checkpoint": "x", "high_noise_expert": {"num_gpus": 0}}}, vae={"num_gpus": 0}
    )
    assert (high(on_gpu).device, high(on_gpu).dtype) == ("cuda", "bfloat16")
    assert (high(on_cpu).device, high(on_cpu).dtype) == ("cpu", "float32")
    assert on_gpu.vaes["VAE"].dtype == "bfloat16"
    assert on_gpu.text_encoders["TextEncoder"].dtype == "bfloat16"


def test_two_models_share_the_stages_they_are_told_to():
    service = resolve(
        {
            "t2v": {"checkpoint": "T"},
            "i2v": {"checkpoint": "I", "text_encoder_from": "t2v", "vae_from": "t2v"},
        },
        {"t2v": T2V_A14B, "i2v": I2V_A14B},
    )
    assert [stage.name for stage in service.stages] == [
        "TextEncoder", "VAE", "HighNoiseExpert-t2v", "LowNoiseExpert-t2v", "HighNoiseExpert-i2v",
        "LowNoiseExpert-i2v",
    ]  # fmt: skip
    assert service.models["i2v"].vae == service.models["t2v"].vae == "VAE"
    assert service.vaes["VAE"].checkpoint == "T"
    assert service.max_gpus == 6


def test_a_shared_stage_has_the_name_of_the_model_whose_weights_it_has():
    service = resolve(
        {
            "i2v": {"checkpoint": "I", "vae_from": "t2v"},
            "t2v": {"checkpoint": "T"},
            "ti2v": {"checkpoint": "5B"},
        },
        {"i2v": I2V_A14B, "t2v": T2V_A14B, "ti2v": TI2V_5B},
    )
    assert list(service.vaes) == ["VAE-t2v", "VAE-ti2v"]
    assert service.models["i2v"].vae == "VAE-t2v"


def test_a_style_is_one_more_expert_of_a_model():
    style = {"low_noise_expert": {"lora": [{"path": "style.safetensors"}]}}
    shared = {"checkpoint": "T", "high_noise_expert_from": "t2v"}
    service = resolve({"t2v": {"checkpoint": "T"}, "style": shared | style})
    assert [stage.name for stage in service.stages] == [
        "TextEncoder", "VAE", "HighNoiseExpert-t2v", "LowNoiseExpert-t2v", "LowNoiseExpert-style",
    ]  # fmt: skip
    high = [model.experts[Expert.HIGH_NOISE] for model in service.models.values()]
    assert high[0] == high[1] and not high[0].lora
    assert service.experts["LowNoiseExpert-style"].lora[0].path == "style.safetensors"
    assert service.max_gpus == 5


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ({"checkpoint": "U"}, "high_noise_expert_from: t2v has another checkpoint: remove"),
        ({"revision": "main"}, "high_noise_expert_from: t2v has another checkpoint: remove"),
        ({"high_noise_expert": {"segment_s": 3}}, "high_noise_expert has no effect beside"),
        ({"high_noise_expert_from": "style"}, "high_noise_expert_from: style is not another"),
    ],
)
def test_an_expert_cannot_be_shared_with(style, message):
    shared = {"checkpoint": "T", "high_noise_expert_from": "t2v"}
    with pytest.raises(ValueError, match=f"models.style.{message}"):
        resolve({"t2v": {"checkpoint": "T"}, "style": shared | style})


def test_models_of_one_checkpoint_share_without_being_told():
    service = resolve({"a": {"checkpoint": "x"}, "b": {"checkpoint": "x"}})
    assert list(service.text_encoders) == ["TextEncoder"]


def test_models_of_different_checkpoints_do_not_share():
    service = resolve(
        {"t2v": {"checkpoint": "T"}, "ti2v": {"checkpoint": "I", "text_encoder_from": "t2v"}},
        {"t2v": T2V_A14B, "ti2v": TI2V_5B},
    )
    assert list(service.vaes) == ["VAE-t2v", "VAE-ti2v"]
    assert list(service.text_encoders) == ["TextEncoder"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": {"checkpoint": "x", "vae_from": "b"}}, "models.a.vae_from: b is not another served"),
        ({"a": {"checkpoint": "x", "vae_from": "a"}}, "models.a.vae_from: a is not another served"),
        (
            {
                "a": {"checkpoint": "x", "vae_from": "b"},
                "b": {"checkpoint": "y", "vae_from": "c"},
                "c": {"checkpoint": "z"},
            },
            "models.a.vae_from: b takes its own from c: name c here",
        ),
    ],
)
def test_sharing_with_nobody_is_refused(models, message):
    with pytest.raises(ValueError, match=message):
        resolve(models)


def test_sharing_a_vae_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="vae_from: a has another kind of vae"):
        resolve(
            {"a": {"checkpoint": "x"}, "b": {"checkpoint": "y", "vae_from": "a"}},
            {"a": T2V_A14B, "b": TI2V_5B},
        )


@pytest.mark.parametrize(
    ("model", "option"),
    [
        ({"low_noise_expert": {}}, "models.m.low_noise_expert"),
        ({"defaults": {"boundary_ratio": 0.9}}, "models.m.defaults.boundary_ratio"),
        ({"profile": PROFILE | {"step_low_noise_s": 1}}, "models.m.profile.step_low_noise_s"),
    ],
)
def test_options_of_a_second_expert_have_no_effect_on_one(model, option):
    with pytest.raises(ValueError, match=f"{option} has no effect"):
        one(wan_config=WAN21_T2V_14B, **model)


def test_num_replicas_beside_autoscaling_has_no_effect():
    with pytest.raises(ValueError, match="num_replicas has no effect beside autoscaling"):
        one({"num_replicas": 2, "autoscaling": {"max_replicas": 3}})


def test_autoscaling_gives_the_bounds_of_the_replicas():
    groups = high(one({"autoscaling": {"max_replicas": 3}, "num_workers": 2}))
    assert (groups.min_replicas, groups.max_replicas, groups.max_gpus) == (1, 3, 6)


def test_placement_of_one_worker_has_no_effect():
    with pytest.raises(ValueError, match="placement_strategy has no effect on one worker"):
        one({"placement_strategy": "SPREAD"})


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"attention": "sage", "ring_degree": 2}, "sage gives no log-sum-exp, which ring 2 needs"),
        (
            {"attention": "flash_attn_4", "ring_degree": 2, "parallel_backend": "xfuser"},
            "flash_attn_4 gives no log-sum-exp under xfuser",
        ),
        ({"parallel_backend": "xfuser"}, r"\.parallel_backend has no effect on one worker"),
        (
            {"parallel_backend": "xfuser", "num_workers": 2, "num_gpus": 0},
            "parallel_backend xfuser needs GPUs",
        ),
        ({"shard_weights": True}, r"\.shard_weights has no effect on one worker"),
        ({"offload": True, "num_gpus": 0}, r"\.offload has no effect without a GPU"),
        ({"precision": "fp8", "offload": True}, "precision fp8 and offload exclude each other"),
        ({"precision": "fp8", "dtype": "float32"}, "leave out dtype float32"),
        (
            {"offload": True, "shard_weights": True, "num_workers": 2},
            "shard_weights and offload exclude each other",
        ),
    ],
)
def test_kernels_and_places_of_weights_that_cannot_be_together_are_refused(expert, message):
    with pytest.raises(ValueError, match=f"models.m.high_noise_expert.*{message}"):
        one(expert)


def test_how_an_expert_computes_reaches_its_engine():
    given = {
        "attention": "cudnn", "parallel_backend": "xfuser", "shard_weights": True, "ring_degree": 2,
    }  # fmt: skip
    kwargs = group_spec(stages.Expert, high(one(given)), "wan_model.engine").engine_kwargs
    assert given.items() <= kwargs.items()
    assert kwargs["offload"] is False


def test_a_group_of_several_decodes_by_rows():
    for num_workers, split in ((1, False), (2, True)):
        service = resolve({"m": {"checkpoint": "x"}}, vae={"num_workers": num_workers})
        spec = group_spec(stages.VAE, service.vaes["VAE"], "wan_model.engine")
        assert len(spec.bundles()) == num_workers
        assert spec.engine_kwargs.get("split_rows", False) is split


def test_a_bound_on_predicted_seconds_needs_predictions():
    with pytest.raises(ValueError, match="jobs.max_queued_s has no effect on m"):
        resolve({"m": {"checkpoint": "x"}}, jobs={"max_queued_s": 10})
    model = {"checkpoint": "x", "profile": PROFILE}
    assert resolve({"m": model}, jobs={"max_queued_s": 10}).http.max_queued_s == 10


def test_a_data_dir_that_nothing_is_kept_in_has_no_effect():
    with pytest.raises(ValueError, match="data_dir has no effect"):
        resolve(
            {"m": {"checkpoint": "x"}}, data_dir="/d", job_store_url="postgresql://h/d",
            artifacts_url="s3://b",
        )  # fmt: skip


def test_the_data_dir_comes_from_the_file_then_the_environment_then_the_home_folder():
    model = {"m": {"checkpoint": "x"}}
    environ = {"WAN_DATA_DIR": "/from/environment"}
    from_file = resolve(model, environ=environ, data_dir="/from/file")
    from_environment = resolve(model, environ=environ)
    assert from_file.artifacts_url == "/from/file/artifacts"
    assert from_environment.job_store_url == "sqlite:////from/environment/jobs.sqlite"
    assert resolve(model).data_dir.parts[-3:] == (".local", "share", "wan-serve")


def test_api_keys_leave_the_environment_only_as_digests():
    service = resolve({"m": {"checkpoint": "x"}}, environ={"WAN_API_KEYS": " one, two ,,"})
    assert [len(digest) for digest in service.http.api_key_digests] == [64, 64]
    assert "one" not in repr(service.http.api_key_digests)


def test_keys_that_hold_no_key_do_not_open_the_service():
    with pytest.raises(ValueError, match="WAN_API_KEYS is set but holds no key"):
        resolve({"m": {"checkpoint": "x"}}, environ={"WAN_API_KEYS": " , "})


def told(caplog, environ):
    """What build() logs of an environment: [(level, line)]."""
    caplog.set_level(logging.INFO, logger.name)
    with_propagation, logger.propagate = logger.propagate, False  # Serve's may or may not
    logger.addHandler(caplog.handler)
    try:
        log_environment(resolve({"m": {"checkpoint": "x"}}, environ=environ))
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = with_propagation
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_what_the_environment_has_come_to_is_logged_without_its_secrets(caplog):
    environ = {
        "WAN_API_KEYS": "hunter2,hunter3",
        "WAN_JOB_STORE_URL": "postgresql://me:hunter2@host/jobs?passfile=hunter2",
        "WAN_ARTIFACTS_URL": "s3://me:hunter2@bucket/prefix?secret=hunter2",
    }
    lines = told(caplog, environ)
    assert lines == [("INFO", "API keys: 2; job table: postgresql; artifacts: s3://bucket/prefix")]
    assert "hunter" not in caplog.text


def test_a_service_without_keys_is_warned_of(caplog):
    [(_, settings), (level, warning)] = told(caplog, {"WAN_DATA_DIR": "/data"})
    assert settings == "API keys: 0; job table: sqlite; artifacts: /data/artifacts"
    assert (level, "WAN_API_KEYS is not set" in warning) == ("WARNING", True)


def test_a_models_defaults_replace_its_rows():
    model = {"checkpoint": "x", "defaults": {"num_steps": 4, "solver": "euler", "cache": 0.1}}
    served = resolve({"m": model}).served_models["m"]
    assert served.config == replace(WAN_TINY, num_steps=4)
    assert (served.default_solver, served.default_cache) == ("euler", 0.1)


def test_limits_follow_the_defaults_unless_stated():
    auto = one(wan_config=WAN_TINY).served_models["m"]
    stated = one(wan_config=WAN_TINY, max_area=20_000, max_num_frames=18, max_num_steps=77)
    stated = stated.served_models["m"]
    assert (auto.max_area, auto.max_num_frames) == (128 * 128, 33)
    limits = stated.max_area, stated.max_num_frames, stated.max_num_steps
    assert limits == (20_000, 18, 77)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"defaults": {"width": 833}}, r"\.defaults: width 833 is not a multiple of 16: try 832"),
        ({"defaults": {"num_frames": 50}}, r"\.defaults: num_frames 50 is not 4n\+1"),
        ({"defaults": {"guidance_low_noise": 101}}, r"\.defaults: guidance_low_noise must be"),
        ({"defaults": {"num_steps": 200}}, ": .*num_steps must be at most 100 .*max_num_steps"),
        ({"max_area": 399_360}, r": .*width 1280 \* height 720 = 921600 pixels is more .*max_area"),
        ({"max_num_frames": 49}, ": .*num_frames must be at most 49 .*max_num_frames.*defaults"),
    ],
)
def test_defaults_that_every_plain_request_would_fail_with_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^models.m{message}"):
        one(**options)


def test_the_profile_of_one_expert_serves_both_when_it_names_one():
    profile = one(wan_config=WAN_TINY, profile=PROFILE).served_models["m"].profile
    assert profile.step_low_noise_s == profile.step_high_noise_s == 0.5


def test_the_models_and_their_checkpoints_must_match():
    with pytest.raises(ValueError, match="served are"):
        resolve({"m": {"checkpoint": "x"}}, {"other": WAN_TINY})
