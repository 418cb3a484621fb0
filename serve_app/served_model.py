"""ServedModel: what one served name stands for at the HTTP edge, and how long its jobs take.

Owns the limits and the time predictions of a model. Knows nothing about HTTP, jobs, groups or
checkpoints; the network and its defaults come as a WanConfig.
"""

from __future__ import annotations

from dataclasses import dataclass

from wan_model.config import Expert, TransformerConfig, WanConfig
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule


@dataclass(frozen=True, kw_only=True)
class StageProfile:
    """Measured seconds of one model's stages on one group each, at one size.

    `num_tokens` is the transformer's sequence length at that size; a step is with guidance (both
    passes). The text encoder's time does not depend on the size.
    """

    num_tokens: int
    text_encode_s: float
    image_encode_s: float
    step_high_noise_s: float
    step_low_noise_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as clients name it. Without a profile nothing is predicted (0 s)."""

    name: str
    config: WanConfig
    created: int
    default_solver: str
    default_cache: float | None
    max_area: int
    max_num_frames: int
    max_num_steps: int
    profile: StageProfile | None

    def check_limits(self, params: VideoParams) -> None:
        """Raises ValueError, beginning with the field's name, for a video larger than allowed."""
        area = params.width * params.height
        if area > self.max_area:
            raise ValueError(
                f"width {params.width} * height {params.height} = {area} pixels is more than the"
                f" {self.max_area} that {self.name} makes"
            )
        for field, limit in (
            ("num_frames", self.max_num_frames),
            ("num_steps", self.max_num_steps),
        ):
            if getattr(params, field) > limit:
                raise ValueError(f"{field} must be at most {limit} for {self.name}")

    def predict_s(self, params: VideoParams, *, has_image: bool, from_step: int = 0) -> float:
        """Seconds of work in a job when nothing else runs; a branch begins at `from_step`."""
        if self.profile is None:
            return 0.0
        return predict_s(
            self.profile, self.config, params, has_image=has_image, from_step=from_step
        )


def predict_s(
    profile: StageProfile,
    config: WanConfig,
    params: VideoParams,
    *,
    has_image: bool,
    from_step: int = 0,
) -> float:
    """`profile` carried over to another size, step count and expert switch."""
    num_tokens = params.num_tokens(config)
    tokens_ratio = num_tokens / profile.num_tokens
    work = _step_work(config.transformer, num_tokens)
    work_ratio = work / _step_work(config.transformer, profile.num_tokens)
    schedule = build_schedule(params)
    step_s = {
        Expert.HIGH_NOISE: profile.step_high_noise_s * work_ratio,
        Expert.LOW_NOISE: profile.step_low_noise_s * work_ratio,
    }
    steps_s = sum(
        step_s[schedule.expert_at(index)] for index in range(from_step, schedule.num_steps)
    )
    image_s = profile.image_encode_s * tokens_ratio if has_image else 0.0
    return profile.text_encode_s + image_s + steps_s + profile.decode_s * tokens_ratio


def _step_work(transformer: TransformerConfig, num_tokens: int) -> float:
    """FLOPs per layer of one pass, up to a factor.

    Per token: 12 d^2 (q, k, v, o; cross-attention's q and o), 4 d f (the MLP), 4 d n (scores and
    values over n tokens). Gives 3.9 for A14B at 720p against 480p, where counting gives 3.88.
    """
    dim, ffn_dim = transformer.dim, transformer.ffn_dim
    return num_tokens * (12 * dim**2 + 4 * dim * ffn_dim + 4 * dim * num_tokens)
