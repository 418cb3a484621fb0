"""The VAE against diffusers' with equal weights, and what chunking must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan_model.checkpoint_config import vae_to_diffusers
from wan_model.checkpoint_keys import official_to_diffusers_vae
from wan_model.config import VAE_2_1, VAE_2_2, VAEConfig
from wan_model.vae import WanVAE, average_down, duplicate_up, patchify, unpatchify

TOLERANCE = 1e-5
"""fp32, outputs of size 1: the two codes differ only in the order of their additions."""

TINY = {
    "2.1": replace(
        VAE_2_1, encoder_dim=4, decoder_dim=6, z_dim=5, num_res_blocks=2,
        latents_mean=(0.3, -0.2, 0.1, 0.7, -0.9), latents_std=(1.5, 0.6, 2.0, 1.1, 0.8),
    ),
    "2.1 flat": replace(
        VAE_2_1, encoder_dim=8, decoder_dim=8, z_dim=2, num_res_blocks=1, dim_mult=(1, 1, 1, 1),
        latents_mean=(0.3, -0.2), latents_std=(1.5, 0.6),
    ),
    "2.2": replace(
        VAE_2_2, encoder_dim=4, decoder_dim=8, z_dim=6, num_res_blocks=2,
        latents_mean=(0.3, -0.2, 0.1, 0.7, -0.9, 0.0),
        latents_std=(1.5, 0.6, 2.0, 1.1, 0.8, 0.5),
    ),
    "2.2 flat": replace(
        VAE_2_2, encoder_dim=8, decoder_dim=8, z_dim=2, num_res_blocks=1, dim_mult=(1, 1, 1, 1),
        latents_mean=(0.3, -0.2), latents_std=(1.5, 0.6),
    ),
}  # fmt: skip


def scaled_vae(config: VAEConfig) -> WanVAE:
    """Random weights large enough that every path moves the output."""
    vae = WanVAE(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter[0].numel() ** 0.5)
        for network, scale in ((vae.encoder, 1.0), (vae.decoder, 0.3)):
            network.head[2].weight.mul_(scale)
    return vae.eval()


def new_diffusers_vae(config: VAEConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_config(vae_to_diffusers(config))


def diffusers_vae(vae: WanVAE) -> AutoencoderKLWan:
    theirs = new_diffusers_vae(vae.config)
    renamed = {
        official_to_diffusers_vae(name, vae.config): value
        for name, value in vae.state_dict().items()
    }
    theirs.load_state_dict(renamed, strict=True)
    return theirs.eval()


def random_video(config: VAEConfig, num_frames: int, *, batch: int = 2) -> Tensor:
    """Not square: 2 x 3 latent positions."""
    _, height, width = config.stride
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch, 3, num_frames, 2 * height, 3 * width, generator=generator) * 2 - 1


def random_latents(config: VAEConfig, num_latent_frames: int, *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(num_latent_frames)
    return torch.randn(batch, config.z_dim, num_latent_frames, 2, 3, generator=generator)


def per_channel(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers).view(1, -1, 1, 1, 1)


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest) -> tuple[WanVAE, AutoencoderKLWan]:
    vae = scaled_vae(TINY[request.param])
    return vae, diffusers_vae(vae)


@pytest.fixture(params=["2.1", "2.2"])
def vae(request: pytest.FixtureRequest) -> WanVAE:
    return scaled_vae(TINY[request.param])


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 17])
@torch.inference_mode()
def test_encode_equals_diffusers_mean_after_normalisation(pair, num_frames: int) -> None:
    vae, theirs = pair
    video = random_video(vae.config, num_frames)
    posterior = theirs.encode(video).latent_dist
    expected = (posterior.mean - per_channel(vae.config.latents_mean)) / per_channel(
        vae.config.latents_std
    )
    latents = vae.encode(video)
    assert latents.shape == (2, vae.config.z_dim, (num_frames - 1) // 4 + 1, 2, 3)
    assert latents.std() > 0.3, "a flat output would compare nothing"
    torch.testing.assert_close(latents, expected, atol=TOLERANCE, rtol=0)
    mean, logvar = vae.encode_moments(video)
    torch.testing.assert_close(mean, posterior.mean, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logvar, posterior.logvar, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_latent_frames", [1, 2, 3, 4, 5])
@torch.inference_mode()
def test_decode_equals_diffusers_decode_of_latents_times_std_plus_mean(
    pair, num_latent_frames: int
) -> None:
    vae, theirs = pair
    latents = random_latents(vae.config, num_latent_frames)
    z = latents * per_channel(vae.config.latents_std) + per_channel(vae.config.latents_mean)
    expected = theirs.decode(z).sample
    frames = vae.decode(latents)
    _, height, width = vae.config.stride
    assert frames.shape == (2, 3, 4 * num_latent_frames - 3, 2 * height, 3 * width)
    assert frames.std() > 0.1 and (frames.abs() == 1).float().mean() < 0.2
    torch.testing.assert_close(frames, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [2, 3, None])
@torch.inference_mode()
def test_the_size_of_the_chunks_does_not_change_the_result(vae: WanVAE, chunk: int | None) -> None:
    video, latents = random_video(vae.config, 21), random_latents(vae.config, 6)
    torch.testing.assert_close(
        vae.encode(video, chunk=chunk), vae.encode(video, chunk=1), atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        vae.decode(latents, chunk=chunk), vae.decode(latents, chunk=1), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("chunk", [1, 3])
@torch.inference_mode()
def test_holding_channels_together_changes_the_layout_and_not_the_numbers(
    vae: WanVAE, chunk: int
) -> None:
    """Also not by doubling H and W with a smaller convolution."""
    video, latents = random_video(vae.config, 9), random_latents(vae.config, 4)
    encoded, decoded = vae.encode(video), vae.decode(latents)
    vae.hold_channels_together()
    torch.testing.assert_close(vae.encode(video, chunk=chunk), encoded, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(vae.decode(latents, chunk=chunk), decoded, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_chunks_are_one_frame_then_four_at_a_time_and_together_are_the_video(vae: WanVAE) -> None:
    latents = random_latents(vae.config, 4)
    chunks = list(vae.decode_chunks(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))


@torch.inference_mode()
def test_two_videos_can_be_decoded_in_turns(vae: WanVAE) -> None:
    first, second = random_latents(vae.config, 3), random_latents(vae.config, 3).flip(2)
    before = {name: value.clone() for name, value in vae.state_dict(keep_vars=True).items()}
    turns = list(zip(vae.decode_chunks(first), vae.decode_chunks(second), strict=True))
    for latents, chunks in zip((first, second), zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(chunks, dim=2), vae.decode(latents))
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@torch.inference_mode()
def test_a_latent_frame_changes_only_its_own_frames_and_later_ones(vae: WanVAE) -> None:
    latents = random_latents(vae.config, 4)
    changed = latents.clone()
    changed[:, :, 2] += 1
    difference = (vae.decode(changed) - vae.decode(latents)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:5].max() == 0
    assert difference[5:].min() > 1e-3


@torch.inference_mode()
def test_frames_decoded_without_the_frames_before_them_are_different(vae: WanVAE) -> None:
    latents = random_latents(vae.config, 3)
    alone = vae.decode(latents[:, :, 1:])
    assert (alone - vae.decode(latents)[:, :, 4:]).abs().max() > 0.1


@torch.inference_mode()
def test_decoded_frames_are_clamped_and_the_training_form_is_not(vae: WanVAE) -> None:
    latents = 10 * random_latents(vae.config, 2)
    unclamped = vae.decode_unclamped(vae.denormalise(latents))
    assert unclamped.abs().max() > 1
    torch.testing.assert_close(vae.decode(latents), unclamped.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_normalise_and_denormalise_are_inverse_and_use_the_row_of_each_channel() -> None:
    vae = WanVAE(TINY["2.1 flat"])
    z = torch.tensor([1.8, 0.4]).view(1, 2, 1, 1, 1)
    expected = torch.tensor([(1.8 - 0.3) / 1.5, (0.4 + 0.2) / 0.6]).view(1, 2, 1, 1, 1)
    torch.testing.assert_close(vae.normalise(z), expected)
    torch.testing.assert_close(vae.denormalise(expected), z)


@pytest.mark.parametrize("chunk", [1, None])
def test_training_reaches_every_parameter(vae: WanVAE, chunk: int | None) -> None:
    video = random_video(vae.config, 9, batch=1)
    mean, logvar = vae.encode_moments(video, chunk=chunk)
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    loss = (vae.decode_unclamped(z, chunk=chunk) - video).square().mean() + 0.1 * logvar.mean()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gradients_do_not_depend_on_the_chunks(vae: WanVAE) -> None:
    video = random_video(vae.config, 9, batch=1)
    gradients = []
    for chunk in (1, None):
        vae.zero_grad()
        vae.encode_moments(video, chunk=chunk)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in vae.encoder.parameters()])
    for ours, other in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_bfloat16_weights_give_float32_values_near_the_exact_ones(vae: WanVAE) -> None:
    video, latents = random_video(vae.config, 9), random_latents(vae.config, 3)
    exact_latents, exact_frames = vae.encode(video), vae.decode(latents)
    vae.to(torch.bfloat16)
    rough_latents, rough_frames = vae.encode(video), vae.decode(latents)
    for rough, exact in ((rough_latents, exact_latents), (rough_frames, exact_frames)):
        assert rough.dtype == torch.float32
        # bf16 keeps 8 bits (0.4 %); some 30 layers of it stay within a few per cent.
        assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05


@torch.inference_mode()
def test_a_vae_built_on_the_meta_device_and_then_loaded_is_the_same(vae: WanVAE) -> None:
    with torch.device("meta"):
        loaded = WanVAE(vae.config)
    loaded.load_state_dict(vae.state_dict(), strict=True, assign=True)
    latents = random_latents(vae.config, 2)
    assert torch.equal(loaded.decode(latents), vae.decode(latents))
    emptied = WanVAE(vae.config).to_empty(device="cpu")
    emptied.load_state_dict(vae.state_dict(), strict=True)
    assert torch.equal(emptied.decode(latents), vae.decode(latents))


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters", "num_encoder", "num_decoder"),
    [
        (VAE_2_1, 194, 126_892_531, 53_595_872, 73_295_331),
        (VAE_2_2, 196, 704_688_668, 149_627_776, 555_049_228),
    ],
)
def test_full_size_networks_have_the_released_number_of_parameters(
    config: VAEConfig, num_tensors: int, num_parameters: int, num_encoder: int, num_decoder: int
) -> None:
    with torch.device("meta"):
        vae = WanVAE(config)
    assert len(vae.state_dict()) == num_tensors
    for module, count in (
        (vae, num_parameters), (vae.encoder, num_encoder), (vae.decoder, num_decoder)
    ):  # fmt: skip
        assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=["2.1", "2.2"])
def test_full_size_names_map_onto_the_full_size_diffusers_model(config: VAEConfig) -> None:
    with torch.device("meta"):
        vae = WanVAE(config)
        theirs = new_diffusers_vae(config)
    ours = {
        official_to_diffusers_vae(name, config): v.shape for name, v in vae.state_dict().items()
    }
    assert ours == {name: value.shape for name, value in theirs.state_dict().items()}


def test_patchify_puts_the_column_before_the_row_in_the_channel_index() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 1, 2, 2)  # rows (1 2), (3 4)
    assert patchify(image, 2).flatten().tolist() == [1, 3, 2, 4]
    video = torch.randn(2, 3, 5, 4, 6)
    assert patchify(video, 2).shape == (2, 12, 5, 2, 3)
    assert torch.equal(unpatchify(patchify(video, 2), 2), video)


def test_the_first_frame_is_averaged_with_a_zero_frame() -> None:
    ones = torch.ones(1, 2, 1, 2, 2)
    down = average_down(ones, out_dim=2, in_time=True, in_space=True)
    assert down.shape == (1, 2, 1, 1, 1)
    assert down.flatten().tolist() == [0.5, 0.5]
    by_offset = average_down(ones, out_dim=4, in_time=True, in_space=True)
    assert by_offset.flatten().tolist() == [0, 1, 0, 1], "channel, then the time offset"


def test_duplicating_gives_the_first_frame_once_and_later_ones_twice() -> None:
    frames = torch.arange(3.0).view(1, 1, 3, 1, 1)
    options = {"out_dim": 1, "in_time": True}
    first = duplicate_up(frames, is_first=True, **options)
    assert first[0, 0, :, 0, 0].tolist() == [0, 1, 1, 2, 2]
    later = duplicate_up(frames, is_first=False, **options)
    assert later[0, 0, :, 1, 1].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 3, 4, 16, 16), "4 frames"), ((1, 3, 5, 16, 20), "20x16"), ((1, 3, 5, 12, 16), "16x12")],
)
def test_a_video_that_does_not_divide_into_latents_is_refused(shape, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WanVAE(TINY["2.1 flat"]).encode(torch.zeros(shape))


def test_a_chunk_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WanVAE(TINY["2.1 flat"]).decode(torch.zeros(1, 2, 1, 2, 2), chunk=0)
