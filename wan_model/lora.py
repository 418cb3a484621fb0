"""LoRA files: what each of the five published forms adds to which weight.

Owns the names and the scales of the forms; the merge itself happens while an expert is loaded. All
deltas are float32 sums: W += strength * (alpha / rank) * up @ down, and the full differences `diff`
(weight), `diff_b` (bias) and `diff_m` (modulation) W += strength * diff.

Forms, by the beginning of their keys: "diffusion_model." with lora_down / lora_up (Lightning), the
same with diff, diff_b, diff_m (Distill), or with lora_A / lora_B (PEFT, which itself writes
"base_model.model." and an adapter_config.json); "transformer." or nothing with diffusers' module
names; "lora_unet_" with underscores for dots (kohya).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_model.checkpoint_files import NUM_NAMED, TensorFile, open_tensors, read_json
from wan_model.checkpoint_keys import (
    TRANSFORMER_MODULES,
    CheckpointError,
    Slot,
    official_to_ours,
)

_PEFT_PREFIX = "base_model.model."
_PREFIXES = ("diffusion_model.", _PEFT_PREFIX, "transformer.", "lora_unet_")
_SUFFIXES = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
}
_DORA = ("dora_scale", "lora_magnitude_vector")
_MODULES = (
    {name: name for name in TRANSFORMER_MODULES}
    | {theirs: name for name, theirs in TRANSFORMER_MODULES.items()}
    | {name.replace(".", "_"): name for name in TRANSFORMER_MODULES}
)
"""Module names of all forms, N for the block's number -> official."""


@dataclass(frozen=True, kw_only=True)
class _Delta:
    """What one file adds to one slot: `scale` * (`up` @ `down`), or `scale` * `up`."""

    key: str
    up: Tensor
    down: Tensor | None = None
    scale: float

    @property
    def num_elements(self) -> int:
        if self.down is None:
            return self.up.numel()
        return self.up.shape[0] * self.down[0].numel()

    def dense(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        delta = self.up.to(device, torch.float32)
        if self.down is not None:
            delta = delta.flatten(1) @ self.down.to(device, torch.float32).flatten(1)
        return self.scale * delta.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """One file, for one expert. `slots` are the parts of parameters it changes."""

    path: Path
    strength: float
    slots: Mapping[Slot, tuple[_Delta, ...]] = field(repr=False)

    def check_fits(self, shapes: Mapping[Slot, tuple[int, ...]]) -> None:
        """Raises CheckpointError naming keys that the model (its slots' `shapes`) cannot take."""
        unused = [d.key for slot, ds in self.slots.items() if slot not in shapes for d in ds]
        if unused:
            raise CheckpointError(f"{self.path} has {_list(unused)} that this model does not have")
        for slot, deltas in self.slots.items():
            for delta in deltas:
                if delta.num_elements != math.prod(shapes[slot]) or (
                    delta.down is not None and delta.up.shape[0] != shapes[slot][0]
                ):
                    raise CheckpointError(
                        f"{self.path}: {delta.key} does not fit a weight of shape "
                        f"{list(shapes[slot])}"
                    )

    def delta(self, slot: Slot, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The float32 difference for `slot`, strength included."""
        return self.strength * sum(delta.dense(shape, device) for delta in self.slots[slot])


def load_lora(path: str | Path, strength: float = 1.0) -> LoRA:
    """Reads a LoRA of any of the five forms. Its tensors stay mapped in the file's dtype.

    A file as PEFT's `save_pretrained` writes it ("base_model.model.") is scaled by the
    adapter_config.json beside it, and refused without one: its tensors do not tell the scale.

    Raises CheckpointError for that, for keys that no form has, incomplete pairs and DoRA.
    """
    path = Path(path)
    if not math.isfinite(strength):
        raise CheckpointError(f"{path}: strength must be a finite number, not {strength}")
    modules: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unused = []
    with open_tensors(path) as file:
        for key in file.shapes:
            if any(name in key for name in _DORA):
                raise CheckpointError(f"{path}: {key} is of a DoRA, which cannot be merged")
            module, part = _split(key)
            if module is None:
                unused.append(key)
            else:
                modules.setdefault(module, {})[part] = (key, file.tensor(key))
        peft = _peft_settings(path, file)
    slots: dict[Slot, tuple[_Delta, ...]] = {}
    for module, parts in modules.items():
        for target, delta in _deltas(path, module, parts, peft):
            slot = official_to_ours(target)
            slots[slot] = (*slots.get(slot, ()), delta)
        unused += [key for key, _ in parts.values()]
    if unused:
        raise CheckpointError(f"{path} has {_list(unused)} that are of no known LoRA form")
    if not slots:
        raise CheckpointError(f"{path} holds no LoRA")
    return LoRA(path=path, strength=strength, slots=slots)


def _deltas(
    path: Path, module: str, parts: dict[str, tuple[str, Tensor]], peft: _PEFTSettings
) -> Iterator[tuple[str, _Delta]]:
    """Takes from `parts` what belongs together: yields (official tensor, delta)."""
    is_parameter = module.endswith("modulation")
    weight = module if is_parameter else f"{module}.weight"
    if "up" in parts and "down" in parts:
        key, down = parts.pop("down")
        _, up = parts.pop("up")
        if up.flatten(1).shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{path}: {key} has rank {down.shape[0]}, its other half {up.flatten(1).shape[1]}"
            )
        rank = down.shape[0]
        scale = peft.scale(_name_and_part(key)[0], rank)
        if "alpha" in parts:
            scale = parts.pop("alpha")[1].item() / rank
        yield weight, _Delta(key=key, up=up, down=down, scale=scale)
        if "up_bias" in parts:
            key, bias = parts.pop("up_bias")
            yield f"{module}.bias", _Delta(key=key, up=bias, scale=scale)
    targets = {
        "diff": weight,
        "diff_b": f"{module}.bias",
        "diff_m": module if is_parameter else f"{module}.modulation",
    }
    for part, target in targets.items():
        if part in parts:
            key, difference = parts.pop(part)
            yield target, _Delta(key=key, up=difference, scale=1.0)


def _split(key: str) -> tuple[str | None, str]:
    """The key's official module name, None where there is no such module, and its part."""
    name, part = _name_and_part(key)
    return _official_module(name, part) if part else None, part


def _name_and_part(key: str) -> tuple[str, str]:
    """The module's name as the file has it, and the key's part of it, "" if it is none."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    for suffix, part in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removeprefix(prefix).removesuffix(suffix), part
    return "", ""


def _official_module(name: str, part: str) -> str | None:
    number = re.match(r"blocks[._](\d+)(?=[._]|$)", name)
    if number:
        name = f"blocks{name[6]}N{name[number.end() :]}"
    if part == "diff_m" and name in ("head", "blocks.N", "blocks_N"):
        module = name.replace("_", ".")
    else:
        module = _MODULES.get(name)
    if module is None:
        return None
    return module.replace(".N", f".{number[1]}") if number else module


@dataclass(frozen=True, kw_only=True)
class _PEFTSettings:
    """The scales that PEFT keeps apart from the tensors."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    uses_rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank (PEFT's rule), 1 without an alpha. Patterns are ends of the module's name
        in the file, which is its name in the model that was trained."""
        alpha = self.alpha
        for pattern, other in self.alpha_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = other
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.uses_rslora else rank)


def _peft_settings(path: Path, file: TensorFile) -> _PEFTSettings:
    """From the file's metadata (diffusers) or from the config beside it (PEFT)."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is not None:
        try:
            settings = {
                key.removeprefix("transformer."): value for key, value in json.loads(text).items()
            }
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: lora_adapter_metadata is not JSON ({error})") from error
    elif any(key.startswith(_PEFT_PREFIX) for key in file.shapes) and not any(
        key.endswith(".alpha") for key in file.shapes
    ):
        settings = _adapter_config(path)
    else:
        return _PEFTSettings()
    if settings.get("use_dora"):
        raise CheckpointError(f"{path} is a DoRA (use_dora), which cannot be merged")
    return _PEFTSettings(
        alpha=settings.get("lora_alpha"),
        alpha_pattern=settings.get("alpha_pattern") or {},
        uses_rslora=bool(settings.get("use_rslora")),
    )


def _adapter_config(path: Path) -> dict[str, Any]:
    config = path.parent / "adapter_config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{path} does not tell its scale: put the {config.name} that PEFT wrote with it "
            "beside it"
        )
    settings = read_json(config)
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise CheckpointError(f"{config} has no lora_alpha")
    return settings


def _list(keys: list[str]) -> str:
    shown = ", ".join(sorted(keys)[:NUM_NAMED])
    return f"{len(keys)} key(s) ({shown}{', ...' if len(keys) > NUM_NAMED else ''})"
