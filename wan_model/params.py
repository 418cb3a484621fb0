"""VideoParams: the validated numbers of one video.

Owns the rules a request's numbers must obey (sizes, frame counts, ranges, the official size rules
for images). Knows nothing about torch, files, prompts or who asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from wan_model.config import WanConfig

SOLVERS = ("unipc", "dpm++", "euler")
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class VideoParams:
    """Everything numeric that decides a video, complete: no field is filled in later.

    `boundary_ratio` is None exactly for one-expert models; such a model uses
    `guidance_high_noise` at every step. With a `boundary_seed` the noise is drawn anew where the
    low-noise expert begins: a variant with the high-noise half's composition (solver.renoise).
    `cache` is the relative change of an expert's prediction below which a step is reused instead
    of computed (step_reuse); None computes every step.
    Raises ValueError that begins with the field's name.
    """

    width: int
    height: int
    num_frames: int
    fps: int
    num_steps: int
    seed: int
    solver: str
    shift: float
    guidance_high_noise: float
    guidance_low_noise: float
    boundary_ratio: float | None
    boundary_seed: int | None = None
    cache: float | None = None

    def __post_init__(self) -> None:
        _require_int("width", self.width, 1, 16384)
        _require_int("height", self.height, 1, 16384)
        _require_int("num_frames", self.num_frames, 1, 4097)
        _require_int("fps", self.fps, 1, 240)
        _require_int("num_steps", self.num_steps, 1, MAX_STEPS)
        _require_int("seed", self.seed, 0, MAX_SEED)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {self.solver!r}")
        _require_float("shift", self.shift, 0.01, 1000.0)
        _require_float("guidance_high_noise", self.guidance_high_noise, 0.0, 100.0)
        _require_float("guidance_low_noise", self.guidance_low_noise, 0.0, 100.0)
        if self.boundary_ratio is not None:
            _require_float("boundary_ratio", self.boundary_ratio, 0.0, 1.0)
        if self.boundary_seed is not None:
            _require_int("boundary_seed", self.boundary_seed, 0, MAX_SEED)
        if self.cache is not None:
            _require_float("cache", self.cache, 0.0, 1.0)
            if self.cache == 0:
                raise ValueError("cache must be more than 0: leave it out to compute every step")

    @classmethod
    def for_model(
        cls,
        config: WanConfig,
        *,
        image_size: tuple[int, int] | None = None,
        guidance: float | None = None,
        **given: Any,
    ) -> VideoParams:
        """The given numbers, completed by the model's defaults and checked against the model.

        A value of None means "the model's default". `guidance` sets both experts. With
        `image_size` (width, height of the conditioning image) the given size is an area and the
        image's aspect decides the shape, as in the reference.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if guidance is not None:
            given = {"guidance_high_noise": guidance, "guidance_low_noise": guidance} | given
        if config.num_experts == 1:
            _unify_guidance(given)
            for name in ("boundary_ratio", "boundary_seed"):
                if name in given:
                    raise ValueError(f"{name} has no effect: {config.name} has one expert")
        defaults = {name: getattr(config, name) for name in _MODEL_DEFAULTS}
        values = {"seed": 0, "solver": "unipc"} | defaults | given
        params = cls(**values)
        if image_size is not None:
            width, height = size_for_image(
                config, area=params.width * params.height, image_size=image_size
            )
            params = cls(**values | {"width": width, "height": height})
        params.check_fits(config)
        return params

    def check_fits(self, config: WanConfig) -> None:
        """Raises ValueError when this model cannot make a video of this shape."""
        multiple, stride_t = config.size_multiple, config.vae.stride[0]
        for name, value in (("width", self.width), ("height", self.height)):
            if value % multiple:
                low, high = value // multiple * multiple, -(-value // multiple) * multiple
                near = f"{low} or {high}" if low else f"{high}"
                raise ValueError(f"{name} {value} is not a multiple of {multiple}: try {near}")
        if (self.num_frames - 1) % stride_t:
            low = (self.num_frames - 1) // stride_t * stride_t + 1
            raise ValueError(
                f"num_frames {self.num_frames} is not {stride_t}n+1: try {low} or {low + stride_t}"
            )

    def latent_shape(self, config: WanConfig) -> tuple[int, int, int, int]:
        """[C, T, H, W] of this video's latents."""
        return config.latent_shape(width=self.width, height=self.height, num_frames=self.num_frames)

    def num_tokens(self, config: WanConfig) -> int:
        """Tokens of the transformer's sequence."""
        _, t, h, w = self.latent_shape(config)
        patch_t, patch_h, patch_w = config.transformer.patch_size
        return (t // patch_t) * (h // patch_h) * (w // patch_w)


_MODEL_DEFAULTS = (
    "width", "height", "num_frames", "fps", "num_steps", "shift",
    "guidance_high_noise", "guidance_low_noise", "boundary_ratio",
)  # fmt: skip


def size_for_image(config: WanConfig, *, area: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the video for an image, at most `area` pixels (reference: Wan2.2).

    I2V floors each side to whole tokens. TI2V tries flooring either side first and keeps the
    candidate whose aspect is nearer to the image's.
    """
    image_width, image_height = image_size
    if image_width < 1 or image_height < 1:
        raise ValueError(f"image size {image_width}x{image_height} is empty")
    unit = config.size_multiple
    if config.task == "i2v":
        aspect = image_height / image_width
        # Two floors, by stride and then by patch, as the reference does it.
        stride, patch = config.vae.stride[1], config.transformer.patch_size[1]
        height = int(math.sqrt(area * aspect) // stride // patch) * unit
        width = int(math.sqrt(area / aspect) // stride // patch) * unit
    else:
        width, height = _nearest_aspect(area, image_width / image_height, unit)
    if not width or not height:
        raise ValueError(
            f"image aspect {image_width}:{image_height} leaves less than {unit} pixels on a side"
            f" at an area of {area} pixels"
        )
    return width, height


def _nearest_aspect(area: int, aspect: float, unit: int) -> tuple[int, int]:
    ideal_width = math.sqrt(area * aspect)
    ideal_height = area / ideal_width
    width_a = int(ideal_width // unit) * unit
    height_a = int(area / width_a // unit) * unit if width_a else 0
    height_b = int(ideal_height // unit) * unit
    width_b = int(area / height_b // unit) * unit if height_b else 0

    def error(width: int, height: int) -> float:
        if not width or not height:
            return math.inf
        return max(aspect * height / width, width / height / aspect)

    if error(width_a, height_a) < error(width_b, height_b):
        return width_a, height_a
    return width_b, height_b


def _unify_guidance(given: dict[str, Any]) -> None:
    values = {v for k, v in given.items() if k in ("guidance_high_noise", "guidance_low_noise")}
    if len(values) > 1:
        raise ValueError("guidance_low_noise must equal guidance_high_noise: there is one expert")
    for value in values:
        given |= {"guidance_high_noise": value, "guidance_low_noise": value}


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")


def _require_float(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
