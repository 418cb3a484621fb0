"""Experts of any size with random weights: ours, and Diffusers' on the very same memory.

Owns how weights are drawn (on the device, so that values stay of order 1) and how Diffusers' module
is given views of them. Knows nothing about timing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_model.checkpoint_keys import transformer_slots
from wan_model.config import TransformerConfig
from wan_model.parallel import SequenceParallel
from wan_model.transformer import WanTransformer, is_float32_island

PRECISIONS = ("bf16", "fp8", "fp8-attention")
PROMPT_TOKENS = 120
"""Of about 90 words, as long as an extended prompt. Both implementations attend to its padding;
Diffusers is given all of it."""


def random_expert(config: TransformerConfig, dtype: torch.dtype, device: str) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_float32_island(name) else dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif parameter.dim() < 2:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return model


def diffusers_twin(model: WanTransformer, device: str) -> WanTransformer3DModel:
    """Their module over views of `model`'s weights, in the precisions it loads bf16 files in."""
    c = model.config
    with torch.device("meta"):
        twin = WanTransformer3DModel(
            num_attention_heads=c.num_heads, attention_head_dim=c.head_dim,
            num_layers=c.num_layers, in_channels=c.in_channels, out_channels=c.out_channels,
            text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, cross_attn_norm=True,
        )  # fmt: skip
    state = model.state_dict()
    kept = WanTransformer3DModel._keep_in_fp32_modules
    views = {
        key: _as_loaded(slot.part(state[slot.name]), model.dtype, any(k in key for k in kept))
        for key, slot in transformer_slots(state, "diffusers").items()
    }
    twin.load_state_dict(views, assign=True)
    # Its tables are no parameters, so they were left on the meta device.
    twin.rope = type(twin.rope)(c.head_dim, c.patch_size, twin.config.rope_max_seq_len).to(device)
    return twin.eval().requires_grad_(False)


def _as_loaded(tensor: Tensor, dtype: torch.dtype, keeps_float32: bool) -> Tensor:
    return tensor.float() if keeps_float32 else tensor.to(dtype)


class Forward:
    """One forward of a case: its random inputs, and how either implementation is called."""

    def __init__(
        self,
        config: TransformerConfig,
        latent_shape: tuple[int, int, int],
        *,
        clean_first_frame: bool,
        device: str,
    ) -> None:
        generator = torch.Generator(device).manual_seed(1)
        self.latents = torch.randn(
            1, config.in_channels, *latent_shape, device=device, generator=generator
        )
        self.prompt = torch.randn(
            min(PROMPT_TOKENS, config.text_len - 1), config.text_dim,
            device=device, generator=generator,
        )  # fmt: skip
        self.text_len = config.text_len
        rows = [[0.0, 900.0]] if clean_first_frame else [[900.0]]
        self.timesteps = torch.tensor(rows, device=device)
        t, h, w = latent_shape
        self.num_tokens = t * (h // 2) * (w // 2)
        self.num_clean = (h // 2) * (w // 2) if clean_first_frame else 0

    def ours(self, model: WanTransformer, backend: str = "auto"):
        """A call that makes one forward; the text keys are made here, once, as in a job."""
        text = model.embed_text([self.prompt])
        sp = SequenceParallel(attention_backend=backend)
        return lambda: model(self.latents, self.timesteps, text, sp)

    def theirs(self, twin: WanTransformer3DModel):
        padding = self.text_len - len(self.prompt)
        prompt = F.pad(self.prompt, (0, 0, 0, padding))[None].to(twin.dtype)
        latents = self.latents.to(twin.dtype)
        timestep = self.timesteps[:, -1]
        if self.num_clean:
            timestep = timestep[:, None].repeat(1, self.num_tokens)
            timestep[:, : self.num_clean] = 0
        return lambda: twin(latents, timestep, prompt, return_dict=False)[0]
