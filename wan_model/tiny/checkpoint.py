"""Complete random checkpoints of the released models' structure, small enough for any machine.

Owns their sizes, their scaled random weights and their tokenizer. Knows nothing about training: a
text encoder, two different experts and a VAE are there to be computed with, not to be looked at.

The weights are scaled so that every path matters: attention is far from uniform, modulations and
norms from one, and the text, the time and the position each change the output visibly, while the
output stays of order 1 and the loop does not amplify rounding.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from wan_model.checkpoint_keys import Layout
from wan_model.checkpoint_writer import save_checkpoint
from wan_model.config import (
    I2V_A14B,
    NEGATIVE_PROMPT,
    T2V_A14B,
    TI2V_5B,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    WanConfig,
)
from wan_model.transformer import WanTransformer
from wan_model.vae import WanVAE

TASKS = {row.name: row for row in (T2V_A14B, I2V_A14B, TI2V_5B)}
State = dict[str, Tensor]

_VOCAB_SIZE = 512
_CORPUS = (
    "a red circle moves to the left on a dark background",
    "two cats in boxing gloves fight on a stage under a bright light",
    "a blue square grows while the camera pans over a checkered floor",
    "a green star rotates in the sky above the sea, waves roll in slowly",
    "a yellow triangle falls and comes to rest, cinematic light, close-up",
    NEGATIVE_PROMPT,
)


def tiny_config(task: str) -> WanConfig:
    """The row of a released model (`TASKS`) with small networks of the same structure."""
    row = TASKS[task]
    channels = {"in_channels": row.transformer.in_channels, "out_channels": row.vae.z_dim}
    return replace(
        row,
        # 16 splits into 8, 4, 4 for the rotary embedding, and 8 heads over up to 8 ranks.
        transformer=TransformerConfig(
            dim=128, num_heads=8, num_layers=2, ffn_dim=64, text_dim=32, **channels
        ),
        vae=replace(row.vae, encoder_dim=8, decoder_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1),
        text_encoder=TextEncoderConfig(
            vocab_size=_VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
    )


def write_tiny_checkpoint(
    folder: str | Path,
    *,
    task: str,
    layout: Layout = "diffusers",
    seed: int = 0,
    overwrite: bool = False,
    shard_bytes: int = 2**20,
) -> WanConfig:
    """Writes all components; the same seed gives the same weights in both layouts.

    Raises ValueError for an unknown task, a seed torch cannot take, or a folder with something in
    it, unless `overwrite`, which removes what is there.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite or not folder.is_dir():
            raise ValueError(f"{folder} exists and is not an empty folder")
        shutil.rmtree(folder)
    config = tiny_config(task)
    save_checkpoint(
        folder,
        layout=layout,
        config=config,
        transformers={
            expert: random_transformer(config.transformer, seed=4 * seed + number)
            for number, expert in enumerate(config.experts)
        },
        vae=random_vae(config.vae, seed=4 * seed + 2),
        text_encoder=random_text_encoder(config.text_encoder, seed=4 * seed + 3),
        tokenizer=tiny_tokenizer().to_str(),
        shard_bytes=shard_bytes,
    )
    return config


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE, so that it spells any text, with T5's special tokens and end of text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


# ------------------------------------------------------------------------------------ weights


def random_transformer(config: TransformerConfig, *, seed: int) -> State:
    """Norm weights around 1.5 make attention choose; the head makes an output of order 1."""
    with torch.device("meta"):
        model = WanTransformer(config)

    def draw(name: str, normal: Tensor) -> Tensor:
        if name.endswith("modulation"):
            return 0.3 * normal
        if ".norm" in name:
            middle = 1.5 if "norm_" in name else 1.0
            return (0.0 if name.endswith("bias") else middle) + 0.2 * normal
        if name.endswith("bias"):
            return 0.1 * normal
        gain = {"time_projection": 0.5, "head": 0.7, "text_embedding": 1.5}
        return gain.get(name.partition(".")[0], 1.0) * _by_fan_in(normal)

    return _draw(_shapes(model), draw, seed)


def random_vae(config: VAEConfig, *, seed: int) -> State:
    """Frames of about 0.4 around zero, hence seldom clamped; latents of order 1."""
    with torch.device("meta"):
        model = WanVAE(config)
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)

    def draw(name: str, normal: Tensor) -> Tensor:
        if name.endswith("gamma"):
            return 1.0 + 0.2 * normal
        if name == "conv1.bias":
            return torch.cat([mean, torch.zeros_like(mean)])
        if name == "conv1.weight":
            rows = torch.cat([std, std])[:, None, None, None, None]
            return rows * _by_fan_in(normal)
        if name.endswith("bias"):
            return 0.1 * normal
        gain = 0.7 if name == "decoder.head.2.weight" else 1.2
        return gain * _by_fan_in(normal)

    return _draw(_shapes(model), draw, seed)


def random_text_encoder(config: TextEncoderConfig, *, seed: int) -> State:
    """Scores of order 1: this attention is not divided by the root of d_kv."""
    from wan_model.text_encoder import build_umt5

    with torch.device("meta"):
        model = build_umt5(config)

    def draw(name: str, normal: Tensor) -> Tensor:
        if "layer_norm" in name:
            return 1.0 + 0.2 * normal
        if name == "shared.weight" or "relative_attention_bias" in name:
            return normal
        gain = config.d_kv**-0.5 if ".q.weight" in name else 1.0
        return gain * _by_fan_in(normal)

    return _draw(_shapes(model), draw, seed)


def _draw(
    shapes: Iterable[tuple[str, torch.Size]], draw: Callable[[str, Tensor], Tensor], seed: int
) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: draw(name, torch.randn(shape, generator=generator, dtype=torch.float32))
        for name, shape in shapes
    }


def _shapes(model: torch.nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def _by_fan_in(normal: Tensor) -> Tensor:
    return normal / math.sqrt(normal[0].numel())
