"""What two ranks on gloo can show beyond the theorem: divided weights, xfuser's place, warm-up."""

import contextlib
import dataclasses
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import xfuser_package
from test_parallel import SIZES, TOLERANCE, conditioning

from wan_model import engine as engine_module
from wan_model import xfuser_backend
from wan_model.config import ParallelDims
from wan_model.engine import ExpertEngine, VAEEngine
from wan_model.parallel import make_mesh
from wan_model.params import VideoParams
from wan_model.sharding import local_bytes
from wan_model.weights import open_checkpoint
from wan_model.xfuser_backend import XfuserSequenceParallel, xfuser_kernel

VAE_TASKS = ("t2v-A14B", "ti2v-5B")  # VAE 2.1 and 2.2
REUSE = {"cache": 1.0, "num_steps": 4}
QUANTISED = {
    "fp8 products": {"precision": "fp8"},
    "fp8 products and attention": {"precision": "fp8", "attention": "fp8"},
}
CASES = {
    "whole weights": {},
    "divided weights": {"shard_weights": True},
    "xfuser": {"parallel_backend": "xfuser"},
}


def latents_of(
    folder: str, cache: float | None = None, num_steps: int = 2, **options
) -> tuple[np.ndarray, int]:
    """Some steps of 45 tokens, which do not divide; and the bytes of weights of this rank."""
    config = open_checkpoint(folder).config
    width, height, num_frames = SIZES["does-not-divide"]
    params = VideoParams.for_model(
        config, width=width, height=height, num_frames=num_frames, num_steps=8, cache=cache
    )
    engine = ExpertEngine(checkpoint=folder, expert="high_noise", device="cpu", **options)
    engine.warm_up()
    assert engine.jobs == {}, "nothing is left of the warm-up"
    engine.open("j", params=dataclasses.asdict(params), conditioning=conditioning(config, params))
    reused = [engine.step("j")["reused"] for _ in range(num_steps)]
    assert any(reused) == (cache is not None)
    return engine.export("j")["latents"], local_bytes(engine.transformer)


def run_rank(rank: int, port: int, folders: dict[str, str], results) -> None:
    folder = folders["t2v-A14B"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    xfuser_package.install()
    for name, options in CASES.items():
        results[name, rank] = latents_of(folder, ulysses_degree=2, **options)
    for name, options in QUANTISED.items():
        results[name, rank] = latents_of(folder, ulysses_degree=2, **options)
    results["reused step", rank] = latents_of(folder, cfg_parallel=True, **REUSE)
    for task in VAE_TASKS:
        results["frames", task, rank] = decoded(folders[task], split_rows=True)
    results["xfuser was told", rank] = dict(xfuser_package.calls)
    results["xfuser's ring", rank] = ring_of_odd_tokens()
    dist.barrier()  # the store is in rank 0's process: the other one still connects through it
    dist.destroy_process_group()


def decoded(folder: str, **options) -> np.ndarray:
    """9 frames of 7 rows of latents: in one chunk, frame by frame, and laid out as on a GPU."""
    engine = VAEEngine(checkpoint=folder, device="cpu", **options)
    z, t, h, w = engine.config.latent_shape(
        width=3 * engine.config.size_multiple, height=4 * engine.config.size_multiple, num_frames=9
    )
    latents = np.random.default_rng(2).standard_normal((z, t, h - 1, w)).astype(np.float32)
    frames = [engine.decode_frames({"latents": latents})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "ALL_AT_ONCE_PIXELS", 0)
        frames.append(engine.decode_frames({"latents": latents}))
        engine.vae.hold_channels_together()
        frames.append(engine.decode_frames({"latents": latents}))
    return np.stack(frames).astype(np.int16)


def ring_of_odd_tokens() -> str:
    mesh = make_mesh(ParallelDims(ring_degree=2), num_heads=2)
    sp = XfuserSequenceParallel(mesh, "auto", num_heads=2, device="cpu")
    x = torch.zeros(1, 23, 2, 16)
    with pytest.raises(ValueError) as caught:
        sp.attention(x, x, x, num_tokens=45)
    return str(caught.value)


@pytest.fixture(scope="module")
def seen(tiny):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {task: str(tiny(task)) for task in VAE_TASKS}
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(
            run_rank, args=(port, folders, results), nprocs=2, start_method="forkserver"
        )
        alone = {("frames alone", task): decoded(folder) for task, folder in folders.items()}
        alone["alone"] = latents_of(folders["t2v-A14B"])
        with one_thread():
            alone["alone", "on one thread"] = latents_of(folders["t2v-A14B"])
            for name, options in QUANTISED.items():
                alone["alone", name] = latents_of(folders["t2v-A14B"], **options)
        alone["alone, reused step"] = latents_of(folders["t2v-A14B"], **REUSE)
        return dict(results) | alone


@contextlib.contextmanager
def one_thread():
    """As each rank has: products are summed in another order by another number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("name", QUANTISED)
def test_two_ranks_quantise_to_the_same_bits_as_one(seen, name):
    """A difference of rounding would tip fp8 numbers, and no tolerance would tell it from a bug."""
    expected, _ = seen["alone", name]
    exact, _ = seen["alone", "on one thread"]
    if not np.array_equal(seen["whole weights", 0][0], exact):
        pytest.skip("this CPU's float32 products depend on the number of rows")
    assert not np.array_equal(expected, exact)
    for rank in range(2):
        assert np.array_equal(seen[name, rank][0], expected)


@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_single_process_latents(seen, name):
    expected, _ = seen["alone"]
    assert np.abs(expected).max() > 0.5
    for rank in range(2):
        assert np.abs(seen[name, rank][0] - expected).max() <= TOLERANCE


def test_two_ranks_reuse_the_same_steps_as_one(seen):
    expected, _ = seen["alone, reused step"]
    (first, _), (second, _) = (seen["reused step", rank] for rank in range(2))
    assert np.array_equal(first, second)
    assert np.abs(first - expected).max() <= TOLERANCE


@pytest.mark.parametrize("task", VAE_TASKS)
def test_a_video_decoded_by_rows_has_no_seams(seen, task):
    """Sums in another order may tip a pixel's rounding: off by one at most, and rarely."""
    expected = seen["frames alone", task]
    assert expected.std() > 10
    for rank in range(2):
        difference = np.abs(seen["frames", task, rank] - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_each_rank_keeps_half_of_the_blocks(seen):
    """What is not divided (embeddings, norms, modulation, head) is most of a tiny model."""
    whole = seen["whole weights", 0][1]
    parts = [whole - seen["divided weights", rank][1] for rank in range(2)]
    assert parts[0] == parts[1] > 0.25 * whole


def test_xfuser_is_set_up_with_our_degrees_and_computes_the_self_attention(seen):
    for rank in range(2):
        told = seen["xfuser was told", rank]
        assert told["environment"] == (2, rank, 0)
        assert told["degrees"] == (1, 1, 2)
        assert told["runtime"][0] == "SDPA_FLASH"
        # 2 blocks; the warm-up's 1 step and the job's 2, with guidance two forwards each.
        assert told["num_usp"] == 2 * (1 + 2) * 2


def test_xfuser_refuses_a_ring_that_would_attend_to_padding(seen):
    assert seen["xfuser's ring", 0].startswith(
        "45 tokens % (ring 2 * ulysses 1) = 1 != 0: xfuser's ring would attend to padding"
    )


def test_our_kernels_have_their_names_in_xfuser():
    one, ring = ParallelDims(ulysses_degree=2), ParallelDims(ring_degree=2)
    assert xfuser_kernel("cudnn", ring, device="cpu") == "CUDNN"
    assert xfuser_kernel("flash_attn_4", one, device="cpu") == "FLASH_4"
    assert xfuser_kernel("flash_attn", one, device="cpu") == "FLASH"
    with pytest.raises(ValueError, match="flash_attn_4 gives no log-sum-exp under xfuser"):
        xfuser_kernel("flash_attn_4", ring, device="cpu")
    with pytest.raises(ValueError, match="sage does not work under xfuser"):
        xfuser_kernel("sage", one, device="cpu")


def test_where_xfuser_finds_no_gpu_the_error_is_one_line(monkeypatch):
    def init_distributed_environment(**where):
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check ...")

    distributed = SimpleNamespace(
        model_parallel_is_initialized=lambda: False,
        init_distributed_environment=init_distributed_environment,
    )
    monkeypatch.setattr(xfuser_backend, "_import", lambda: (distributed, None, None))
    mesh = SimpleNamespace(dims=ParallelDims(ulysses_degree=2), rank=0)
    with pytest.raises(ValueError) as caught:
        XfuserSequenceParallel(mesh, "sdpa", num_heads=2, device="cpu")
    assert str(caught.value) == (
        "parallel backend xfuser cannot be started (Found no NVIDIA driver on your system.): it"
        " needs a CUDA device and Triton; use parallel backend own elsewhere"
    )


def test_without_xfuser_the_error_says_what_to_install():
    from wan_model.xfuser_backend import _import

    with pytest.raises(ValueError, match=r"xfuser is not installed: pip install 'wan-serve\["):
        _import()
