"""The fused chain of a transformer equals its blocks, and fp8 is near them by a known amount."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from triton_kernels import DEVICE, use_kernels

from wan_model import fp8, row_ops
from wan_model.backends import check_precision
from wan_model.config import TransformerConfig
from wan_model.engine import ExpertEngine
from wan_model.fp8 import Fp8Linear, quantise_blocks
from wan_model.parallel import SequenceParallel
from wan_model.transformer import WanTransformer, is_float32_island

CONFIG = TransformerConfig(
    dim=32, num_heads=2, num_layers=3, ffn_dim=48, in_channels=16, out_channels=16, text_dim=32
)


def make(config: TransformerConfig = CONFIG) -> WanTransformer:
    """Every weight large enough that a step left out of the chain is seen."""
    model = WanTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        std = 0.5 if "modulation" in name else (fan_in**-0.5 if fan_in > 1 else 0.3)
        parameter.normal_(std=std, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return model


@torch.inference_mode()
def predict(model: WanTransformer, timesteps: list[float], batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    device = model.head.head.weight.device
    latents = torch.randn(batch_size, 16, 3, 4, 6, generator=generator).to(device)
    text = torch.randn(batch_size, 7, model.config.text_dim, generator=generator).to(device)
    rows = torch.tensor(timesteps, device=device).expand(batch_size, -1)
    return model(latents, rows, model.embed_text(list(text)), SequenceParallel())


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("timesteps", [[700.0], [0.0, 700.0]], ids=["one", "clean first frame"])
def test_with_kernels_the_fused_chain_is_the_blocks_too(monkeypatch, timesteps):
    """Their strides come from real tensors here, for two samples and two timestep rows."""
    model = make().to(DEVICE)
    model.fused = False
    expected = predict(model, timesteps)
    use_kernels(monkeypatch, row_ops)
    model.fused = True
    torch.testing.assert_close(predict(model, timesteps), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("timesteps", [[700.0], [0.0, 700.0]], ids=["one", "clean first frame"])
def test_the_fused_chain_is_the_blocks_one_after_another(timesteps):
    model = make()
    model.fused = False
    expected = predict(model, timesteps)
    model.fused = True
    # float32: only the order of additions differs; outputs are of order 1.
    torch.testing.assert_close(predict(model, timesteps), expected, atol=2e-5, rtol=0)


def test_an_fp8_linear_multiplies_rows_and_weights_rounded_to_fp8():
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear.weight.mul_(torch.logspace(-2, 2, 32)[:, None])  # rows of very different sizes
    x = torch.randn(400, 64, generator=draw)
    quick = Fp8Linear(linear)
    assert quick.weight.dtype == torch.float8_e4m3fn and quick.weight.nbytes == 32 * 64
    exact = linear(x)
    for row in range(32):  # with one scale for all, the small ones would be lost
        # Operands of 4 bits round by about 2.6 % rms each, a sum of products of two by 3.7 %.
        assert 0.02 < relative(quick(x)[:, row], exact[:, row]) < 0.06
    weight = quick.weight.float() * quick.weight_scale
    rounded = fp8.quantise_rows(x).dequantise()
    torch.testing.assert_close(quick(x), rounded @ weight.T)


def test_only_the_large_products_of_the_blocks_are_quantised_and_the_forward_stays_near():
    exact = predict(make(), [700.0])
    model = make()
    quantise_blocks(model.blocks)
    quantised = {name for name, part in model.named_modules() if isinstance(part, Fp8Linear)}
    assert quantised == {
        f"blocks.{i}.{name}" for i in range(CONFIG.num_layers) for name in fp8.BLOCK_LINEARS
    }
    error = relative(predict(model, [700.0]), exact)
    assert 0.005 < error < 0.1, "products of 3.7 % each, most of them added to a residual stream"


def test_in_bfloat16_the_chain_is_no_further_from_float32_than_the_blocks_are():
    exact = predict(make(), [700.0])
    model = make()
    for name, parameter in model.named_parameters():
        if not is_float32_island(name):
            parameter.data = parameter.data.bfloat16()
    model.fused = False
    blocks = relative(predict(model, [700.0]), exact)
    model.fused = True
    assert relative(predict(model, [700.0]), exact) < 1.2 * blocks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int4"}, "unknown precision 'int4': use one of bf16, fp8"),
        ({"offload": True}, "precision fp8 and offload exclude each other"),
        ({"shard_weights": True}, "precision fp8 and shard_weights exclude each other"),
        ({"dtype": "float32"}, "leave out dtype float32"),
    ],
)
def test_what_does_not_go_with_fp8_is_refused_by_name(options, words):
    given = {"precision": "fp8", "dtype": "auto", "shard_weights": False, "offload": False}
    with pytest.raises(ValueError, match=words):
        check_precision(**(given | options))


def test_widths_without_kernels_are_refused_before_a_gpu_is_asked():
    narrow = dataclasses.replace(CONFIG, dim=24)
    with pytest.raises(ValueError, match="Triton|no kernels for dim 24"):
        fp8.check_fp8(narrow, device="cuda", dtype=torch.bfloat16)


def test_an_expert_opened_in_fp8_holds_fp8_weights_and_can_step():
    engine = ExpertEngine(checkpoint="wan-tiny", expert="high_noise", device="cpu", precision="fp8")
    assert isinstance(engine.transformer.blocks[0].ffn[2], Fp8Linear)
    engine.warm_up()


@pytest.mark.parametrize("fused", [True, False])
@torch.inference_mode()
def test_forwards_that_share_what_knows_no_text_are_equal_to_the_bit(fused):
    model = make()
    model.fused = fused
    latents, timesteps = torch.randn(1, 16, 3, 4, 6), torch.tensor([[700.0]])
    texts = [model.embed_text([torch.randn(n, model.config.text_dim)]) for n in (7, 2, 5)]
    alone = [model(latents, timesteps, text, SequenceParallel()) for text in texts]
    together = model.forward_each(latents, timesteps, texts, SequenceParallel())
    assert len({tuple(y.flatten().tolist()) for y in together}) == 3
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got, expected)
