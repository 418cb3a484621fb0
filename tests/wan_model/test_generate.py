"""The whole loop against Diffusers' pipelines, and that each mistake of the loop would be seen.

Latents are compared, never pixels. Both sides get the same noise (a CPU generator with the job's
seed) and the official sigmas; for I2V the already resized image, since the two resize differently.
"""

import dataclasses
import io

import numpy as np
import pytest
import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from wan_model import engine as engine_module
from wan_model import generate as generate_module
from wan_model.config import Expert
from wan_model.generate import Placement, Request, check_effects, decode, encode, generate
from wan_model.params import VideoParams
from wan_model.schedule import build_schedule
from wan_model.state import draw_noise
from wan_model.weights import open_checkpoint

TOLERANCE = 5e-5  # float32 rounding over a loop; the smallest mistake below costs 20 times more
PROMPT = "two cats in boxing gloves fight on a stage"
SIZE = {"width": 64, "height": 32, "num_frames": 9}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(file, "PNG")
    return file.getvalue()


def request(folder, image=None, last_image=None, negative_prompt="blurry", **given) -> Request:
    config = open_checkpoint(str(folder)).config
    given = SIZE | {"num_steps": 6, "seed": 11} | given
    return Request(
        checkpoint=str(folder),
        prompt=PROMPT,
        negative_prompt=negative_prompt,
        image=image,
        last_image=last_image,
        params=VideoParams.for_model(config, **given),
    )


class OfficialSigmas(UniPCMultistepScheduler):
    """Diffusers' UniPC on a given grid: its own grid is another one (wan-spec, section 6)."""

    def use(self, schedule):
        self.official = schedule
        return self

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(num_inference_steps, device)
        self.sigmas = torch.tensor(self.official.sigmas)
        self.timesteps = torch.tensor(self.official.timesteps).long()
        self.set_begin_index(0)


def diffusers_latents(made: Request, folder, **more) -> np.ndarray:
    pipeline_class = WanImageToVideoPipeline if made.image else WanPipeline
    pipeline = pipeline_class.from_pretrained(folder)
    # Ours is compared in float32. Its float32 sums over 500 equal rows of padding are 3e-5 off.
    for expert in (pipeline.transformer, pipeline.transformer_2):
        if expert is not None:
            expert.double()
    pipeline.set_progress_bar_config(disable=True)
    p = made.params
    pipeline.scheduler = OfficialSigmas(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ).use(build_schedule(p))
    if p.boundary_ratio is not None:
        pipeline.register_to_config(boundary_ratio=p.boundary_ratio)
        more["guidance_scale_2"] = p.guidance_low_noise
    conditioning = encode(made, Placement(), open_checkpoint(made.checkpoint).config)

    def padded(embeds):
        return torch.nn.functional.pad(torch.tensor(embeds), (0, 0, 0, 512 - len(embeds)))[None]

    if made.image:
        more["image"] = pixels(made.image)
    if made.last_image:
        more["last_image"] = pixels(made.last_image)
    return pipeline(
        prompt_embeds=padded(conditioning["prompt_embeds"]),
        negative_prompt_embeds=padded(conditioning["negative_prompt_embeds"]),
        width=p.width, height=p.height, num_frames=p.num_frames, num_inference_steps=p.num_steps,
        guidance_scale=p.guidance_high_noise,
        latents=draw_noise(p.latent_shape(open_checkpoint(made.checkpoint).config), p.seed)[None],
        output_type="latent", **more,
    ).frames[0].numpy()  # fmt: skip


def pixels(image: bytes) -> torch.Tensor:
    array = np.array(Image.open(io.BytesIO(image)).convert("RGB"), np.float32)
    return torch.tensor(array).permute(2, 0, 1)[None] / 255


def difference(made: Request, folder, **more) -> float:
    expected = diffusers_latents(made, folder, **more)
    assert np.abs(expected).max() > 0.5
    return np.abs(generate(made)["latents"] - expected).max()


@pytest.mark.parametrize("num_steps", [1, 2, 6, 40])
def test_t2v_with_two_experts_equals_diffusers(tiny, num_steps):
    folder = tiny("t2v-A14B")
    assert difference(request(folder, num_steps=num_steps), folder) <= TOLERANCE


def test_one_frame_is_an_image(tiny):
    folder = tiny("t2v-A14B")
    made = request(folder, num_frames=1)
    assert difference(made, folder) <= TOLERANCE
    assert decode(made, Placement(), generate(made)).shape == (1, 32, 64, 3)


def test_i2v_equals_diffusers(tiny):
    folder = tiny("i2v-A14B")
    assert difference(request(folder, image=png(64, 32)), folder) <= TOLERANCE


def test_first_and_last_frame_equal_diffusers(tiny):
    folder = tiny("i2v-A14B")
    made = request(folder, image=png(64, 32), last_image=png(64, 32, seed=1))
    assert difference(made, folder) <= TOLERANCE


def test_ti2v_from_text_equals_diffusers(tiny):
    folder = tiny("ti2v-5B")
    assert difference(request(folder), folder) <= TOLERANCE


def test_ti2v_from_an_image_equals_diffusers_and_keeps_the_first_frame(tiny):
    folder = tiny("ti2v-5B")
    made = request(folder, image=png(64, 32))
    assert difference(made, folder) <= TOLERANCE
    first = encode(made, Placement(), open_checkpoint(str(folder)).config)["first_frame"]
    assert np.array_equal(generate(made)["latents"][:, :1], first)


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_both_layouts_of_the_same_weights_give_the_same_latents(tiny, task):
    image = png(64, 32) if task != "t2v-A14B" else None
    official = generate(request(tiny(task, "official"), image=image))["latents"]
    assert np.array_equal(official, generate(request(tiny(task), image=image))["latents"])


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resuming_from_an_exported_state_gives_the_same_latents(tiny, solver, stop):
    """`stop` lies before, at and after the switch of experts (boundary_step is 4)."""
    folder = tiny("t2v-A14B")
    made = request(folder, solver=solver)
    schedule = build_schedule(made.params)
    conditioning = encode(made, Placement(), open_checkpoint(str(folder)).config)
    state = None
    for steps in (range(0, stop), range(stop, 6)):
        for step_index in steps:
            expert = engine_module.ExpertEngine(
                checkpoint=str(folder), expert=schedule.expert_at(step_index), device="cpu"
            )
            params = dataclasses.asdict(made.params)
            expert.open("j", params=params, conditioning=conditioning, state=state)
            expert.step("j")
            state = expert.export("j")
    assert np.array_equal(state["latents"], generate(made)["latents"])


def test_guidance_of_one_is_the_prompt_alone(tiny):
    folder = tiny("t2v-A14B")
    alone = generate(request(folder, guidance=1.0, negative_prompt=""))["latents"]
    nearly = generate(request(folder, guidance=1.0 + 1e-9))["latents"]  # evaluates both passes
    np.testing.assert_allclose(alone, nearly, atol=TOLERANCE)


def test_an_empty_negative_prompt_is_the_models_default(tiny):
    folder = tiny("t2v-A14B")
    made = dataclasses.replace(request(folder), negative_prompt="")
    default = open_checkpoint(str(folder)).config.negative_prompt
    spelled_out = generate(dataclasses.replace(made, negative_prompt=default))["latents"]
    assert np.array_equal(generate(made)["latents"], spelled_out)
    other = generate(dataclasses.replace(made, negative_prompt="blurry"))["latents"]
    assert np.abs(other - spelled_out).max() > 20 * TOLERANCE


def refused(made: Request, placement: Placement | None = None) -> str:
    """What `generate` says, before it has made a step."""
    steps = []
    with pytest.raises(ValueError) as caught:
        generate(made, placement, on_step=steps.append)
    assert steps == []
    return str(caught.value)


def test_a_lora_that_cannot_be_used_is_refused_before_the_first_step(tiny, tmp_path):
    made, path = request(tiny("t2v-A14B")), tmp_path / "lora.safetensors"
    made = dataclasses.replace(made, loras_low_noise=[(str(path), 1.0)])
    assert "lora.safetensors is missing" in refused(made)
    save_file({"diffusion_model.blocks.99.ffn.0.diff_b": torch.zeros(8)}, path)
    assert "that this model does not have" in refused(made)


@pytest.mark.parametrize(("boundary_ratio", "idle"), [(0.0, "low"), (1.0, "high")])
def test_a_lora_of_an_expert_that_takes_no_step_is_refused(tiny, boundary_ratio, idle):
    made = request(tiny("t2v-A14B"), boundary_ratio=boundary_ratio)
    made = dataclasses.replace(made, **{f"loras_{idle}_noise": [("x.safetensors", 1.0)]})
    assert refused(made) == (
        f"LoRA x.safetensors has no effect: the {idle}-noise expert takes no step"
    )


@pytest.mark.parametrize("given", [{"num_steps": 1}, {"boundary_ratio": 0}, {"boundary_ratio": 1}])
def test_a_boundary_seed_without_a_boundary_is_refused(tiny, given):
    made = request(tiny("t2v-A14B"), boundary_seed=5, **given)
    assert refused(made) == (
        "boundary_seed has no effect: one expert takes every step of this schedule"
    )


UNGUIDED = [
    {"guidance": 1},
    {"guidance_low_noise": 1, "boundary_ratio": 1},
    {"guidance_high_noise": 1, "boundary_ratio": 0},
]


@pytest.mark.parametrize("given", UNGUIDED)
def test_a_negative_prompt_is_refused_where_every_guidance_in_use_is_one(tiny, given):
    message = refused(request(tiny("t2v-A14B"), **given))
    assert message == "negative_prompt has no effect: with guidance 1 no step reads it"
    check_effects(request(tiny("t2v-A14B"), negative_prompt="", **given), Placement())
    check_effects(request(tiny("t2v-A14B"), guidance_low_noise=1), Placement())


@pytest.mark.parametrize("given", UNGUIDED)
def test_cfg_parallel_is_refused_where_every_guidance_in_use_is_one(tiny, given):
    made = request(tiny("t2v-A14B"), negative_prompt="", **given)
    message = refused(made, Placement(cfg_parallel=True))
    assert message == "cfg_parallel has no effect: with guidance 1 there is nothing to divide"
    one_of_two = request(tiny("t2v-A14B"), guidance_high_noise=1)
    assert "cfg 2" in refused(one_of_two, Placement(cfg_parallel=True)), "on one rank"


def refused_images(monkeypatch, made: Request) -> str:
    """What `generate` says, before it has opened the text encoder or the VAE."""
    monkeypatch.delattr(generate_module, "TextEncoderEngine")
    monkeypatch.delattr(generate_module, "VAEEngine")
    return refused(made)


@pytest.mark.parametrize(("task", "num_frames"), [("ti2v-5B", 9), ("i2v-A14B", 1)])
def test_a_last_image_that_cannot_be_used_is_refused(tiny, monkeypatch, task, num_frames):
    image = png(64, 32)
    made = request(tiny(task), image=image, last_image=image, num_frames=num_frames)
    assert refused_images(monkeypatch, made) == (
        "last_image has no effect: it needs an I2V model and more than one frame"
    )


def test_an_image_that_would_be_the_whole_video_is_refused(tiny, monkeypatch):
    made = request(tiny("ti2v-5B"), image=png(64, 32), num_frames=1)
    assert refused_images(monkeypatch, made) == (
        "image leaves nothing to make: it is the first frame, and there is one"
    )


def swapped_experts(monkeypatch):
    original = engine_module.ExpertEngine.__init__

    def swapped(self, *, expert, **kwargs):
        other = {Expert.HIGH_NOISE: Expert.LOW_NOISE, Expert.LOW_NOISE: Expert.HIGH_NOISE}
        original(self, expert=other[expert], **kwargs)
        self.expert = expert

    monkeypatch.setattr(engine_module.ExpertEngine, "__init__", swapped)


def swapped_guidance(monkeypatch):
    original = engine_module.ExpertEngine.open

    def swapped(self, job_id, *, params, **kwargs):
        high, low = params["guidance_high_noise"], params["guidance_low_noise"]
        params = params | {"guidance_high_noise": low, "guidance_low_noise": high}
        original(self, job_id, params=params, **kwargs)

    monkeypatch.setattr(engine_module.ExpertEngine, "open", swapped)


def diffusers_grid(monkeypatch):
    def other_grid(params):
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=params.shift
        )
        scheduler.set_timesteps(params.num_steps)
        return dataclasses.replace(
            build_schedule(params),
            sigmas=tuple(scheduler.sigmas.tolist()),
            timesteps=tuple(float(t) for t in scheduler.timesteps),
        )

    monkeypatch.setattr(engine_module, "build_schedule", other_grid)


def shift_of_the_repository(monkeypatch):
    def unshifted(params):
        return build_schedule(dataclasses.replace(params, shift=3.0))

    monkeypatch.setattr(engine_module, "build_schedule", unshifted)


@pytest.mark.parametrize(
    "mistake", [swapped_experts, swapped_guidance, diffusers_grid, shift_of_the_repository]
)
def test_a_mistake_in_the_loop_is_seen(tiny, monkeypatch, mistake):
    folder = tiny("t2v-A14B")
    made = request(folder)
    expected = diffusers_latents(made, folder)
    mistake(monkeypatch)
    assert np.abs(generate(made)["latents"] - expected).max() > 20 * TOLERANCE


def test_a_first_frame_that_is_not_imposed_is_seen(tiny, monkeypatch):
    folder = tiny("ti2v-5B")
    made = request(folder, image=png(64, 32))
    expected = diffusers_latents(made, folder)
    monkeypatch.setattr(engine_module, "_impose_first_frame", lambda state, conditioning: state)
    assert np.abs(generate(made)["latents"] - expected)[:, 1:].max() > 20 * TOLERANCE


@pytest.mark.parametrize("dtype, exact", [("float32", True), ("auto", False)])
def test_float32_on_a_gpu_is_not_rounded_to_tf32(monkeypatch, dtype, exact):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    engine_module.resolve_dtype(dtype, "cuda")
    assert torch.backends.cudnn.allow_tf32 is not exact
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, not 'half'"):
        engine_module.resolve_dtype("half", "cuda")
