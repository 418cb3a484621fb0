"""Names of tensors: the official checkpoints', diffusers', transformers' and ours.

Owns every key map, as tables that are read in both directions. Knows nothing about files. Ours are
the official names, except that q, k, v of self-attention and k, v of cross-attention are stacked
in one linear each, and that the text encoder has transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wan_model.config import VAEConfig

Layout = Literal["official", "diffusers"]


class CheckpointError(ValueError):
    """A checkpoint or LoRA file cannot be used; the sentence names the file and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Part `index` of the `of` equal parts, along dim 0, of our parameter `name`."""

    name: str
    index: int = 0
    of: int = 1

    def part(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this slot is."""
        if self.of == 1:
            return parameter
        size = parameter.shape[0] // self.of
        return parameter.narrow(0, self.index * size, size)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        first, *rest = parameter.shape
        return (first // self.of, *rest)


# ------------------------------------------------------------------------------- transformer

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
TRANSFORMER_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "blocks.N.modulation": "blocks.N.scale_shift_table",
    **{f"blocks.N.self_attn.{ours}": f"blocks.N.attn1.{d}" for ours, d in _ATTENTION.items()},
    **{f"blocks.N.cross_attn.{ours}": f"blocks.N.attn2.{d}" for ours, d in _ATTENTION.items()},
    # The affine norm is the third in the official counting and the second in diffusers'.
    "blocks.N.norm3": "blocks.N.norm2",
    "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
    "blocks.N.ffn.2": "blocks.N.ffn.net.2",
}
"""official -> diffusers; a `modulation` is a parameter itself, the others have weight and bias."""

_FUSED = {"self_attn.qkv": ("q", "k", "v"), "cross_attn.kv": ("k", "v")}


def official_to_diffusers_transformer(key: str) -> str:
    """Raises KeyError for a key that the transformer does not have."""
    return _rename(key, TRANSFORMER_MODULES)


def official_to_ours(key: str) -> Slot:
    """The slot of an official transformer tensor (any other name is ours already)."""
    for fused, parts in _FUSED.items():
        attention = fused.partition(".")[0]
        found = re.fullmatch(rf"(blocks\.\d+\.){attention}\.(\w)\.(weight|bias)", key)
        if found and found[2] in parts:
            name = f"{found[1]}{fused}.{found[3]}"
            return Slot(name=name, index=parts.index(found[2]), of=len(parts))
    return Slot(name=key)


def ours_to_official(name: str) -> tuple[str, ...]:
    """The official tensors that are stacked in our transformer parameter `name`, in order."""
    for fused, parts in _FUSED.items():
        if f".{fused}." in name:
            attention = fused.partition(".")[0]
            return tuple(name.replace(fused, f"{attention}.{part}") for part in parts)
    return (name,)


def transformer_slots(names: Iterable[str], layout: Layout) -> dict[str, Slot]:
    """Key in the files -> slot, for our parameters `names`."""
    keys = [key for name in names for key in ours_to_official(name)]
    rename = official_to_diffusers_transformer if layout == "diffusers" else str
    return {rename(key): official_to_ours(key) for key in keys}


# ------------------------------------------------------------------------------------- vae

_VAE_ENDS = {
    "conv1": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
}
_VAE_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}


def official_to_diffusers_vae(key: str, config: VAEConfig) -> str:
    """Stages are flat lists in the official 2.1 VAE; `config` says where each one begins."""
    for ours, theirs in {"conv1.": "quant_conv.", "conv2.": "post_quant_conv."}.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    half, _, rest = key.partition(".")
    for ours, theirs in _VAE_ENDS.items():
        if rest.startswith(f"{ours}."):
            rest = theirs + rest.removeprefix(ours)
            break
    else:
        rest = _vae_stage(rest, config)
    for ours, theirs in _VAE_RESIDUAL.items():
        rest = rest.replace(ours, theirs)
    return f"{half}.{rest}"


def _vae_stage(rest: str, config: VAEConfig) -> str:
    kind, index, rest = rest.split(".", 2)
    up = kind == "upsamples"
    num_resnets = config.num_res_blocks + up
    if config.version == "2.2":
        _, layer, rest = rest.split(".", 2)
        resample = "upsampler" if up else "downsampler"
        module = f"resnets.{layer}" if int(layer) < num_resnets else resample
        return f"{'up' if up else 'down'}_blocks.{index}.{module}.{rest}"
    if not up:
        return f"down_blocks.{index}.{rest}"
    stage, layer = divmod(int(index), num_resnets + 1)
    module = f"resnets.{layer}" if layer < num_resnets else "upsamplers.0"
    return f"up_blocks.{stage}.{module}.{rest}"


def vae_slots(names: Iterable[str], layout: Layout, config: VAEConfig) -> dict[str, Slot]:
    """Key in the files -> slot, for our (= the official) parameters `names`."""
    if layout == "official":
        return {name: Slot(name=name) for name in names}
    return {official_to_diffusers_vae(name, config): Slot(name=name) for name in names}


# ---------------------------------------------------------------------------- text encoder

_TEXT_ENCODER_MODULES = {
    "token_embedding": "shared",
    "blocks.N.norm1": "encoder.block.N.layer.0.layer_norm",
    **{f"blocks.N.attn.{part}": f"encoder.block.N.layer.0.SelfAttention.{part}" for part in "qkvo"},
    "blocks.N.pos_embedding.embedding": (
        "encoder.block.N.layer.0.SelfAttention.relative_attention_bias"
    ),
    "blocks.N.norm2": "encoder.block.N.layer.1.layer_norm",
    "blocks.N.ffn.gate.0": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "blocks.N.ffn.fc1": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "blocks.N.ffn.fc2": "encoder.block.N.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}
_TO_OFFICIAL_TEXT_ENCODER = {theirs: ours for ours, theirs in _TEXT_ENCODER_MODULES.items()}
TIED_EMBEDDING = "encoder.embed_tokens.weight"
"""The second name of `shared.weight`: files may hold either, or both."""


def text_encoder_slots(names: Iterable[str], layout: Layout) -> dict[str, Slot]:
    """Key in the files -> slot, for our (= transformers') parameters `names`."""
    names = [name for name in names if name != TIED_EMBEDDING]
    if layout == "official":
        return {_rename(name, _TO_OFFICIAL_TEXT_ENCODER): Slot(name=name) for name in names}
    slots = {name: Slot(name=name) for name in names}
    return slots | {TIED_EMBEDDING: Slot(name="shared.weight")}


# -------------------------------------------------------------------------- state dictionaries


def to_ours(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """A state dict under our names from one under the files' names, q, k, v stacked."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, slot in slots.items():
        if key in tensors:
            parts.setdefault(slot.name, {})[slot.index] = tensors[key]
    return {
        name: torch.cat([found[i] for i in sorted(found)]) if len(found) > 1 else found[0]
        for name, found in parts.items()
    }


def from_ours(state: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """The inverse of `to_ours`; each tensor has its own memory. Second names are left out."""
    return {
        key: slot.part(state[slot.name]).detach().clone(memory_format=torch.contiguous_format)
        for key, slot in slots.items()
        if key != TIED_EMBEDDING
    }


def _rename(key: str, table: Mapping[str, str]) -> str:
    """Look a tensor's module up in a table whose names say N for the block's number."""
    module, _, suffix = key.rpartition(".")
    if suffix not in ("weight", "bias"):
        module, suffix = key, ""
    number = re.search(r"\bblocks?\.(\d+)\.", module)
    if number:
        module = f"{module[: number.start(1)]}N{module[number.end(1) :]}"
    renamed = table[module]
    if number:
        renamed = renamed.replace(".N.", f".{number[1]}.")
    return f"{renamed}.{suffix}" if suffix else renamed
