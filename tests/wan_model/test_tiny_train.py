"""The trainer of wan-tiny, on a CPU and on clips small enough for it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from wan_model import media
from wan_model.config import NEGATIVE_PROMPT, Expert
from wan_model.parallel import SequenceParallel
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.text_encoder import TextEncoder
from wan_model.tiny.clips import CLIP_SHAPE, ClipWorkers
from wan_model.tiny.data import VOCABULARY, sample_clip
from wan_model.tiny.evaluate import Models, expert_variants, sample
from wan_model.tiny.loop import Loop, Schedule
from wan_model.tiny.muon import orthogonalise
from wan_model.tiny.networks import MODELS, TEXT_ENCODER, caption_tokenizer
from wan_model.tiny.train import main
from wan_model.tiny.train_denoiser import (
    LatentPool,
    build_expert,
    build_text_encoder,
    denoising_loss,
    embed_prompts,
    noise_ranges,
    num_stacked,
    token_ids,
    widen_for_images,
    with_mask,
)
from wan_model.tiny.train_vae import (
    PARTS,
    Phase,
    build_vae,
    measure_statistics,
    reconstruction_loss,
    to_pixels,
)
from wan_model.transformer import WanTransformer

CPU = torch.device("cpu")
FLOAT = torch.float32


def small_config(task: str):
    config = MODELS[task]
    transformer = replace(config.transformer, dim=96, num_layers=1, ffn_dim=96, num_heads=2)
    vae = replace(config.vae, encoder_dim=8, decoder_dim=8, dim_mult=(1, 2, 2, 2))
    return replace(config, transformer=transformer, vae=vae, width=32, height=32, num_frames=5)


def small_clips(num_clips: int) -> torch.Tensor:
    clips = [sample_clip(0, i, num_frames=5, height=32, width=32) for i in range(num_clips)]
    return torch.from_numpy(np.stack([clip.frames for clip in clips]))


def small_pool(task: str) -> LatentPool:
    config, tokenizer = small_config(task), caption_tokenizer()
    shape = config.latent_shape(width=32, height=32, num_frames=5)
    texts = ["a red circle moves left", "a blue star grows", NEGATIVE_PROMPT, ""]
    rows = [token_ids(tokenizer, text) for text in texts]
    ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(0)
    latents = torch.ones(2, *shape) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    images = torch.randn(2, *shape, generator=generator).half() if task == "i2v" else None
    return LatentPool(
        latents=latents.half(), token_ids=ids[:2], dropped_ids=ids[2:], image_latents=images
    )


def small_loop(networks, schedule: Schedule, names=("loss",), **kwargs) -> Loop:
    return Loop(networks, schedule, part_names=names, device=CPU, log_every_s=0.0, **kwargs)


def schedule(num_iterations: int, learning_rate: float = 3e-3) -> Schedule:
    return Schedule(learning_rate=learning_rate, num_iterations=num_iterations, num_warm_up=5)


# ------------------------------------------------------------------------------------ learning


def test_a_vae_learns_to_reconstruct_a_few_clips():
    torch.manual_seed(0)
    config = small_config("t2v").vae
    vae = build_vae(config, device=CPU, dtype=FLOAT)
    loss = reconstruction_loss(
        vae, small_clips(2), Phase(until=1.0, num_frames=5, side=32, batch_size=2)
    )
    loop = small_loop({"vae": vae}, schedule(60), PARTS)
    loop.run(loss)
    first, last = loop.history[0], loop.history[-1]
    assert last["l1"] < 0.5 * first["l1"]
    assert last["mse"] < 0.3 * first["mse"]


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_experts_learn_the_velocity_of_two_clips(task):
    torch.manual_seed(0)
    config = small_config(task)
    experts = {name: build_expert(config, device=CPU, dtype=FLOAT) for name in config.experts}
    text_encoder = build_text_encoder(config, device=CPU, dtype=FLOAT)
    loss = denoising_loss(experts, text_encoder, small_pool(task), config, batch_size=4)
    names = tuple(name.value for name in experts)
    networks = {name.value: expert for name, expert in experts.items()}
    loop = small_loop(networks, schedule(50), names, num_stacked=num_stacked)
    loop.run(loss)
    for name in names:
        assert loop.history[-1][name] < 0.5 * loop.history[0][name]


def test_training_continues_exactly_from_its_checkpoint(tmp_path):
    def networks():
        torch.manual_seed(0)
        expert = build_expert(small_config("ti2v"), device=CPU, dtype=torch.bfloat16)
        encoder = build_text_encoder(small_config("ti2v"), device=CPU, dtype=torch.bfloat16)
        loss = denoising_loss(
            {Expert.HIGH_NOISE: expert}, encoder, small_pool("ti2v"), small_config("ti2v"),
            batch_size=2,
        )  # fmt: skip
        return {"high_noise": expert, "text_encoder": encoder}, loss

    trained, loss = networks()
    through = small_loop(trained, schedule(6), num_stacked=num_stacked)
    through.run(loss)

    trained, loss = networks()
    small_loop(trained, schedule(6), num_stacked=num_stacked).run(
        loss, until=0.5, checkpoint=tmp_path / "training.pt"
    )
    trained, loss = networks()
    resumed = small_loop(trained, schedule(6), num_stacked=num_stacked)
    resumed.load(tmp_path / "training.pt")
    assert resumed.iteration == 3
    resumed.run(loss)

    assert torch.equal(through.weights, resumed.weights)
    assert torch.equal(through.average, resumed.average)


def test_an_orthogonalised_matrix_has_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((24, 8), (8, 24), (16, 16)):
        x = 1e-3 * torch.randn(2, rows, columns, generator=generator)
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        values = torch.linalg.svdvals(orthogonalise(x))
        # Newton-Schulz of five steps leaves 0.7 to 1.2, and less of a value below a hundredth.
        assert 0.5 < values.median() < 1.3 and values.max() < 1.3
        alignment = (orthogonalise(x) * (u @ vt)).sum((1, 2)) / min(rows, columns)
        assert (alignment > 0.8).all()


def test_each_part_of_a_fused_weight_is_a_matrix_and_adamw_has_the_rest():
    expert = build_expert(small_config("t2v"), device=CPU, dtype=FLOAT)
    counts = {n: num_stacked(f"high_noise.{n}", p) for n, p in expert.named_parameters()}
    assert counts["blocks.0.self_attn.qkv.weight"] == 3
    assert counts["blocks.0.cross_attn.kv.weight"] == 2
    assert counts["blocks.0.ffn.0.weight"] == 1
    others = {name for name, count in counts.items() if not count}
    assert {"head.head.weight", "blocks.0.modulation", "blocks.0.ffn.0.bias"} <= others


def test_a_training_checkpoint_of_other_networks_is_refused(tmp_path):
    loop = small_loop({"a": torch.nn.Linear(2, 2)}, schedule(1))
    loop.save(tmp_path / "training.pt")
    with pytest.raises(ValueError, match="other networks"):
        small_loop({"b": torch.nn.Linear(2, 2)}, schedule(1)).load(tmp_path / "training.pt")


def test_a_step_whose_gradient_overflows_changes_nothing():
    network = torch.nn.Linear(1, 1)
    loop = small_loop({"a": network}, schedule(4))
    before = loop.weights.detach().clone()

    def loss(generator):
        total = network.weight.sum() * float("inf")
        return total, torch.zeros(1)

    loop.run(loss, until=0.25)
    assert torch.equal(loop.weights, before)


def test_a_lost_loss_ends_the_training():
    network = torch.nn.Linear(1, 1)
    loop = small_loop({"a": network}, schedule(4))
    with pytest.raises(FloatingPointError, match="iteration"):
        loop.run(lambda generator: (network.weight.sum(), torch.full((1,), float("nan"))))


def test_a_fresh_expert_predicts_what_it_is_shown():
    config = MODELS["ti2v"]
    torch.manual_seed(0)
    expert = build_expert(config, device=CPU, dtype=FLOAT)
    context = expert.embed_text([torch.zeros(1, TEXT_ENCODER.d_model)])
    noise = torch.randn(1, 48, 2, 4, 4)
    with torch.inference_mode():
        velocity = expert(noise, torch.tensor([[999.0]]), context, SequenceParallel())
    # The blocks' own first outputs are in between.
    assert (velocity - noise).square().mean() < 0.3


# ------------------------------------------------------------ what is trained is what is served


def test_noise_ranges_are_the_two_sides_of_the_boundary():
    config = MODELS["t2v"]
    ranges = noise_ranges(config)
    sigma = {u: config.shift * u / (1 + (config.shift - 1) * u) for u in ranges[Expert.LOW_NOISE]}
    assert list(sigma.values()) == pytest.approx([0.0, config.boundary_ratio])
    assert ranges[Expert.HIGH_NOISE] == (ranges[Expert.LOW_NOISE][1], 1.0)
    # The share of the schedule that each expert takes at inference is about its share of u.
    steps = build_schedule(VideoParams.for_model(config, num_steps=1000))
    share = steps.boundary_step / steps.num_steps
    assert share == pytest.approx(1 - ranges[Expert.HIGH_NOISE][0], abs=0.01)


def test_prompts_are_embedded_as_the_service_does():
    torch.manual_seed(0)
    encoder = build_text_encoder(MODELS["t2v"], device=CPU, dtype=FLOAT)
    tokenizer = caption_tokenizer()
    prompts = ["a red circle moves left", NEGATIVE_PROMPT]
    ids = small_pool("t2v").token_ids[:1], small_pool("t2v").dropped_ids[:1]
    embeds = embed_prompts(encoder, torch.cat(ids))
    served = TextEncoder(encoder, tokenizer).encode(prompts)
    for row, expected in zip(embeds, served, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert not row[len(expected) :].any()


def test_an_image_is_masked_as_the_service_does():
    mask = media.i2v_mask(17, 16, 16, has_last=False)
    trained = with_mask(torch.ones(1, 16, 5, 16, 16))[0]
    assert torch.equal(trained[:4], mask)


def test_a_widened_expert_ignores_the_image_at_first():
    config = small_config("t2v")
    torch.manual_seed(0)
    narrow = WanTransformer(config.transformer)
    wide = WanTransformer(replace(config.transformer, in_channels=36))
    wide.load_state_dict(widen_for_images(narrow.state_dict(), 36))
    latents = torch.randn(1, 36, 2, 4, 4)
    context = narrow.embed_text([torch.randn(3, TEXT_ENCODER.d_model)])
    sp = SequenceParallel()
    expected = narrow(latents[:, :16], torch.tensor([[900.0]]), context, sp)
    torch.testing.assert_close(wide(latents, torch.tensor([[900.0]]), context, sp), expected)


def test_measured_statistics_normalise_the_latents():
    torch.manual_seed(0)
    frames = small_clips(8)
    vae = build_vae(small_config("t2v").vae, device=CPU, dtype=FLOAT)
    vae.config = measure_statistics(vae, frames)
    latents = vae.encode(to_pixels(frames), chunk=None)
    flat = latents.transpose(0, 1).flatten(1)
    # Config files hold six decimals of statistics of order 0.1.
    torch.testing.assert_close(flat.mean(1), torch.zeros(16), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(flat.std(1), torch.ones(16), atol=1e-4, rtol=0.0)


def test_swapped_experts_are_the_other_way_round():
    variants = expert_variants({Expert.HIGH_NOISE: "h", Expert.LOW_NOISE: "l"})
    assert variants["swapped"] == {Expert.HIGH_NOISE: "l", Expert.LOW_NOISE: "h"}
    assert variants["high noise only"] == {Expert.HIGH_NOISE: "h", Expert.LOW_NOISE: "h"}


@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v"])
def test_a_batch_is_sampled_as_its_videos_would_be_alone(task):
    config = small_config(task)
    torch.manual_seed(0)
    vae = build_vae(config.vae, device=CPU, dtype=FLOAT).requires_grad_(False)
    experts = {name: WanTransformer(config.transformer) for name in config.experts}
    encoder = build_text_encoder(config, device=CPU, dtype=FLOAT)
    models = Models(
        config=config, experts=experts, text_encoder=encoder, tokenizer=caption_tokenizer(), vae=vae
    )
    prompts = ["a red circle moves left", "a star"]
    images = None if task == "t2v" else small_clips(2)[:, 0]
    both = sample(models, prompts, first_frames=images, num_steps=3, seed=5)
    second = sample(
        models, prompts[1:], first_frames=None if images is None else images[1:],
        num_steps=3, seed=6,
    )  # fmt: skip
    # Rounding of batched products, over three steps.
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ data and words


def test_every_caption_word_is_a_token_and_no_other_is():
    tokenizer = caption_tokenizer()
    unknown = tokenizer.token_to_id("<unk>")
    ids = tokenizer.encode(" ".join(VOCABULARY)).ids
    assert len(set(ids)) == len(VOCABULARY) + 1 and unknown not in ids and ids[-1] == 1
    assert tokenizer.encode("A Red, circle!").ids == tokenizer.encode("a red circle").ids
    assert tokenizer.encode(NEGATIVE_PROMPT).ids == [unknown, 1]


def test_worker_processes_render_the_same_clips_as_none():
    workers = ClipWorkers(2)
    try:
        num_clips = 70  # more than one slot's
        frames = torch.empty((num_clips, *CLIP_SHAPE), dtype=torch.uint8)
        captions = [""] * num_clips
        for start, piece, texts in workers.render(num_clips, seed=3):
            frames[start : start + len(texts)] = piece
            captions[start : start + len(texts)] = texts
    finally:
        workers.close()
    for index in (0, 31, 32, 69):
        clip = sample_clip(3, index)
        assert captions[index] == clip.caption
        assert np.array_equal(frames[index].numpy(), clip.frames)


def test_the_command_line_trains_a_vae_and_reports(tmp_path, monkeypatch):
    small = Phase(until=1.0, num_frames=5, side=32, batch_size=1)
    monkeypatch.setattr("wan_model.tiny.train_vae.PHASES", (small,))
    numbers = ["--iterations", "2", "--pool", "2", "--evaluate", "1", "--device", "cpu"]
    assert main(["--stage", "vae22", "--out", str(tmp_path), *numbers]) == 0
    report = json.loads((tmp_path / "vae22" / "report.json").read_text())
    assert report["iterations"] == 2 and "psnr_db" in report["scores"]["held out"]
    assert {path.name for path in (tmp_path / "vae22").iterdir()} == {
        "report.json", "samples.png", "training.pt", "weights.safetensors",
    }  # fmt: skip


def test_a_stage_names_the_stage_it_needs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(f"--stage t2v --device cpu --iterations 1 --pool 1 --out {tmp_path}".split())
    assert "run --stage vae first" in capsys.readouterr().err
