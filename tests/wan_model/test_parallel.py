"""The theorem: every (cfg, ring, ulysses) gives single-process latents, on gloo processes."""

import dataclasses
import itertools
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from wan_model.attention import attention, attention_with_lse
from wan_model.config import ParallelDims
from wan_model.engine import ExpertEngine
from wan_model.parallel import SequenceParallel
from wan_model.params import VideoParams
from wan_model.weights import open_checkpoint

TOLERANCE = 1e-5  # float32, other order of sums; latents of order 1 over two steps
SIZES = {"divides": (64, 64, 5), "does-not-divide": (80, 48, 9)}  # 32 and 45 tokens


def degrees(world_size: int) -> list[ParallelDims]:
    found = []
    for cfg, ring, ulysses in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 4, 8)):
        if cfg * ring * ulysses == world_size:
            found.append(
                ParallelDims(cfg_parallel=cfg == 2, ring_degree=ring, ulysses_degree=ulysses)
            )
    return found


def conditioning(config, params: VideoParams) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    _, t, h, w = params.latent_shape(config)
    text_dim = config.transformer.text_dim
    made = {
        "prompt_embeds": draw.standard_normal((7, text_dim)),
        "negative_prompt_embeds": draw.standard_normal((4, text_dim)),
    }
    if config.task == "i2v":
        made["image_channels"] = draw.standard_normal((20, t, h, w))
    if config.task == "ti2v":
        made["first_frame"] = draw.standard_normal((48, 1, h, w))
    return {name: array.astype(np.float32) for name, array in made.items()}


def latents_of(folder: str, size: str, dims: ParallelDims) -> np.ndarray:
    """Two steps of the high-noise expert on this rank's share."""
    config = open_checkpoint(folder).config
    width, height, num_frames = SIZES[size]
    unit = config.size_multiple // 16
    params = VideoParams.for_model(
        config, width=width * unit, height=height * unit, num_frames=num_frames, num_steps=8
    )
    engine = ExpertEngine(
        checkpoint=folder, expert="high_noise", device="cpu", **dataclasses.asdict(dims)
    )
    engine.open("j", params=dataclasses.asdict(params), conditioning=conditioning(config, params))
    engine.step("j")
    engine.step("j")
    return engine.export("j")["latents"]


def run_rank(rank: int, world_size: int, port: int, cases, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    for key, folder, size, dims in cases:
        latents = latents_of(folder, size, dims)
        everyone = [None] * world_size if rank == 0 else None
        dist.gather_object(latents, everyone)
        if rank == 0:
            same = all(np.array_equal(each, everyone[0]) for each in everyone)
            results[key] = (everyone[0], same)
    dist.destroy_process_group()


torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["wan_model.engine"])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_division_of_the_work_gives_single_process_latents(tiny, world_size):
    tasks = ("t2v-A14B", "i2v-A14B", "ti2v-5B")
    cases = [
        (f"{task} {size} {dims}", str(tiny(task)), size, dims)
        for task, size, dims in itertools.product(tasks, SIZES, degrees(world_size))
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(
            run_rank,
            args=(world_size, port, cases, results),
            nprocs=world_size,
            start_method="forkserver",  # torch is imported once, not by every rank
        )
        got = dict(results)
    alone = {
        (folder, size): latents_of(folder, size, ParallelDims()) for _, folder, size, _ in cases
    }
    assert len(got) == len(cases)
    for key, folder, size, _ in cases:
        latents, same_on_every_rank = got[key]
        assert same_on_every_rank, key
        expected = alone[folder, size]
        assert np.abs(expected).max() > 0.5
        assert np.abs(latents - expected).max() <= TOLERANCE, key


class Counting(SequenceParallel):
    """One rank that is told it is one of `degree`, and keeps all tokens for itself."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree, self.num_tokens = degree, set()

    def shard(self, x, dim):
        return x

    def gather(self, x_BND, num_tokens):
        return x_BND

    def attention(self, q_BNHD, k_BNHD, v_BNHD, num_tokens):
        self.num_tokens.add(num_tokens)
        return attention(q_BNHD, k_BNHD, v_BNHD)


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("degree", [1, 3, 8])
def test_the_tokens_of_a_warm_up_divide_over_the_ranks(tiny, task, degree):
    """xfuser's ring refuses others, and an expert that cannot warm up is never ready."""
    engine = ExpertEngine(checkpoint=str(tiny(task)), expert="high_noise", device="cpu")
    engine.sp = Counting(degree)
    engine.warm_up()
    (num_tokens,) = engine.sp.num_tokens
    assert num_tokens % degree == 0 and num_tokens <= 4 * degree


def test_degrees_that_do_not_fit_print_the_equation():
    dims = ParallelDims(cfg_parallel=True, ulysses_degree=8)
    with pytest.raises(ValueError, match=r"cfg 2 \* ring 1 \* ulysses 8 = 16 != 8 ranks"):
        dims.check(world_size=8, num_heads=40)
    with pytest.raises(ValueError, match=r"num_heads 40 % ulysses 16 = 8 != 0"):
        ParallelDims(ulysses_degree=16).check(world_size=16, num_heads=40)


def test_the_log_sum_exp_is_real():
    """Backends exist that return zeros here; ring attention would then be silently wrong."""
    q, k, v = (torch.randn(2, 9, 3, 16) for _ in range(3))
    out, lse = attention_with_lse(q, k, v)
    scores = torch.einsum("blhd,bshd->blhs", q, k) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)
    expected = torch.einsum("blhs,bshd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
