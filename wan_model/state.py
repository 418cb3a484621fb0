"""What a job carries between steps: its conditioning and its denoising state.

Owns the wire form (`Arrays`, numpy only) of both. A DenoiseState with the job's VideoParams is all
that is needed to go on: the solver's memory is in it, so resuming is just the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wan_model.step_reuse import Reuse

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the experts look at; constant over a job.

    prompt_embeds, negative_prompt_embeds: [num_tokens, text_dim], without padding.
    image_channels: I2V only, [4 + z, T, H, W], the mask and then the image's latents.
    first_frame: TI2V with an image only, [z, 1, H, W], the clean first latent frame.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None = None
    image_channels: Tensor | None = None
    first_frame: Tensor | None = None

    @classmethod
    def from_arrays(cls, arrays: Arrays, device: torch.device | str = "cpu") -> Conditioning:
        """Raises ValueError for a name that is not a field."""
        unknown = set(arrays) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown conditioning: {', '.join(sorted(unknown))}")
        return cls(**{name: _to_tensor(array, device) for name, array in arrays.items()})


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """Latents [C, T, H, W] float32 before step `step_index`, and the solver's memory.

    x0_history: the x0 predictions of the last steps, newest first (at most 2; after any step at
    least the newest, whatever the solver).
    last_sample: the corrected sample UniPC predicted from at the last step.
    reuse: with `cache`, what the expert's last computed step found; solvers do not pass it on.
    """

    latents: Tensor
    step_index: int = 0
    x0_history: tuple[Tensor, ...] = ()
    last_sample: Tensor | None = None
    reuse: Reuse | None = None

    def to_arrays(self) -> Arrays:
        arrays = {
            "latents": _to_array(self.latents),
            "step_index": np.asarray(self.step_index, dtype=np.int64),
        }
        for k, x0 in enumerate(self.x0_history):
            arrays[f"x0_history.{k}"] = _to_array(x0)
        if self.last_sample is not None:
            arrays["last_sample"] = _to_array(self.last_sample)
        if self.reuse is not None:
            arrays |= _reuse_to_arrays(self.reuse)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, device: torch.device | str = "cpu") -> DenoiseState:
        """Raises KeyError when `latents` or `step_index` is missing."""
        history = sorted(name for name in arrays if name.startswith("x0_history."))
        last_sample = arrays.get("last_sample")
        return cls(
            latents=_to_tensor(arrays["latents"], device),
            step_index=int(arrays["step_index"]),
            x0_history=tuple(_to_tensor(arrays[name], device) for name in history),
            last_sample=None if last_sample is None else _to_tensor(last_sample, device),
            reuse=_reuse_from_arrays(arrays, device),
        )


def _reuse_to_arrays(reuse: Reuse) -> Arrays:
    arrays = {"reuse.step_index": np.asarray(reuse.step_index, dtype=np.int64)}
    for name in ("latents", "velocity", "slope"):
        if getattr(reuse, name) is not None:
            arrays[f"reuse.{name}"] = _to_array(getattr(reuse, name))
    if reuse.sensitivity is not None:
        arrays["reuse.sensitivity"] = np.asarray(reuse.sensitivity, dtype=np.float64)
    return arrays


def _reuse_from_arrays(arrays: Arrays, device: torch.device | str) -> Reuse | None:
    fields = {
        name.removeprefix("reuse."): array
        for name, array in arrays.items()
        if name.startswith("reuse.")
    }
    numbers = {"step_index": int, "sensitivity": float}
    values = {
        name: numbers[name](array) if name in numbers else _to_tensor(array, device)
        for name, array in fields.items()
    }
    return Reuse(**values) if values else None


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """Standard normal [C, T, H, W] float32 from a CPU generator: the same on any machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _to_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _to_tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    # Arrays that come out of the object store are read-only views: copy once, here.
    return torch.tensor(array, dtype=torch.float32, device=device)
