import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from wan_model import checkpoint_config
from wan_model.checkpoint_keys import (
    text_encoder_slots,
    to_ours,
    transformer_slots,
    vae_slots,
)
from wan_model.checkpoint_writer import save_checkpoint
from wan_model.config import (
    I2V_A14B,
    T2V_A14B,
    TI2V_5B,
    VAE_2_1,
    VAE_2_2,
    WAN21_T2V_1_3B,
    Expert,
    TextEncoderConfig,
)
from wan_model.text_encoder import build_umt5
from wan_model.tiny.checkpoint import (
    TASKS,
    random_transformer,
    tiny_config,
)
from wan_model.transformer import WanTransformer, is_float32_island
from wan_model.vae import WanVAE
from wan_model.weights import CheckpointError, open_checkpoint

FLOAT32 = {"device": "cpu", "dtype": torch.float32}
SEED = 5
"""Of the `tiny` fixture."""
STEM = "diffusion_pytorch_model"


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint that the test may damage."""

    def copied(task="t2v-A14B", layout="diffusers"):
        return shutil.copytree(tiny(task, layout), tmp_path / "damaged")

    return copied


# ------------------------------------------------------------------------------- both layouts


@pytest.mark.parametrize("task", TASKS)
def test_both_layouts_give_the_same_configuration_and_tensors(tiny, task):
    official = open_checkpoint(tiny(task, "official"))
    diffusers = open_checkpoint(tiny(task, "diffusers"))
    assert (official.layout, diffusers.layout) == ("official", "diffusers")
    assert official.config == diffusers.config == tiny_config(task)
    loads = [lambda c, e=expert: c.load_transformer(e, **FLOAT32) for expert in TASKS[task].experts]
    loads += [lambda c: c.load_vae(**FLOAT32), lambda c: c.load_text_encoder(**FLOAT32).model]
    for load in loads:
        theirs, ours = load(official).state_dict(), load(diffusers).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_what_is_loaded_is_what_was_written(tiny, layout):
    checkpoint = open_checkpoint(tiny("t2v-A14B", layout))
    for number, expert in enumerate(checkpoint.config.experts):
        model = checkpoint.load_transformer(expert, **FLOAT32)
        written = random_transformer(checkpoint.config.transformer, seed=4 * SEED + number)
        loaded = model.state_dict()
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[name], written[name]) for name in written)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_high_noise_expert_is_transformer_and_the_low_noise_expert_transformer_2(tiny):
    root = tiny("t2v-A14B")
    checkpoint = open_checkpoint(root)
    for expert, name in ((Expert.HIGH_NOISE, "transformer"), (Expert.LOW_NOISE, "transformer_2")):
        theirs = WanTransformer3DModel.from_pretrained(root / name)
        ours = checkpoint.load_transformer(expert, **FLOAT32)
        assert torch.equal(ours.head.head.weight, theirs.proj_out.weight)


@pytest.mark.parametrize("task", TASKS)
def test_a_written_checkpoint_is_loaded_whole_by_diffusers_and_transformers(tiny, task):
    root = tiny(task)
    classes = {
        "transformer": WanTransformer3DModel,
        "vae": AutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }
    for name, cls in classes.items():
        _, info = cls.from_pretrained(root / name, output_loading_info=True)
        assert not any(info.values()), (name, info)
    pipeline_class = WanImageToVideoPipeline if task == "i2v-A14B" else WanPipeline
    pipeline = pipeline_class.from_pretrained(root)
    assert pipeline.config.boundary_ratio == TASKS[task].boundary_ratio
    assert pipeline.config.expand_timesteps == (task == "ti2v-5B")
    assert (pipeline.transformer_2 is not None) == (TASKS[task].num_experts == 2)
    ours = open_checkpoint(root).load_text_encoder(**FLOAT32)
    assert pipeline.tokenizer("two cats").input_ids == ours.token_ids("two cats")


@pytest.mark.parametrize("config", [T2V_A14B, I2V_A14B, TI2V_5B, WAN21_T2V_1_3B])
def test_the_key_maps_cover_the_released_models_exactly(config):
    with torch.device("meta"):
        ours = WanTransformer(config.transformer).state_dict()
        theirs = WanTransformer3DModel.from_config(
            checkpoint_config.transformer_to_diffusers(config.transformer)
        ).state_dict()
        vae = WanVAE(config.vae).state_dict()
        their_vae = AutoencoderKLWan.from_config(
            checkpoint_config.vae_to_diffusers(config.vae)
        ).state_dict()
    official = transformer_slots(ours, "official")
    assert len(official) == 15 + 27 * config.transformer.num_layers
    diffusers = transformer_slots(ours, "diffusers")
    shapes = {key: slot.shape(ours[slot.name]) for key, slot in diffusers.items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    assert len(diffusers) == len(official)
    assert len(vae_slots(vae, "official", config.vae)) == (194 if config.vae.z_dim == 16 else 196)
    renamed = to_ours(their_vae, vae_slots(vae, "diffusers", config.vae))
    assert {k: t.shape for k, t in renamed.items()} == {k: t.shape for k, t in vae.items()}
    assert renamed.keys() == vae.keys() and len(their_vae) == len(vae)


def test_the_text_encoder_map_covers_the_released_model_exactly():
    with torch.device("meta"):
        model = build_umt5(TextEncoderConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_680_910_336
    official = text_encoder_slots(model.state_dict(), "official")
    assert {slot.name for slot in official.values()} == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("config", [VAE_2_1, VAE_2_2], ids=lambda c: c.version)
def test_the_shapes_of_an_official_vae_say_its_architecture(config):
    with torch.device("meta"):
        tensors = WanVAE(config).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert checkpoint_config.vae_from_shapes(shapes) == config
    assert checkpoint_config.vae_from_diffusers(checkpoint_config.vae_to_diffusers(config)) == (
        config
    )


def test_the_shapes_of_an_official_text_encoder_say_its_architecture():
    with torch.device("meta"):
        tensors = build_umt5(TextEncoderConfig()).state_dict()
    slots = text_encoder_slots(tensors, "official")
    shapes = {key: tuple(tensors[slot.name].shape) for key, slot in slots.items()}
    assert checkpoint_config.text_encoder_from_shapes(shapes) == TextEncoderConfig()


# ------------------------------------------------------------------------------ configuration


def test_defaults_are_the_models_and_not_the_converted_repositorys(tiny):
    root = tiny("t2v-A14B")
    assert json.loads((root / "scheduler/scheduler_config.json").read_text())["flow_shift"] == 3.0
    for task, shift in (("t2v-A14B", 12.0), ("i2v-A14B", 5.0), ("ti2v-5B", 5.0)):
        config = open_checkpoint(tiny(task)).config
        assert (config.shift, config.name) == (shift, task)
        assert config.negative_prompt


def test_a_foreign_boundary_ratio_in_model_index_is_not_a_default(copy):
    root = copy()
    edit_json(root / "model_index.json", boundary_ratio=0.5)
    assert open_checkpoint(root).config.boundary_ratio == 0.875


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_checkpoint_can_name_its_row_of_defaults(copy, layout):
    root = copy(layout=layout)
    name = "model_index.json" if layout == "diffusers" else "high_noise_model/config.json"
    edit_json(root / name, _wan_row="wan-tiny")
    config = open_checkpoint(root).config
    assert (config.name, config.fps, config.transformer.dim) == ("wan-tiny", 8, 128)


def test_latent_channels_that_are_only_input_mean_i2v(copy):
    root = copy("i2v-A14B")
    edit_json(root / "model_index.json", _class_name="WanPipeline")
    assert open_checkpoint(root).config.task == "i2v"


def test_the_diffusers_layout_is_opened_by_its_json_files_alone(copy):
    root = copy()
    for path in root.rglob("*.safetensors"):
        path.unlink()
    assert open_checkpoint(root).config == tiny_config("t2v-A14B")


def test_a_component_can_lie_in_another_folder(copy, tiny, tmp_path):
    donor = copy()
    config = tiny_config("t2v-A14B")
    experts = {
        e: random_transformer(config.transformer, seed=n) for n, e in enumerate(config.experts)
    }
    shared = {name: f"../{donor.name}" for name in ("text_encoder", "tokenizer", "vae")}
    save_checkpoint(
        tmp_path / "borrower",
        layout="diffusers",
        config=config,
        transformers=experts,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        shared=shared,
    )
    borrower = open_checkpoint(tmp_path / "borrower")
    ours, theirs = (c.load_vae(**FLOAT32) for c in (borrower, open_checkpoint(donor)))
    assert torch.equal(ours.conv2.weight, theirs.conv2.weight)
    assert len(borrower.load_text_encoder(**FLOAT32).encode(["two cats"])) == 1


# ------------------------------------------------------------------------------------- dtypes


def test_in_bfloat16_the_islands_stay_float32_and_the_rest_is_rounded_once(tiny):
    checkpoint = open_checkpoint(tiny("ti2v-5B"))
    full = checkpoint.load_transformer(Expert.HIGH_NOISE, **FLOAT32).state_dict()
    half = checkpoint.load_transformer(Expert.HIGH_NOISE, device="cpu", dtype=torch.bfloat16)
    dtypes = set()
    for name, tensor in half.state_dict().items():
        expected = torch.float32 if is_float32_island(name) else torch.bfloat16
        assert torch.equal(tensor, full[name].to(expected)) and tensor.dtype == expected, name
        dtypes.add(expected)
    assert dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_checkpoint_saved_in_bfloat16_keeps_its_islands_exact(tmp_path, tiny, layout):
    source = open_checkpoint(tiny("ti2v-5B"))
    transformer = source.load_transformer(Expert.HIGH_NOISE, **FLOAT32).state_dict()
    save_checkpoint(
        tmp_path / "half",
        layout=layout,
        config=source.config,
        transformers={Expert.HIGH_NOISE: transformer},
        vae=source.load_vae(**FLOAT32).state_dict(),
        text_encoder=source.load_text_encoder(**FLOAT32).model.state_dict(),
        tokenizer=(tiny("ti2v-5B") / "tokenizer/tokenizer.json").read_text("utf-8"),
        dtype=torch.bfloat16,
        row="wan-tiny-ti2v",
    )
    half = open_checkpoint(tmp_path / "half")
    assert half.config.name == "wan-tiny-ti2v"
    for name, tensor in half.load_transformer(Expert.HIGH_NOISE, **FLOAT32).state_dict().items():
        dtype = torch.float32 if is_float32_island(name) else torch.bfloat16
        assert torch.equal(tensor, transformer[name].to(dtype).float()), name


# ------------------------------------------------------------------------------------- memory

LOAD_AND_MEASURE = """
import sys, torch
from wan_model.config import Expert
from wan_model.weights import open_checkpoint

def memory(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

small, large = map(open_checkpoint, sys.argv[1:3])
small.load_transformer(Expert.HIGH_NOISE, device="cpu", dtype=torch.bfloat16)
before = memory("VmRSS")
model = large.load_transformer(Expert.HIGH_NOISE, device="cpu", dtype=torch.bfloat16)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(memory("VmHWM") - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read in /proc")
def test_peak_memory_of_loading_is_below_one_shard_above_the_loaded_model(tmp_path, tiny):
    config = tiny_config("ti2v-5B")
    large = replace(config.transformer, dim=512, num_layers=11, ffn_dim=2048)
    with torch.device("meta"):
        names = WanTransformer(large).state_dict()
    state = {name: torch.ones(tensor.shape) for name, tensor in names.items()}
    shutil.copytree(tiny("ti2v-5B"), tmp_path / "large")
    shutil.rmtree(tmp_path / "large" / "transformer")
    donor = {"vae": "../large", "text_encoder": "../large", "tokenizer": "../large"}
    shard_bytes = 32 * 2**20
    save_checkpoint(
        tmp_path / "experts",
        layout="diffusers",
        config=replace(config, transformer=large),
        transformers={Expert.HIGH_NOISE: state},
        vae=None,
        text_encoder=None,
        tokenizer=None,
        shared=donor,
        shard_bytes=shard_bytes,
    )
    files = sorted((tmp_path / "experts/transformer").glob("*.safetensors"))
    assert len(files) > 4 and sum(file.stat().st_size for file in files) > 180e6
    outcome = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, tiny("ti2v-5B"), tmp_path / "experts"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, size = map(int, outcome.stdout.split())
    assert size > 90e6
    python_bytes = 8 * 2**20  # modules and allocator arenas; a second copy of a shard is 32 MiB
    assert grown < size + shard_bytes + python_bytes, (grown, size)


# ------------------------------------------------------------------------------------- damage


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def load_all(root):
    checkpoint = open_checkpoint(root)
    checkpoint.load_text_encoder(**FLOAT32)
    checkpoint.load_vae(**FLOAT32)
    for expert in checkpoint.config.experts:
        checkpoint.load_transformer(expert, **FLOAT32)


SHARD = f"{STEM}-00001-of-00002.safetensors"
DAMAGE = {
    "truncated shard": ("diffusers", f"transformer/{SHARD}", truncate),
    "truncated vae": ("official", "Wan2.1_VAE.pth", truncate),
    "truncated text encoder": ("official", "models_t5_umt5-xxl-enc-bf16.pth", truncate),
    "not safetensors": ("official", f"low_noise_model/{SHARD}", lambda p: p.write_text("hello")),
    "not a .pth": ("official", "Wan2.1_VAE.pth", lambda p: p.write_text("hello")),
    "empty file": ("diffusers", "vae/diffusion_pytorch_model.safetensors", lambda p: truncate0(p)),
    "missing shard": ("diffusers", f"transformer_2/{SHARD}", lambda p: p.unlink()),
    "missing vae": ("diffusers", "vae", shutil.rmtree),
    "missing official vae": ("official", "Wan2.*_VAE.pth", lambda p: unlink_all(p)),
    "missing text encoder": ("diffusers", "text_encoder/model.safetensors", lambda p: p.unlink()),
    "missing expert": ("official", "low_noise_model", shutil.rmtree),
    "missing tokenizer": ("diffusers", "tokenizer", shutil.rmtree),
    "broken tokenizer": ("diffusers", "tokenizer/tokenizer.json", lambda p: p.write_text("{}")),
    "broken json": ("diffusers", "transformer/config.json", lambda p: p.write_text("{")),
    "a number missing": (
        "official",
        "high_noise_model/config.json",
        lambda p: p.write_text('{"_class_name": "WanModel", "model_type": "t2v"}'),
    ),
    "another pipeline": (
        "diffusers",
        "model_index.json",
        lambda p: edit_json(p, _class_name="StableDiffusionPipeline"),
    ),
    "another model": (
        "official",
        "high_noise_model/config.json",
        lambda p: edit_json(p, _class_name="LlamaModel"),
    ),
    "another task": (
        "official",
        "high_noise_model/config.json",
        lambda p: edit_json(p, model_type="s2v"),
    ),
    "wrong row": ("diffusers", "model_index.json", lambda p: edit_json(p, _wan_row="wan-huge")),
    "row of another task": (
        "diffusers",
        "model_index.json",
        lambda p: edit_json(p, _wan_row="wan-tiny-ti2v"),
    ),
    "another text encoder": (
        "diffusers",
        "text_encoder/config.json",
        lambda p: edit_json(p, model_type="t5"),
    ),
}


def truncate0(path):
    path.write_bytes(b"")


def unlink_all(pattern):
    for path in pattern.parent.glob(pattern.name):
        path.unlink()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_gets_one_sentence_that_names_the_file(copy, name):
    layout, path, damage = DAMAGE[name]
    root = copy(layout=layout)
    load_all(root)
    damage(root / path)
    with pytest.raises(CheckpointError) as caught:
        load_all(root)
    message = str(caught.value)
    assert path in message and "\n" not in message, message


def test_missing_and_unexpected_keys_are_listed_up_to_five(copy):
    root = copy()

    def edit(tensors):
        for key in list(tensors)[:7]:
            tensors[f"blocks.9.{key}"] = tensors.pop(key)

    edit_tensors(root / "vae" / f"{STEM}.safetensors", edit)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(root).load_vae(**FLOAT32)
    message = str(caught.value)
    assert "7 missing key(s): " in message and "7 unexpected key(s): blocks.9." in message
    assert message.count("blocks.9.") == 5
    assert str(root / "vae" / f"{STEM}.safetensors") in message


def test_one_key_too_few_and_one_too_many_are_each_an_error(copy):
    root = copy()
    shard = root / "transformer" / SHARD
    original = load_file(shard)
    key = next(iter(original))
    checkpoint = open_checkpoint(root)
    edit_tensors(shard, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"1 missing key.s.: {key}$"):
        checkpoint.load_transformer(Expert.HIGH_NOISE, **FLOAT32)
    save_file(original | {"extra.weight": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="1 unexpected key.s.: extra.weight$"):
        checkpoint.load_transformer(Expert.HIGH_NOISE, **FLOAT32)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy):
    root = copy()
    path = root / "transformer" / SHARD
    key = next(key for key in load_file(path) if key.endswith("to_q.weight"))
    edit_tensors(path, lambda tensors: tensors.update({key: torch.zeros(64, 128)}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(root).load_transformer(Expert.HIGH_NOISE, **FLOAT32)
    assert all(part in str(caught.value) for part in (str(path), key, "[64, 128]", "[128, 128]"))


def test_parts_of_different_models_are_refused(copy, tiny):
    root = copy()
    shutil.rmtree(root / "vae")
    shutil.copytree(tiny("ti2v-5B") / "vae", root / "vae")
    with pytest.raises(CheckpointError, match="transformer out_channels 16 != vae z_dim 48"):
        open_checkpoint(root)


@pytest.mark.parametrize("source", ["empty", "nowhere", "nowhere/at/all", "file", "wan-huge", ""])
def test_what_is_no_checkpoint_is_named(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    with pytest.raises(CheckpointError, match=source or "is not a"):
        open_checkpoint(source)


def test_an_expert_that_the_model_lacks_is_refused(tiny):
    checkpoint = open_checkpoint(tiny("ti2v-5B"))
    with pytest.raises(CheckpointError, match="has no expert low_noise"):
        checkpoint.load_transformer(Expert.LOW_NOISE, **FLOAT32)


# ---------------------------------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_each_component_fetches_only_its_own_files_of_one_commit(
    tiny, tmp_path, monkeypatch, layout
):
    repository = tiny("t2v-A14B", layout)
    snapshot = tmp_path / COMMIT
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append(revision)
        names = [str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()]
        fetched = list(
            huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
        )
        for name in fetched:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, snapshot / name)
        return str(snapshot)

    def num_files(pattern):
        return len(list(snapshot.glob(pattern)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    if layout == "official":
        # From the hub the numbers of an unfetched .pth are the released models'.
        monkeypatch.setattr(checkpoint_config, "check_parts_fit", lambda config: None)
    checkpoint = open_checkpoint("acme/wan", revision="v1")
    assert num_files("**/*.safetensors") == num_files("**/*.pth") == 0
    checkpoint.load_vae(**FLOAT32)
    vae, text_encoder, expert = {
        "official": ("Wan2.1_VAE.pth", "models_t5*", "low_noise_model/*.safetensors"),
        "diffusers": ("vae/*.safetensors", "text_encoder/*.safetensors", "transformer_2/*-of-*"),
    }[layout]
    assert num_files(vae) == 1 and num_files(text_encoder) == num_files(expert) == 0
    checkpoint.load_text_encoder(**FLOAT32)
    assert num_files(text_encoder) == 1 and num_files(expert) == 0
    checkpoint.load_transformer(Expert.LOW_NOISE, **FLOAT32)
    assert num_files(expert) == 2 and num_files("transformer/*-of-*") == 0
    assert num_files("high_noise_model/*-of-*") == 0
    assert asked[0] == "v1" and set(asked[1:]) == {COMMIT}


def test_offline_the_hub_cache_is_all_there_is(tiny, tmp_path):
    repository = tmp_path / "hub" / "models--acme--wan"
    shutil.copytree(tiny("ti2v-5B"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = (
        "import torch; from wan_model.weights import open_checkpoint\n"
        "c = open_checkpoint('acme/wan')\n"
        "print(c.config.name, len(c.load_vae(device='cpu', dtype=torch.float32).state_dict()))\n"
        "open_checkpoint('acme/absent')"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    absent = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert absent.stdout.startswith("ti2v-5B ")
    assert "CheckpointError: cannot fetch acme/absent from the hub" in absent.stderr
