import json
import runpy
import sys

import pytest
import torch

from wan_model.config import NEGATIVE_PROMPT, Expert
from wan_model.parallel import SequenceParallel
from wan_model.tiny.__main__ import main
from wan_model.tiny.checkpoint import TASKS, tiny_config, tiny_tokenizer, write_tiny_checkpoint
from wan_model.weights import open_checkpoint

FLOAT32 = {"device": "cpu", "dtype": torch.float32}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------ command


def test_the_command_writes_a_checkpoint_that_opens(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "model"
    given = [str(folder), "--task", "i2v-A14B", "--layout", "official"]
    monkeypatch.setattr(sys, "argv", ["python -m wan_model.tiny", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("wan_model.tiny", run_name="__main__")  # as `python -m` does
    assert ended.value.code == 0 and str(folder) in capsys.readouterr().out
    assert open_checkpoint(folder).config == tiny_config("i2v-A14B")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["{folder}", "--task", "t2v-1B"],
        ["{folder}", "--layout", "comfy"],
        ["{folder}", "--seed", "x"],
        ["{folder}", "--seed", "99999999999999999999999"],
        ["{full}"],
        ["{full}/file"],
        ["{full}/file", "--overwrite"],
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, arguments):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("precious")
    folder = tmp_path / "model"
    with pytest.raises(SystemExit) as caught:
        main([argument.format(folder=folder, full=full) for argument in arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (full / "file").read_text() == "precious" and not folder.exists()


def test_overwrite_leaves_nothing_of_what_was_there(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    assert main([str(tmp_path / "old"), "--task", "ti2v-5B", "--overwrite"]) == 0
    assert not (tmp_path / "old" / "file").exists()
    open_checkpoint(tmp_path / "old")


# ------------------------------------------------------------------------------------ content


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_checkpoint(tmp_path / name, task="t2v-A14B", seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    different = {str(path) for path in a if a[path] != c[path]}
    assert different == {str(path) for path in a if path.suffix == ".safetensors"}


def test_the_experts_are_different(tiny):
    checkpoint = open_checkpoint(tiny("t2v-A14B"))
    high, low = (
        checkpoint.load_transformer(e, **FLOAT32).state_dict() for e in checkpoint.config.experts
    )
    assert not any(torch.equal(high[name], low[name]) for name in high)


def test_the_scheduler_config_holds_the_converters_shift_and_not_the_models(tiny):
    for task, flow_shift in (("t2v-A14B", 3.0), ("i2v-A14B", 3.0), ("ti2v-5B", 5.0)):
        path = tiny(task) / "scheduler/scheduler_config.json"
        assert json.loads(path.read_text())["flow_shift"] == flow_shift


def test_channels_are_those_of_the_released_models():
    for name, row in TASKS.items():
        config = tiny_config(name)
        assert config.vae.stride == row.vae.stride
        assert config.vae.z_dim == row.vae.z_dim
        assert config.transformer.in_channels == row.transformer.in_channels


def test_the_tokenizer_spells_any_text():
    tokenizer = tiny_tokenizer()
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    for text in ("a red circle", "猫 🐈 ﬁ", NEGATIVE_PROMPT):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == 1 and not {0, 2} & set(ids) and len(ids) <= 512
        assert tokenizer.decode(ids) == text
    assert tokenizer.to_str() == tiny_tokenizer().to_str()


# ------------------------------------------------------------------------------------- scales


@pytest.fixture(scope="module")
def forward(tiny):
    """task -> (high-noise transformer, its output for fixed random inputs as a function)."""

    def made(task):
        checkpoint = open_checkpoint(tiny(task))
        model = checkpoint.load_transformer(Expert.HIGH_NOISE, **FLOAT32)
        config = checkpoint.config.transformer
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, config.in_channels, 3, 6, 8, generator=generator)
        text = [torch.randn(9, config.text_dim, generator=generator)]

        @torch.no_grad()
        def run(step=500, prompt=text):
            timesteps = torch.tensor([[step]])
            return model(latents, timesteps, model.embed_text(prompt), SequenceParallel())

        return model, run

    return made


@pytest.mark.parametrize("task", TASKS)
def test_noise_predictions_are_of_order_1(forward, task):
    _, run = forward(task)
    for step in (999, 500, 50):
        assert 0.5 < run(step).std() < 1.5


def test_text_and_time_change_the_output_visibly(forward):
    _, run = forward("t2v-A14B")
    assert (run() - run(prompt=[torch.zeros(1, 32)])).std() > 0.1
    assert (run(937) - run(936)).abs().max() > 1e-3
    assert (run(999) - run(50)).std() > 0.1


def test_every_tensor_of_the_transformer_matters(forward):
    model, run = forward("t2v-A14B")
    before = run()
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.1)
        change = (run() - before).abs().max().item()
        parameter.copy_(kept)
        assert change > 1e-3, f"{name}: {change}"


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_decoded_frames_vary_and_are_seldom_clamped(tiny, task):
    checkpoint = open_checkpoint(tiny(task))
    vae = checkpoint.load_vae(**FLOAT32)
    latents = 1.5 * torch.randn(1, vae.config.z_dim, 3, 4, 4, generator=torch.manual_seed(0))
    with torch.no_grad():
        frames = vae.decode(latents)
        again = vae.encode(frames)
    assert 0.2 < frames.std() < 0.6
    assert (frames.abs() >= 1).float().mean() < 0.1
    assert frames.std(dim=2).mean() > 0.05 and frames.std(dim=(3, 4)).mean() > 0.1
    assert 0.3 < again.std() < 2


def test_the_sampling_loop_stays_of_order_1_and_does_not_amplify_rounding(forward):
    """40 Euler steps with guidance 4: latents comparable at 5e-5 after the whole loop."""
    model, _ = forward("t2v-A14B")
    generator = torch.Generator().manual_seed(1)
    noise, nudge = torch.randn(2, 1, 16, 3, 6, 8, generator=generator)
    text = [torch.randn(9, 32, generator=generator), torch.randn(20, 32, generator=generator)]
    context = model.embed_text(text)
    base = torch.linspace(1, 0, 41)
    sigmas = 12 * base / (1 + 11 * base)

    @torch.no_grad()
    def denoise(latents):
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            timesteps = (sigma * 1000).long().expand(2, 1)
            cond, uncond = model(
                latents.expand(2, -1, -1, -1, -1), timesteps, context, SequenceParallel()
            )
            latents = latents + (following - sigma) * (uncond + 4 * (cond - uncond))
        return latents

    result = denoise(noise)
    assert 0.5 < result.std() < 3
    assert (denoise(noise + 1e-4 * nudge) - result).std() < 5e-4
