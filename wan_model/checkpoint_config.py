"""The configuration files of a checkpoint <-> the numbers of wan_model.config.

Owns the names in model_index.json and config.json of both layouts, and what can be read from the
shapes of the official .pth files. Knows nothing about folders or how tensors are loaded. Defaults
(shift, guidance, boundary, fps, negative prompt) are never read here: the converted repositories
state other values for them than the models were released with, so they come from our rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wan_model.config import (
    ROWS,
    VAE_2_1,
    VAE_2_2,
    Task,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    WanConfig,
    row_for,
)

Json = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

ROW_KEY = "_wan_row"
SHARED_KEY = "_shared"
_TEXT_DIM = TransformerConfig.text_dim
_STATISTICS = {
    vae.z_dim: {"latents_mean": vae.latents_mean, "latents_std": vae.latents_std}
    for vae in (VAE_2_1, VAE_2_2)
}


def choose_row(*, task: Task, num_experts: int, dim: int, named: str | None) -> WanConfig:
    """The row of defaults: the one the checkpoint names (`_wan_row`), else the one that fits."""
    if named is None:
        return row_for(task=task, num_experts=num_experts, dim=dim)
    row = ROWS.get(named)
    if row is None:
        raise ValueError(f"{ROW_KEY} {named!r} is not one of {', '.join(ROWS)}")
    if (row.task, row.num_experts) != (task, num_experts):
        raise ValueError(f"{ROW_KEY} {named!r} does not fit {task} with {num_experts} expert(s)")
    return row


# ------------------------------------------------------------------------------------ official


def official_task(config: Json) -> Task:
    if config.get("_class_name") != "WanModel":
        raise ValueError(f"_class_name is {config.get('_class_name')!r}, not 'WanModel'")
    if config["model_type"] not in ("t2v", "i2v", "ti2v"):
        raise ValueError(f"model_type {config['model_type']!r} is not t2v, i2v or ti2v")
    return config["model_type"]


def transformer_from_official(config: Json) -> TransformerConfig:
    return TransformerConfig(
        dim=config["dim"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        ffn_dim=config["ffn_dim"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config.get("text_dim", _TEXT_DIM),  # the released models do not store it
        text_len=config["text_len"],
        freq_dim=config["freq_dim"],
        eps=config["eps"],
    )


def transformer_to_official(config: TransformerConfig, task: Task) -> Json:
    text_dim = {} if config.text_dim == _TEXT_DIM else {"text_dim": config.text_dim}
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": task,
        "text_len": config.text_len,
        "in_dim": config.in_channels,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "eps": config.eps,
        **text_dim,
    }


def vae_from_shapes(shapes: Shapes) -> VAEConfig:
    """From the tensors of Wan2.1_VAE.pth or Wan2.2_VAE.pth. Raises KeyError for other files."""
    is_2_2 = "encoder.downsamples.0.downsamples.0.residual.0.gamma" in shapes
    encoder_dim, in_channels = shapes["encoder.conv1.weight"][:2]
    z_dim = shapes["conv2.weight"][0]
    if z_dim not in _STATISTICS:
        raise ValueError(f"no latent statistics are known for a VAE of {z_dim} latent channels")
    stages = _encoder_stages(shapes)
    dim_mult = tuple(stage[0] // encoder_dim for stage in stages)
    return VAEConfig(
        version="2.2" if is_2_2 else "2.1",
        encoder_dim=encoder_dim,
        decoder_dim=shapes["decoder.head.0.gamma"][0] // dim_mult[0],
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=stages[0][1],
        temporal_downsample=tuple(stage[2] for stage in stages[:-1]),
        patch_size=round((in_channels / 3) ** 0.5),
        **_STATISTICS[z_dim],
    )


def _encoder_stages(shapes: Shapes) -> list[tuple[int, int, bool]]:
    """(channels, residual blocks, halves time) of each stage of the encoder.

    A stage is blocks and then a resampling, which only the last one lacks. That holds for the flat
    list of 2.1 as for the lists of lists of 2.2.
    """
    layers: dict[tuple[int, ...], str] = {}
    for key in shapes:
        found = re.match(r"encoder\.downsamples\.(\d+\.(?:downsamples\.\d+\.)?)", key)
        if found:
            place = tuple(int(number) for number in re.findall(r"\d+", found[1]))
            layers[place] = found[0]
    stages, dim, num_blocks = [], 0, 0
    for _, prefix in sorted(layers.items()):
        if f"{prefix}resample.1.weight" in shapes:
            stages.append((dim, num_blocks, f"{prefix}time_conv.weight" in shapes))
            num_blocks = 0
        else:
            dim = shapes[f"{prefix}residual.6.weight"][0]
            num_blocks += 1
    return [*stages, (dim, num_blocks, False)]


def text_encoder_from_shapes(shapes: Shapes) -> TextEncoderConfig:
    """From the tensors of models_t5_*.pth. Raises KeyError for other files."""
    vocab_size, d_model = shapes["token_embedding.weight"]
    num_heads = shapes["blocks.0.pos_embedding.embedding.weight"][1]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes["blocks.0.attn.q.weight"][0] // num_heads,
        d_ff=shapes["blocks.0.ffn.gate.0.weight"][0],
        num_layers=len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        num_heads=num_heads,
    )


# ----------------------------------------------------------------------------------- diffusers


def diffusers_task(index: Json, transformer: Json) -> tuple[Task, int]:
    """(task, number of experts), from model_index.json and transformer/config.json.

    `expand_timesteps` marks TI2V (whichever pipeline class is named); an image pipeline, or latent
    channels that are only input, mark I2V.
    """
    name = index.get("_class_name")
    if name not in ("WanPipeline", "WanImageToVideoPipeline"):
        raise ValueError(f"_class_name is {name!r}, not a Wan pipeline")
    num_experts = 2 if (index.get("transformer_2") or [None])[0] else 1
    if index.get("expand_timesteps"):
        return "ti2v", num_experts
    has_image_channels = transformer["in_channels"] != transformer["out_channels"]
    is_image = name == "WanImageToVideoPipeline" or has_image_channels
    return "i2v" if is_image else "t2v", num_experts


_TEXT_LEN = 512  # of every released model; the Diffusers layout says it only where it differs


def transformer_from_diffusers(config: Json) -> TransformerConfig:
    if config.get("image_dim") or config.get("added_kv_proj_dim"):
        raise ValueError("image_dim is set: Wan2.1 I2V with CLIP image tokens is not supported")
    return TransformerConfig(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        ffn_dim=config["ffn_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        text_dim=config["text_dim"],
        text_len=config.get("text_len", _TEXT_LEN),
        freq_dim=config["freq_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config["eps"],
    )


def transformer_to_diffusers(config: TransformerConfig) -> Json:
    text_len = {} if config.text_len == _TEXT_LEN else {"text_len": config.text_len}
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.36.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
        **text_len,
    }


def vae_from_diffusers(config: Json) -> VAEConfig:
    """Numbers that converted 2.1 files leave out have diffusers' own defaults."""
    return VAEConfig(
        version="2.2" if config.get("is_residual") else "2.1",
        encoder_dim=config["base_dim"],
        decoder_dim=config.get("decoder_base_dim") or config["base_dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
        patch_size=config.get("patch_size") or 1,
        latents_mean=tuple(config["latents_mean"]),
        latents_std=tuple(config["latents_std"]),
    )


def vae_to_diffusers(config: VAEConfig) -> Json:
    pixel_channels = 3 * config.patch_size**2
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.36.0",
        "attn_scales": [],
        "base_dim": config.encoder_dim,
        "decoder_base_dim": config.decoder_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "in_channels": pixel_channels,
        "is_residual": config.version == "2.2",
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "out_channels": pixel_channels,
        "patch_size": config.patch_size if config.patch_size > 1 else None,
        "scale_factor_spatial": config.stride[1],
        "scale_factor_temporal": config.stride[0],
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def text_encoder_from_diffusers(config: Json) -> TextEncoderConfig:
    if config.get("model_type") != "umt5":
        raise ValueError(f"model_type is {config.get('model_type')!r}, not 'umt5'")
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return TextEncoderConfig(**{name: config[name] for name in names})


def text_encoder_to_diffusers(config: TextEncoderConfig) -> Json:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


def model_index(config: WanConfig, *, tokenizer_class: str = "PreTrainedTokenizerFast") -> Json:
    """model_index.json of a saved model; the keys of our own begin with an underscore."""
    transformer = ["diffusers", "WanTransformer3DModel"]
    is_image = config.task == "i2v"
    image_parts = {"image_encoder": [None, None], "image_processor": [None, None]}
    return {
        "_class_name": "WanImageToVideoPipeline" if is_image else "WanPipeline",
        "_diffusers_version": "0.36.0",
        "boundary_ratio": config.boundary_ratio,
        "expand_timesteps": config.task == "ti2v",
        **(image_parts if is_image else {}),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": transformer,
        "transformer_2": transformer if config.num_experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def scheduler_config(config: WanConfig) -> Json:
    """As the converted repositories have it: their flow_shift is not the models' own shift."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.36.0",
        "final_sigmas_type": "zero",
        "flow_shift": 5.0 if config.task == "ti2v" else 3.0,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def check_parts_fit(config: WanConfig) -> None:
    """Raises ValueError when the networks of `config` cannot work together."""
    transformer, vae, text = config.transformer, config.vae, config.text_encoder
    if transformer.out_channels != vae.z_dim:
        raise ValueError(
            f"transformer out_channels {transformer.out_channels} != vae z_dim {vae.z_dim}"
        )
    if transformer.text_dim != text.d_model:
        raise ValueError(
            f"transformer text_dim {transformer.text_dim} != text encoder d_model {text.d_model}"
        )
    in_channels = vae.z_dim * (2 if config.task == "i2v" else 1)
    in_channels += vae.stride[0] if config.task == "i2v" else 0
    if transformer.in_channels != in_channels:
        raise ValueError(
            f"{config.task} needs transformer in_channels {in_channels}, "
            f"not {transformer.in_channels}"
        )


def with_parts(
    row: WanConfig,
    *,
    transformer: TransformerConfig,
    vae: VAEConfig,
    text_encoder: TextEncoderConfig,
) -> WanConfig:
    """The row with the checkpoint's own architecture numbers."""
    config = replace(row, transformer=transformer, vae=vae, text_encoder=text_encoder)
    check_parts_fit(config)
    return config
