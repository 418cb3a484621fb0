"""The models: what each network looks like and what its makers recommend.

Owns every architecture number and every per-model default (a "row"). Knows nothing about torch,
files or requests. Numbers: Wan2.2 `configs/`, Wan2.1 model cards; see each field.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

Task = Literal["t2v", "i2v", "ti2v"]

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of the released models: used when a request's negative prompt is empty."""

NUM_TRAIN_TIMESTEPS = 1000


class Expert(StrEnum):
    """The denoising networks of a model. A one-expert model has only HIGH_NOISE."""

    HIGH_NOISE = "high_noise"
    LOW_NOISE = "low_noise"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One expert. `in_channels` counts noise, mask and image channels together."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"dim {self.dim} / num_heads {self.num_heads} must be an even number of at least 6"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The causal 3D VAE. `version` "2.2" adds the 2x2 patchify and the residual shortcuts.

    `temporal_downsample[i]` says whether encoder stage i halves time; the decoder mirrors it.
    `latents_mean` and `latents_std` have `z_dim` entries: DiT latents = (mean - m) / s.
    """

    version: Literal["2.1", "2.2"]
    encoder_dim: int
    decoder_dim: int
    z_dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def stride(self) -> tuple[int, int, int]:
        """(t, h, w) pixels per latent."""
        space = 2 ** (len(self.dim_mult) - 1) * self.patch_size
        return 2 ** sum(self.temporal_downsample), space, space


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The encoder half of UMT5 (relative position bias in every layer, gated GELU)."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """A model: its networks and its defaults. `name` is the row, not the folder it came from."""

    name: str
    task: Task
    num_experts: int
    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    width: int
    height: int
    num_frames: int = 81
    fps: int = 16
    num_steps: int
    shift: float
    guidance_high_noise: float
    guidance_low_noise: float
    boundary_ratio: float | None = None
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def experts(self) -> tuple[Expert, ...]:
        return (Expert.HIGH_NOISE, Expert.LOW_NOISE)[: self.num_experts]

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this: one token of the transformer, in pixels."""
        return self.vae.stride[1] * self.transformer.patch_size[1]

    @property
    def accepts_image(self) -> bool:
        return self.task != "t2v"

    @property
    def needs_image(self) -> bool:
        return self.task == "i2v"

    def latent_shape(
        self, *, width: int, height: int, num_frames: int
    ) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents of a `num_frames` video of width x height pixels."""
        t, h, w = self.vae.stride
        return self.vae.z_dim, (num_frames - 1) // t + 1, height // h, width // w


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


VAE_2_1 = VAEConfig(
    version="2.1",
    encoder_dim=96,
    decoder_dim=96,
    z_dim=16,
    latents_mean=_floats(
        "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 "
        "0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"
    ),
    latents_std=_floats(
        "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 "
        "3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"
    ),
)

VAE_2_2 = VAEConfig(
    version="2.2",
    encoder_dim=160,
    decoder_dim=256,
    z_dim=48,
    temporal_downsample=(False, True, True),
    patch_size=2,
    latents_mean=_floats(
        "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 "
        "-0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 -0.1825 "
        "-0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 "
        "-0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 "
        "-0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 "
        "0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667"
    ),
    latents_std=_floats(
        "0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 "
        "0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 "
        "0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 "
        "0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 "
        "0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 "
        "0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744"
    ),
)

_A14B = TransformerConfig(
    dim=5120, num_heads=40, num_layers=40, ffn_dim=13824, in_channels=16, out_channels=16
)

T2V_A14B = WanConfig(
    name="t2v-A14B",
    task="t2v",
    num_experts=2,
    transformer=_A14B,
    vae=VAE_2_1,
    width=1280,
    height=720,
    num_steps=40,
    shift=12.0,
    guidance_high_noise=4.0,
    guidance_low_noise=3.0,
    boundary_ratio=0.875,
)
I2V_A14B = replace(
    T2V_A14B,
    name="i2v-A14B",
    task="i2v",
    transformer=replace(_A14B, in_channels=36),
    shift=5.0,
    guidance_high_noise=3.5,
    guidance_low_noise=3.5,
    boundary_ratio=0.900,
)
TI2V_5B = WanConfig(
    name="ti2v-5B",
    task="ti2v",
    num_experts=1,
    transformer=TransformerConfig(
        dim=3072, num_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
    ),
    vae=VAE_2_2,
    width=1280,
    height=704,
    num_frames=121,
    fps=24,
    num_steps=50,
    shift=5.0,
    guidance_high_noise=5.0,
    guidance_low_noise=5.0,
)
WAN21_T2V_14B = replace(
    T2V_A14B,
    name="wan2.1-t2v-14B",
    num_experts=1,
    num_steps=50,
    shift=5.0,
    guidance_high_noise=5.0,
    guidance_low_noise=5.0,
    boundary_ratio=None,
)
WAN21_T2V_1_3B = replace(
    WAN21_T2V_14B,
    name="wan2.1-t2v-1.3B",
    transformer=replace(_A14B, dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
    width=832,
    height=480,
    shift=3.0,
)

WAN_TINY = replace(
    T2V_A14B, name="wan-tiny", width=128, height=128, num_frames=17, fps=8, num_steps=20, shift=5.0
)
WAN_TINY_I2V = replace(
    I2V_A14B, name="wan-tiny-i2v", width=128, height=128, num_frames=17, fps=8, num_steps=20,
    boundary_ratio=0.875,
)  # fmt: skip
WAN_TINY_TI2V = replace(
    TI2V_5B, name="wan-tiny-ti2v", width=128, height=128, num_frames=17, fps=8, num_steps=20,
    guidance_high_noise=2.0, guidance_low_noise=2.0,
)  # fmt: skip
"""The small models trained in this repository (`wan_model/tiny`). Only their defaults are a row:
like everyone's, their architecture numbers come from the checkpoint."""

ROWS: dict[str, WanConfig] = {
    row.name: row
    for row in (
        T2V_A14B, I2V_A14B, TI2V_5B, WAN21_T2V_14B, WAN21_T2V_1_3B,
        WAN_TINY, WAN_TINY_I2V, WAN_TINY_TI2V,
    )
}  # fmt: skip


def row_for(*, task: Task, num_experts: int, dim: int) -> WanConfig:
    """The row whose defaults fit a checkpoint that says only what its networks look like.

    Raises ValueError for a combination no released model has.
    """
    if task == "t2v" and num_experts == 1:
        return WAN21_T2V_14B if dim > WAN21_T2V_1_3B.transformer.dim else WAN21_T2V_1_3B
    for row in (T2V_A14B, I2V_A14B, TI2V_5B):
        if (row.task, row.num_experts) == (task, num_experts):
            return row
    raise ValueError(f"no Wan model has task {task} and {num_experts} expert(s)")


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """How the ranks of a group divide one forward: cfg (outer) x ring x Ulysses (inner)."""

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def sp_degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ring_degree * self.ulysses_degree

    @property
    def world_size(self) -> int:
        return (2 if self.cfg_parallel else 1) * self.sp_degree

    def check(self, *, world_size: int, num_heads: int) -> None:
        """Raises ValueError with the equation that does not hold."""
        if self.world_size != world_size:
            cfg = 2 if self.cfg_parallel else 1
            raise ValueError(
                f"cfg {cfg} * ring {self.ring_degree} * ulysses {self.ulysses_degree}"
                f" = {self.world_size} != {world_size} ranks"
            )
        if num_heads % self.ulysses_degree:
            raise ValueError(
                f"num_heads {num_heads} % ulysses {self.ulysses_degree}"
                f" = {num_heads % self.ulysses_degree} != 0"
            )
