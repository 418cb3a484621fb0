"""`torchrun -m wan_model.generate` on two CPU processes: one video, one voice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from wan_model import torchrun as torchrun_module
from wan_model.generate import main
from wan_model.torchrun import Processes

ROOT = Path(__file__).parents[2]
FAST = ["--prompt", "a cat", "--size", "80x48", "--num-frames", "9", "--steps", "2", "--seed", "7"]
TOLERANCE = 1e-5  # float32, other order of sums; latents of order 1 over two steps


def torchrun(folder: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "wan_model.generate", "--checkpoint", str(folder), "--output", str(output),
               "--device", "cpu", *FAST, *options]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_two_ranks_with_divided_weights_make_the_latents_of_one_and_the_first_writes_them(
    tiny, tmp_path
):
    """45 tokens, which do not divide; the weights do (FSDP)."""
    folder = tiny("t2v-A14B")
    alone, together = tmp_path / "alone.safetensors", tmp_path / "together.safetensors"
    assert main(["--checkpoint", str(folder), "--output", str(alone), *FAST]) == 0
    done = torchrun(folder, together, "--ulysses-degree", "2", "--fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("together.safetensors (seed 7)") == 1
    expected, got = load_file(alone)["latents"], load_file(together)["latents"]
    assert np.abs(expected).max() > 0.5
    assert np.abs(got - expected).max() <= TOLERANCE


def test_degrees_that_do_not_fit_are_one_line_with_the_equation_and_exit_code_2(tiny, tmp_path):
    done = torchrun(tiny("t2v-A14B"), tmp_path / "v.mp4", "--ring-degree", "3")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: cfg 1 * ring 3 * ulysses 1 = 3 != 2 ranks"]
    assert "exitcode  : 2" in done.stderr, "torchrun's own report of the ranks"
    assert not (tmp_path / "v.mp4").exists()


def rank_of(store: dist.Store, rank: int) -> Processes:
    processes = Processes()
    processes._store, processes.rank, processes.num_ranks = store, rank, 2
    return processes


@pytest.mark.parametrize("device", ["gpu", "cuda:2", "cuda:x", "cuda:", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError) as caught:
        Processes().join(device)
    assert str(caught.value) == (
        f"device {device} is not there: use one of auto, cpu, cuda, cuda:0, cuda:1"
    )
    assert Processes().join("cuda:1") == "cuda:1"


def test_ranks_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:0 is one GPU for every rank: use cuda under"):
        rank_of(dist.HashStore(), 0).join("cuda:0")


def test_the_other_ranks_are_silent_when_the_first_has_said_it(capsys):
    store = dist.HashStore()
    rank_of(store, 0).report("no such file")
    rank_of(store, 1).report("no such file")
    assert capsys.readouterr().err == "error: no such file\n"


def test_an_error_that_the_first_rank_has_not_is_said_with_its_rank(monkeypatch, capsys):
    monkeypatch.setattr(torchrun_module, "FIRST_RANK_SPEAKS_S", 0.05)
    rank_of(dist.HashStore(), 1).report("no such file")
    assert capsys.readouterr().err == "error: no such file (rank 1)\n"
