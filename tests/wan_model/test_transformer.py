"""The transformer against Diffusers' on the same weights, and one test per trap of the forward.

Weights are scaled so that every path matters: the last tests break one thing each and show that
the comparison would see it.
"""

import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel

from wan_model import transformer as module
from wan_model.checkpoint_keys import from_ours, transformer_slots
from wan_model.config import TransformerConfig
from wan_model.parallel import SequenceParallel
from wan_model.transformer import WanTransformer, is_float32_island, rope_tables

CONFIG = TransformerConfig(
    dim=24, num_heads=2, num_layers=2, ffn_dim=32, in_channels=16, out_channels=16, text_dim=32
)
ODD_HEAD = dataclasses.replace(CONFIG, dim=40)  # head_dim 20 -> parts of 8, 6, 6
TOLERANCE = 5e-5  # float32 rounding at outputs of order 4; every trap costs more


def make(config: TransformerConfig, seed: int = 0) -> WanTransformer:
    model = WanTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        std = 0.5 if "modulation" in name else (1.5 / fan_in**0.5 if fan_in > 1 else 0.2)
        if name.startswith("time_"):
            # Diffusers computes the sinusoid in float32, we in float64 as the official code does:
            # keep its weight ordinary.
            std *= 0.4
        parameter.normal_(std=std, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return model


def diffusers_twin(model: WanTransformer) -> WanTransformer3DModel:
    c = model.config
    twin = WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, num_layers=c.num_layers,
        in_channels=c.in_channels, out_channels=c.out_channels, text_dim=c.text_dim,
        freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    state = model.state_dict()
    twin.load_state_dict(from_ours(state, transformer_slots(state, "diffusers")))
    return twin


def inputs(config: TransformerConfig, batch_size: int = 1, num_text_tokens: int = 7):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch_size, config.in_channels, 3, 4, 6, generator=generator)
    text = torch.randn(batch_size, num_text_tokens, config.text_dim, generator=generator)
    return latents, list(text)


@torch.no_grad()
def ours(model: WanTransformer, latents, timesteps, text):
    rows = torch.tensor(timesteps, dtype=torch.float32).expand(latents.shape[0], -1)
    return model(latents, rows, model.embed_text(text), SequenceParallel())


@torch.no_grad()
def theirs(twin: WanTransformer3DModel, latents, timestep, text):
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 512 - t.shape[0])) for t in text])
    return twin(latents, timestep, padded, return_dict=False)[0]


def compare(config: TransformerConfig = CONFIG, num_text_tokens: int = 7) -> float:
    """Largest difference at a t2v forward; the model is made anew so that patches take effect."""
    model = make(config)
    latents, text = inputs(config, num_text_tokens=num_text_tokens)
    expected = theirs(diffusers_twin(model), latents, torch.tensor([937]), text)
    assert 2 < expected.abs().max() < 40
    return (ours(model, latents, [937.0], text) - expected).abs().max().item()


@pytest.mark.parametrize("config", [CONFIG, ODD_HEAD, dataclasses.replace(CONFIG, in_channels=36)])
def test_the_forward_equals_diffusers(config):
    assert compare(config) <= TOLERANCE


def test_a_full_length_prompt_equals_diffusers():
    assert compare(num_text_tokens=512) <= TOLERANCE


def test_a_clean_first_frame_equals_diffusers_per_token_timesteps():
    model = make(CONFIG)
    latents, text = inputs(CONFIG)
    per_token = torch.full((1, 18), 421)
    per_token[:, :6] = 0
    expected = theirs(diffusers_twin(model), latents, per_token, text)
    got = ours(model, latents, [0.0, 421.0], text)
    assert (got - expected).abs().max() <= TOLERANCE
    assert (ours(model, latents, [421.0], text) - expected).abs().max() > 0.05


def test_a_batch_of_two_equals_two_single_forwards():
    model = make(CONFIG)
    latents, text = inputs(CONFIG, batch_size=2)
    both = ours(model, latents, [500.0], text)
    for i in range(2):
        single = ours(model, latents[i : i + 1], [500.0], text[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 4, 2), (5, 2, 8), (3, 6, 10)])
def test_any_grid_of_whole_tokens_comes_back_in_shape(grid):
    model = make(CONFIG)
    latents = torch.randn(1, 16, *grid)
    assert ours(model, latents, [10.0], [torch.randn(3, 32)]).shape == (1, 16, *grid)


def test_padding_rows_of_the_prompt_are_attended_to():
    """Zero rows become biases in the text MLP: more of them is another result, as in training."""
    model = make(CONFIG)
    latents, text = inputs(CONFIG)
    short = make(dataclasses.replace(CONFIG, text_len=16))
    assert (ours(model, latents, [9.0], text) - ours(short, latents, [9.0], text)).abs().max() > 0.1


def test_rope_frequencies_belong_to_each_axis_own_share_of_the_head():
    cos, sin = rope_tables((2, 3, 4), 128, torch.device("cpu"))
    assert cos.shape == (24, 64)
    angle = torch.atan2(sin, cos)[1 * 12 + 2 * 4 + 3]  # token t=1, h=2, w=3
    expected_t = 10000.0 ** (-torch.arange(22, dtype=torch.float64) * 2 / 44)
    expected_w = 3 * 10000.0 ** (-torch.arange(21, dtype=torch.float64) * 2 / 42)
    torch.testing.assert_close(angle[:22], expected_t.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(angle[43:], expected_w.float(), atol=1e-6, rtol=0)


def test_epsilons_are_the_models():
    model = make(CONFIG)
    block = model.blocks[0]
    assert block.eps == model.head.eps == block.norm3.eps == 1e-6
    assert block.self_attn.norm_q.eps == block.cross_attn.norm_k.eps == 1e-6


def test_time_modulation_norms_and_head_stay_float32_under_bfloat16():
    islands = {name for name, _ in make(CONFIG).named_parameters() if is_float32_island(name)}
    kinds = {name.replace("blocks.0.", "").replace("blocks.1.", "") for name in islands}
    assert kinds == {
        "modulation", "norm3.weight", "norm3.bias", "head.modulation", "head.head.weight",
        "head.head.bias", "time_embedding.0.weight", "time_embedding.0.bias",
        "time_embedding.2.weight", "time_embedding.2.bias", "time_projection.1.weight",
        "time_projection.1.bias", "self_attn.norm_q.weight", "self_attn.norm_k.weight",
        "cross_attn.norm_q.weight", "cross_attn.norm_k.weight",
    }  # fmt: skip


def test_bfloat16_costs_what_bfloat16_costs():
    """Relative rms below 1.5 % per forward; the output and the time path are float32."""
    model = make(CONFIG)
    latents, text = inputs(CONFIG)
    exact = ours(model, latents, [937.0], text)
    for name, parameter in model.named_parameters():
        if not is_float32_island(name):
            parameter.data = parameter.data.bfloat16()
    rough = ours(model, latents, [937.0], text)
    assert rough.dtype == torch.float32
    relative = (rough - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < relative < 0.015


def no_rope(x, rope):
    return x


def half_split_rope(x, rope):
    cos, sin = (table[:, None] for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def sine_first(self, timesteps):
    half = self.config.freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64) / half
    angles = timesteps.double()[..., None] * torch.pow(10000.0, -exponent)
    e = self.time_embedding(torch.cat([angles.sin(), angles.cos()], dim=-1).float())
    return e, self.time_projection(e).unflatten(-1, (6, self.config.dim))


def per_head_norm(self, x):
    heads = x.float().unflatten(-1, (2, -1))
    normed = torch.nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
    return normed * self.weight


@pytest.mark.parametrize(
    ("target", "name", "mistake"),
    [
        (module, "rotate", no_rope),
        (module, "rotate", half_split_rope),
        (WanTransformer, "_embed_time", sine_first),
        (module.RMSNorm, "forward", per_head_norm),
    ],
)
def test_a_mistake_in_the_forward_is_seen(monkeypatch, target, name, mistake):
    monkeypatch.setattr(target, name, mistake)
    assert compare() > 20 * TOLERANCE


@pytest.mark.parametrize("timestep", [937.265, 936.0])
def test_a_timestep_that_is_not_the_integer_is_seen(timestep):
    model = make(CONFIG)
    latents, text = inputs(CONFIG)
    difference = ours(model, latents, [timestep], text) - ours(model, latents, [937.0], text)
    assert difference.abs().max() > 20 * TOLERANCE


def test_the_exact_gelu_instead_of_tanh_is_seen():
    model = make(CONFIG)
    latents, text = inputs(CONFIG)
    expected = ours(model, latents, [937.0], text)
    for block in model.blocks:
        block.ffn[1] = torch.nn.GELU()
    assert (ours(model, latents, [937.0], text) - expected).abs().max() > 2 * TOLERANCE
