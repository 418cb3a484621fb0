"""`python -m wan_model.generate` as a person types it: files, and one line for every mistake."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from wan_model.generate import main
from wan_model.media import read_mp4

FAST = ["--prompt", "a cat", "--size", "64x32", "--num-frames", "5", "--steps", "2", "--seed", "7"]


def run(folder, output, *more: str) -> int:
    return main(["--checkpoint", str(folder), "--output", str(output), *FAST, *more])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)).save(path)
    return path


def test_the_suffix_of_the_output_picks_its_form(tiny, tmp_path, capsys):
    folder = tiny("t2v-A14B")
    assert run(folder, tmp_path / "v.npy") == 0
    assert "seed 7" in capsys.readouterr().out
    assert run(folder, tmp_path / "v.mp4", "--fps", "12") == 0
    assert run(folder, tmp_path / "v.safetensors") == 0
    assert run(folder, tmp_path / "v.png", "--num-frames", "1") == 0
    frames = np.load(tmp_path / "v.npy")
    assert (frames.dtype, frames.shape) == (np.uint8, (5, 32, 64, 3))
    assert read_mp4(tmp_path / "v.mp4")[0].shape == (5, 32, 64, 3)
    assert read_mp4(tmp_path / "v.mp4")[1] == 12
    latents = load_file(tmp_path / "v.safetensors")["latents"]
    assert (latents.dtype, latents.shape) == (np.float32, (16, 2, 4, 8))
    assert Image.open(tmp_path / "v.png").size == (64, 32)


def test_an_image_decides_the_aspect(tiny, tmp_path, image):
    output = tmp_path / "v.npy"
    assert run(tiny("i2v-A14B"), output, "--size", "64x64", "--image", str(image)) == 0
    assert np.load(output).shape == (5, 32, 80, 3)


def test_one_seed_is_one_video(tiny, tmp_path):
    folder = tiny("t2v-A14B")
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run(folder, tmp_path / f"{name}.npy", "--seed", seed) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


FOUR_STEPS = "--steps 4 --solver euler --shift 5 --guidance 1"  # as the README has them


def test_the_four_steps_of_a_distilled_model_leave_the_negative_prompt_out(tiny, tmp_path):
    assert run(tiny("t2v-A14B"), tmp_path / "v.npy", *FOUR_STEPS.split()) == 0


def mistakes():
    def case(words: str, message: str, task="t2v-A14B"):
        return pytest.param(task, words.split(), message, id=words)

    return [
        case("--num-frames 6", "num_frames 6 is not 4n+1: try 5 or 9"),
        case("--size 60x32", "width 60 is not a multiple of 16: try 48 or 64"),
        case("--size big", "WIDTHxHEIGHT"),
        case("--steps 0", "num_steps must be between 1 and 1000, not 0"),
        case("--guidance nan", "guidance_high_noise must be a finite number"),
        case("--shift -1", "shift must be between"),
        case("--seed -1", "seed must be between"),
        case("--cache 2", "cache must be between 0 and 1"),
        case("--image {image}", "takes no image"),
        case("--steps 2", "an image is required", task="i2v-A14B"),
        case("--image {text}", "text.png", task="i2v-A14B"),
        case("--image {bomb}", "pixels", task="i2v-A14B"),
        case("--image {missing}", "missing.png", task="i2v-A14B"),
        case("--last-image {image}", "last_image", task="ti2v-5B"),
        case("--image {image} --last-image {image}", "it needs an I2V model", task="ti2v-5B"),
        case(
            "--image {image} --last-image {image} --num-frames 1",
            "and more than one frame",
            task="i2v-A14B",
        ),
        case("--image {image} --num-frames 1", "image leaves nothing to make", task="ti2v-5B"),
        case(f"{FOUR_STEPS} --negative-prompt blurry", "negative_prompt has no effect"),
        case("--boundary-ratio 0.5", "boundary_ratio has no effect", task="ti2v-5B"),
        case("--lora-low-noise x.safetensors", "has no effect", task="ti2v-5B"),
        case("--lora-high-noise {missing}", "missing.png"),
        case("--output {folder}/v.avi", "the suffix must be"),
        case("--output {folder}/v.png", "--num-frames 1"),
        case("--output {folder}/none/v.mp4", "does not exist"),
        case("--checkpoint {folder}", "is not a Wan checkpoint"),
        case("--checkpoint {folder}/none", "none"),
        case("--ulysses-degree 2", "cfg 1 * ring 1 * ulysses 2 = 2 != 1 ranks"),
        case("--device gpu", "device gpu is not there"),
        case("--attention fast", "--attention: invalid choice"),
        case("--unknown", "--unknown"),
    ]


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A PNG that says it has 30,000 x 30,000 pixels: whoever believes it is lost already."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 30_000, 30_000)  # of the IHDR chunk, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path = tmp_path_factory.mktemp("images") / "bomb.png"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("task", "words", "message"), mistakes())
def test_a_mistake_is_one_line_and_exit_code_2(
    tiny, tmp_path, image, bomb, capsys, task, words, message
):
    (tmp_path / "text.png").write_text("this is no picture")
    places = {
        "image": image, "folder": tmp_path, "text": tmp_path / "text.png",
        "bomb": bomb, "missing": tmp_path / "missing.png",
    }  # fmt: skip
    words = [word.format(**places) for word in words]
    try:
        code = run(tiny(task), tmp_path / "v.mp4", *words)
    except SystemExit as stopped:
        code = stopped.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "v.mp4").exists()


def test_the_command_needs_no_hub_and_shows_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wan_model.generate", "--checkpoint", "nobody", "--prompt", "x",
         "--output", str(tmp_path / "v.mp4")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: nobody is not a folder")
