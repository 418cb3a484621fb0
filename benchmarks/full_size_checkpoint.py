"""A whole T2V-A14B checkpoint with random weights, for the service to load on a machine of GPUs.

Experts and VAE have their full size. The text encoder has its width and one layer: what a prompt
says does not matter here, and an encoding is tens of milliseconds of a job's minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.full_size_experts import random_expert
from wan_model.checkpoint_config import model_index
from wan_model.checkpoint_writer import save_checkpoint
from wan_model.config import T2V_A14B, Expert, TextEncoderConfig
from wan_model.tiny.checkpoint import random_text_encoder, random_vae, tiny_tokenizer


def write_full_size_checkpoint(folder: Path, *, device: str) -> None:
    """28.6 GB in bfloat16: both experts have the same weights, drawn on `device`, in one file."""
    small = TextEncoderConfig(
        vocab_size=512, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=4
    )
    config = replace(T2V_A14B, text_encoder=small)
    state = random_expert(config.transformer, torch.bfloat16, device).state_dict()
    save_checkpoint(
        folder,
        layout="diffusers",
        config=replace(config, num_experts=1),
        transformers={Expert.HIGH_NOISE: state},
        vae=random_vae(config.vae, seed=1),
        text_encoder=random_text_encoder(small, seed=2),
        tokenizer=tiny_tokenizer().to_str(),
        dtype=torch.bfloat16,
    )
    shutil.copytree(folder / "transformer", folder / "transformer_2", copy_function=os.link)
    (folder / "model_index.json").write_text(json.dumps(model_index(config)), "utf-8")
