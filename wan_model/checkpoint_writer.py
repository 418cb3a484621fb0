"""Networks -> a checkpoint folder that others can load too, in either layout.

Owns the file names and shards that are written; names of tensors and of numbers are
`checkpoint_keys`' and `checkpoint_config`'s. Knows nothing about where the weights came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan_model import checkpoint_config
from wan_model.checkpoint_keys import (
    Layout,
    from_ours,
    text_encoder_slots,
    transformer_slots,
    vae_slots,
)
from wan_model.config import Expert, WanConfig
from wan_model.transformer import is_float32_island

State = Mapping[str, Tensor]

SHARD_BYTES = 5 * 10**9


def save_checkpoint(
    folder: str | Path,
    *,
    layout: Layout,
    config: WanConfig,
    transformers: Mapping[Expert, State],
    vae: State | None,
    text_encoder: State | None,
    tokenizer: str | None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    row: str | None = None,
    shared: Mapping[str, str] | None = None,
) -> None:
    """Write a complete model: state dicts under our names, `tokenizer` the text of tokenizer.json.

    `dtype` is that of the transformers (whose float32 islands stay float32) and the text encoder.
    `row` names the row of defaults to read it with. In the Diffusers layout components may be left
    out (None) that `shared` says lie in another folder: {"vae": "../wan-tiny"}.
    """
    if set(transformers) != set(config.experts):
        raise ValueError(f"{config.name} has experts {[*config.experts]}, not {[*transformers]}")
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    absent = {name for name, part in parts.items() if part is None}
    if absent != set(shared or {}) or (absent and layout == "official"):
        raise ValueError(f"{sorted(absent)} are absent but {sorted(shared or {})} are shared")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    write = _write_official if layout == "official" else _write_diffusers
    files = {}
    for expert, state in transformers.items():
        slots = transformer_slots(state, layout)
        tensors = from_ours(state, slots)
        files[expert] = {
            key: tensor.to(torch.float32 if is_float32_island(slots[key].name) else dtype)
            for key, tensor in tensors.items()
        }
    vae_tensors = text_tensors = None
    if vae is not None:
        vae_tensors = _cast(from_ours(vae, vae_slots(vae, layout, config.vae)), vae_dtype)
    if text_encoder is not None:
        slots = text_encoder_slots(text_encoder, layout)
        text_tensors = _cast(from_ours(text_encoder, slots), dtype)
    extra = {} if row is None else {checkpoint_config.ROW_KEY: row}
    if shared:
        extra[checkpoint_config.SHARED_KEY] = dict(shared)
    write(root, config, files, vae_tensors, text_tensors, tokenizer, shard_bytes, extra)


def _write_official(
    root: Path,
    config: WanConfig,
    transformers: Mapping[Expert, State],
    vae: State,
    text_encoder: State,
    tokenizer: str,
    shard_bytes: int,
    extra: dict,
) -> None:
    for expert, tensors in transformers.items():
        folder = root if config.num_experts == 1 else root / f"{expert.value}_model"
        content = checkpoint_config.transformer_to_official(config.transformer, config.task)
        _write_json(folder / "config.json", content | extra)
        _write_shards(folder, "diffusion_pytorch_model", tensors, shard_bytes)
    torch.save(dict(vae), root / f"Wan{config.vae.version}_VAE.pth")
    torch.save(dict(text_encoder), root / "models_t5_umt5-xxl-enc-bf16.pth")
    _write_tokenizer(root / "google" / "umt5-xxl", tokenizer)


def _write_diffusers(
    root: Path,
    config: WanConfig,
    transformers: Mapping[Expert, State],
    vae: State | None,
    text_encoder: State | None,
    tokenizer: str | None,
    shard_bytes: int,
    extra: dict,
) -> None:
    _write_json(root / "model_index.json", checkpoint_config.model_index(config) | extra)
    _write_json(
        root / "scheduler" / "scheduler_config.json", checkpoint_config.scheduler_config(config)
    )
    for expert, tensors in transformers.items():
        folder = root / ("transformer" if expert is Expert.HIGH_NOISE else "transformer_2")
        content = checkpoint_config.transformer_to_diffusers(config.transformer)
        _write_json(folder / "config.json", content)
        _write_shards(folder, "diffusion_pytorch_model", tensors, shard_bytes)
    if vae is not None:
        _write_json(root / "vae" / "config.json", checkpoint_config.vae_to_diffusers(config.vae))
        _write_shards(root / "vae", "diffusion_pytorch_model", vae, shard_bytes)
    if text_encoder is not None:
        content = checkpoint_config.text_encoder_to_diffusers(config.text_encoder)
        _write_json(root / "text_encoder" / "config.json", content)
        _write_shards(root / "text_encoder", "model", text_encoder, shard_bytes)
    if tokenizer is not None:
        _write_tokenizer(root / "tokenizer", tokenizer)


def _write_tokenizer(folder: Path, tokenizer: str) -> None:
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special},
    )
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")


def _write_shards(folder: Path, stem: str, tensors: State, shard_bytes: int) -> None:
    """One file, or several of at most `shard_bytes` (unless one tensor is larger) and an index."""
    shards: list[list[str]] = [[]]
    total_bytes = used_bytes = 0
    for key, tensor in tensors.items():
        if shards[-1] and used_bytes + tensor.nbytes > shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(key)
        used_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, keys in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        path = folder / f"{stem}{part}.safetensors"
        save_file({key: tensors[key] for key in keys}, path, {"format": "pt"})
        path.chmod(0o644)  # the library makes it readable to its owner only
        weight_map |= dict.fromkeys(keys, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _cast(tensors: State, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}
