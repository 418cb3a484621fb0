"""What only cards can show: real kernels, the side stream, NCCL. Skipped where there are none."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_offload import model_of
from test_torchrun import FAST, ROOT

from wan_model.attention import check_kernel
from wan_model.backends import ATTENTION_BACKENDS, WITHOUT_LSE
from wan_model.engine import ExpertEngine, VAEEngine
from wan_model.generate import main
from wan_model.offload import offload_blocks
from wan_model.parallel import SequenceParallel

PACKAGES = {
    "flash_attn": "flash_attn_interface",
    "flash_attn_4": "flash_attn",
    "sage": "sageattention",
}
TOLERANCE = 1e-4  # float32 with TF32 off, other kernels and another order of sums
WAYS = ["--ulysses-degree 2", "--ring-degree 2", "--cfg-parallel", "--ulysses-degree 2 --fsdp"]

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_card
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_every_kernel_that_is_installed_computes_attention_on_this_card(backend):
    package = PACKAGES.get(backend)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    needs_lse = backend not in WITHOUT_LSE["own"]
    check_kernel(backend, device="cuda", dtype=torch.bfloat16, head_dim=128, needs_lse=needs_lse)


@needs_card
def test_an_offloaded_expert_is_equal_to_the_bit_when_copies_and_blocks_overlap():
    latents = torch.randn(1, 16, 9, 32, 32, device="cuda")
    prompt, timesteps = torch.randn(7, 32, device="cuda"), torch.tensor([[900.0]], device="cuda")

    @torch.inference_mode()
    def forwards(model):
        text = model.embed_text([prompt])
        return [model(latents, timesteps, text, SequenceParallel()) for _ in range(3)]

    whole = model_of(5).cuda()
    whole.fused = False
    offloaded = offload_blocks(model_of(5), "cuda")
    for got, expected in zip(forwards(offloaded), forwards(whole), strict=True):
        assert torch.equal(got, expected)


@needs_card
@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_engines_warm_up_on_this_card(tiny, task):
    how = {"checkpoint": str(tiny(task)), "device": "cuda"}
    expert = ExpertEngine(expert="high_noise", attention="sdpa", **how)  # takes any head_dim
    for engine in (expert, VAEEngine(**how)):
        engine.warm_up()


@needs_card
def test_float32_on_a_card_makes_the_latents_of_a_cpu(tiny, tmp_path):
    where = ["--checkpoint", str(tiny("t2v-A14B")), "--dtype", "float32", "--attention", "sdpa"]
    made = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.safetensors"
        assert main([*where, "--device", device, "--output", str(path), *FAST]) == 0
        made.append(load_file(path)["latents"])
    assert np.abs(made[1] - made[0]).max() <= TOLERANCE


@needs_cards
def test_frames_of_the_second_card_have_arrived_when_they_are_given_out(tiny):
    state = {"latents": np.random.default_rng(0).standard_normal((16, 5, 60, 60), np.float32)}
    how = {"checkpoint": str(tiny("t2v-A14B")), "dtype": "float32"}
    first, second = (VAEEngine(device=f"cuda:{i}", **how).decode_frames(state) for i in range(2))
    assert np.array_equal(first, second)


@needs_cards
@pytest.mark.parametrize("way", WAYS)
def test_two_cards_make_the_latents_of_one(tiny, tmp_path, way):
    folder, precise = tiny("t2v-A14B"), ["--dtype", "float32", "--attention", "sdpa"]
    paths = [tmp_path / "alone.safetensors", tmp_path / "together.safetensors"]
    alone = ["--checkpoint", str(folder), "--output", str(paths[0]), "--device", "cuda"]
    assert main([*alone, *FAST, *precise]) == 0
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "wan_model.generate", "--checkpoint", str(folder), "--output", str(paths[1]),
         *FAST, *precise, *way.split()],
        cwd=ROOT, timeout=200, check=True,
    )  # fmt: skip
    expected, got = (load_file(path)["latents"] for path in paths)
    assert np.abs(got - expected).max() <= TOLERANCE
