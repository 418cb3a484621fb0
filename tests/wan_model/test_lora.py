import json
import re

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from wan_model.checkpoint_keys import official_to_diffusers_transformer, transformer_slots
from wan_model.config import Expert
from wan_model.lora import load_lora
from wan_model.weights import CheckpointError, open_checkpoint

FLOAT32 = {"device": "cpu", "dtype": torch.float32}
RANK = 4
LINEARS = [
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
]
MODULES = [f"blocks.{block}.{linear}" for block in range(2) for linear in LINEARS]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # two float32 sums in another order


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return open_checkpoint(tiny("t2v-A14B"))


@pytest.fixture(scope="module")
def weights(checkpoint):
    """The high-noise expert under the official names."""
    return official(checkpoint.load_transformer(Expert.HIGH_NOISE, **FLOAT32))


def official(model):
    state = model.state_dict()
    slots = transformer_slots(state, "official")
    return {key: slot.part(state[slot.name]).clone() for key, slot in slots.items()}


def merged(checkpoint, *loras, dtype=torch.float32):
    model = checkpoint.load_transformer(
        Expert.HIGH_NOISE, device="cpu", dtype=dtype, loras=list(loras)
    )
    return official(model)


def draw_pairs(weights, modules=MODULES, seed=0):
    """module -> (down [rank, in], up [out, rank])."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in modules:
        out, into = weights[f"{module}.weight"].shape
        down = torch.randn(RANK, into, generator=generator)
        pairs[module] = (down, 0.1 * torch.randn(out, RANK, generator=generator))
    return pairs


def write(path, tensors, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


# ------------------------------------------------------------------------------ the five forms


def lightning(pairs, alpha=8.0):
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"diffusion_model.{module}.lora_down.weight"] = down
        tensors[f"diffusion_model.{module}.lora_up.weight"] = up
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(pairs, alpha=8.0):
    return {
        "lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_", key.count(".") - n): t
        for key, t in lightning(pairs, alpha).items()
        for n in [3 if key.endswith("weight") else 2]
    }


def peft(pairs, prefix="diffusion_model."):
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = down
        tensors[f"{prefix}{module}.lora_B.weight"] = up
    return tensors


def diffusers(pairs, prefix="transformer."):
    return peft({diffusers_name(module): pair for module, pair in pairs.items()}, prefix)


def diffusers_name(module):
    return official_to_diffusers_transformer(f"{module}.weight").removesuffix(".weight")


FORMS = {
    "lightning": (lightning, 8 / RANK),
    "kohya": (kohya, 8 / RANK),
    "peft": (peft, 1.0),
    "diffusers": (diffusers, 1.0),
    "diffusers without prefix": (lambda pairs: diffusers(pairs, ""), 1.0),
}


def test_the_kohya_names_of_these_tests_are_kohyas(weights):
    names = set(kohya(draw_pairs(weights)))
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in names
    assert "lora_unet_blocks_1_ffn_2.alpha" in names
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_(up|down)\.weight|alpha)", n) for n in names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_low_rank_form_equals_its_dense_merge(checkpoint, weights, tmp_path, form, strength):
    make, scale = FORMS[form]
    pairs = draw_pairs(weights)
    path = write(tmp_path / "lora.safetensors", make(pairs))
    result = merged(checkpoint, load_lora(path, strength))
    for key, before in weights.items():
        module = key.removesuffix(".weight")
        expected = before
        if module in pairs:
            down, up = pairs[module]
            expected = before + strength * scale * (up @ down)
            assert (expected - before).abs().max() > 0.05
        torch.testing.assert_close(result[key], expected, **CLOSE, msg=key)


def test_the_distill_form_adds_full_differences_to_any_tensor(checkpoint, weights, tmp_path):
    """diff on weights and norms, diff_b on biases, diff_m on modulations, with pairs between."""
    pairs = draw_pairs(weights, MODULES[:3])
    generator = torch.Generator().manual_seed(1)
    tensors = lightning(pairs)
    expected = {key: tensor.clone() for key, tensor in weights.items()}
    for module, (down, up) in pairs.items():
        expected[f"{module}.weight"] += 2 * up @ down
    targets = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.cross_attn.norm_k.weight",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.0.self_attn.k.diff_b": "blocks.0.self_attn.k.bias",
        "blocks.1.cross_attn.v.diff": "blocks.1.cross_attn.v.weight",
        "blocks.1.ffn.2.diff_b": "blocks.1.ffn.2.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "blocks.0.modulation.diff_m": "blocks.0.modulation",
        "head.head.diff": "head.head.weight",
        "head.head.diff_b": "head.head.bias",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "time_projection.1.bias",
        "text_embedding.0.diff": "text_embedding.0.weight",
    }
    for key, target in targets.items():
        difference = torch.randn(weights[target].shape, generator=generator)
        tensors[f"diffusion_model.{key}"] = difference
        expected[target] += difference
    lora = load_lora(write(tmp_path / "distill.safetensors", tensors))
    result = merged(checkpoint, lora)
    for key in weights:
        torch.testing.assert_close(result[key], expected[key], **CLOSE, msg=key)


def test_a_lora_of_q_alone_leaves_k_and_v_bit_for_bit(checkpoint, weights, tmp_path):
    pairs = draw_pairs(weights, ["blocks.1.self_attn.q", "blocks.0.cross_attn.v"])
    result = merged(checkpoint, load_lora(write(tmp_path / "q.safetensors", peft(pairs))))
    changed = {key for key in weights if not torch.equal(result[key], weights[key])}
    assert changed == {"blocks.1.self_attn.q.weight", "blocks.0.cross_attn.v.weight"}


def test_two_loras_on_one_expert_add_up_with_their_own_strengths(checkpoint, weights, tmp_path):
    one, two = (draw_pairs(weights, seed=seed) for seed in (1, 2))
    loras = [
        load_lora(write(tmp_path / "one.safetensors", peft(one)), 0.7),
        load_lora(write(tmp_path / "two.safetensors", kohya(two, alpha=2.0)), 1.5),
    ]
    result = merged(checkpoint, *loras)
    for module in MODULES:
        key = f"{module}.weight"
        expected = weights[key] + 0.7 * one[module][1] @ one[module][0]
        expected += 1.5 * (2 / RANK) * two[module][1] @ two[module][0]
        torch.testing.assert_close(result[key], expected, **CLOSE, msg=key)


def test_a_lora_is_merged_in_float32_and_rounded_once(checkpoint, weights, tmp_path):
    pairs = draw_pairs(weights)
    tensors = {key: tensor.half() for key, tensor in peft(pairs).items()}
    lora = load_lora(write(tmp_path / "half.safetensors", tensors), 0.3)
    result = merged(checkpoint, lora, dtype=torch.bfloat16)
    for module in MODULES:
        down, up = (tensor.half().float() for tensor in pairs[module])
        expected = (weights[f"{module}.weight"] + 0.3 * (up @ down)).bfloat16()
        assert torch.equal(result[f"{module}.weight"], expected), module


def test_both_layouts_take_the_same_lora(checkpoint, weights, tiny, tmp_path):
    path = write(tmp_path / "lora.safetensors", lightning(draw_pairs(weights)))
    theirs = merged(open_checkpoint(tiny("t2v-A14B", "official")), load_lora(path))
    ours = merged(checkpoint, load_lora(path))
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_strength_zero_changes_nothing(checkpoint, weights, tmp_path):
    path = write(tmp_path / "lora.safetensors", lightning(draw_pairs(weights)))
    result = merged(checkpoint, load_lora(path, 0.0))
    assert all(torch.equal(result[key], weights[key]) for key in weights)


# -------------------------------------------------------------------- as PEFT's save_pretrained


def save_pretrained(folder, pairs, **settings):
    """The two files that PEFT writes: the metadata is all that the first one says."""
    config = {
        "alpha_pattern": {}, "bias": "none", "lora_alpha": 32, "peft_type": "LORA", "r": RANK,
        "rank_pattern": {}, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = peft(pairs, "base_model.model.")
    return write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


SETTINGS = {
    "one alpha": ({}, [8, 8, 8]),
    "rslora": ({"use_rslora": True}, [16, 16, 16]),
    "an alpha by name": ({"alpha_pattern": {"blocks.0.self_attn.k": 2}}, [8, 0.5, 8]),
    "an alpha by a pattern": ({"alpha_pattern": {r"self_attn\.[qk]": 2}}, [0.5, 0.5, 8]),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_config_that_peft_saves_beside_the_tensors_scales_them(
    checkpoint, weights, tmp_path, settings
):
    modules = ["blocks.0.self_attn.q", "blocks.0.self_attn.k", "blocks.0.ffn.0"]
    pairs = draw_pairs(weights, modules)
    given, scales = SETTINGS[settings]
    result = merged(checkpoint, load_lora(save_pretrained(tmp_path, pairs, **given)))
    for module, scale in zip(modules, scales, strict=True):
        down, up = pairs[module]
        expected = weights[f"{module}.weight"] + scale * (up @ down)
        torch.testing.assert_close(result[f"{module}.weight"], expected, **CLOSE, msg=module)


def test_pefts_config_counts_the_rank_of_each_module(checkpoint, weights, tmp_path):
    module = "blocks.0.self_attn.q"
    down, up = draw_pairs(weights, [module])[module]
    pairs = {module: (down[:2], up[:, :2])}
    path = save_pretrained(tmp_path, pairs, rank_pattern={module: 2})
    result = merged(checkpoint, load_lora(path))[f"{module}.weight"]
    expected = weights[f"{module}.weight"] + 16 * (up[:, :2] @ down[:2])
    torch.testing.assert_close(result, expected, **CLOSE)


def test_pefts_patterns_are_in_the_names_of_the_model_that_was_trained(
    checkpoint, weights, tmp_path
):
    module = "blocks.1.cross_attn.o"
    down, up = draw_pairs(weights, [module])[module]
    name = diffusers_name(module)
    path = save_pretrained(tmp_path, {name: (down, up)}, alpha_pattern={name: 2})
    result = merged(checkpoint, load_lora(path))[f"{module}.weight"]
    torch.testing.assert_close(result, weights[f"{module}.weight"] + 0.5 * (up @ down), **CLOSE)


def test_pefts_tensors_without_their_config_are_refused_unless_they_tell_their_alpha(
    checkpoint, weights, tmp_path
):
    module = "blocks.0.self_attn.q"
    down, up = draw_pairs(weights, [module])[module]
    path = save_pretrained(tmp_path, {module: (down, up)})
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"put the adapter_config.json .* beside it$"):
        load_lora(path)
    told = peft({module: (down, up)}, "base_model.model.")
    told[f"base_model.model.{module}.alpha"] = torch.tensor(2.0)
    result = merged(checkpoint, load_lora(write(path, told)))[f"{module}.weight"]
    torch.testing.assert_close(result, weights[f"{module}.weight"] + 0.5 * (up @ down), **CLOSE)


def test_pefts_config_is_nothing_to_a_file_of_another_form(checkpoint, weights, tmp_path):
    pairs = draw_pairs(weights, MODULES[:1])
    save_pretrained(tmp_path, pairs)
    path = write(tmp_path / "other.safetensors", peft(pairs))
    down, up = pairs[MODULES[0]]
    key = f"{MODULES[0]}.weight"
    result = merged(checkpoint, load_lora(path))
    torch.testing.assert_close(result[key], weights[key] + up @ down, **CLOSE)


def test_a_config_of_peft_that_cannot_be_used_is_refused(weights, tmp_path):
    pairs = draw_pairs(weights, MODULES[:1])
    with pytest.raises(CheckpointError, match="use_dora"):
        load_lora(save_pretrained(tmp_path, pairs, use_dora=True))
    with pytest.raises(CheckpointError, match="adapter_config.json has no lora_alpha"):
        load_lora(save_pretrained(tmp_path, pairs, lora_alpha=None))
    path = save_pretrained(tmp_path, pairs)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is not readable JSON"):
        load_lora(path)


# ------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("form", ["lightning", "kohya", "peft", "diffusers"])
def test_the_merge_is_that_of_diffusers(checkpoint, weights, tiny, tmp_path, form):
    pytest.importorskip("peft", reason="diffusers loads LoRAs only with peft installed")
    path = write(tmp_path / "lora.safetensors", FORMS[form][0](draw_pairs(weights)))
    pipeline = WanPipeline.from_pretrained(tiny("t2v-A14B"))
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    theirs = pipeline.transformer.state_dict()
    result = merged(checkpoint, load_lora(path))
    for key, ours in result.items():
        name = official_to_diffusers_transformer(key)
        torch.testing.assert_close(ours, theirs[name], **CLOSE, msg=key)


def test_the_alphas_that_diffusers_saves_beside_the_tensors_are_read(
    checkpoint, weights, tiny, tmp_path
):
    peft_library = pytest.importorskip("peft", reason="diffusers saves LoRAs only with peft")
    pipeline = WanPipeline.from_pretrained(tiny("t2v-A14B"))
    pipeline.transformer.add_adapter(
        peft_library.LoraConfig(
            r=RANK,
            lora_alpha=12,
            alpha_pattern={"blocks.1.attn1.to_q": 2},
            target_modules=["to_q", "to_k"],
            init_lora_weights=False,
        )
    )
    layers = peft_library.get_peft_model_state_dict(pipeline.transformer)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    result = merged(checkpoint, load_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    pipeline.fuse_lora(components=["transformer"])
    for key in ("blocks.0.self_attn.q.weight", "blocks.1.self_attn.q.weight"):
        module = pipeline.transformer.get_submodule(
            official_to_diffusers_transformer(key).removesuffix(".weight")
        )
        assert not torch.equal(result[key], weights[key])
        torch.testing.assert_close(result[key], module.base_layer.weight, **CLOSE, msg=key)


# ---------------------------------------------------------------------------------- refusals


def refuse(tmp_path, tensors, match, metadata=None):
    path = write(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_lora(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_no_known_form_are_listed(weights, tmp_path):
    good = lightning(draw_pairs(weights))
    extra = {f"diffusion_model.img_emb.proj.{n}.diff": torch.zeros(1) for n in range(7)}
    refuse(tmp_path, good | extra, r"7 key\(s\) \(diffusion_model.img_emb.proj.0.diff, .*, \.\.\.")
    refuse(tmp_path, {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(1)}, "1 key")
    refuse(tmp_path, {"lora_te_text_model.lora_up.weight": torch.zeros(1, 1)}, "1 key")


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_half_a_pair_is_an_unused_key(weights, tmp_path, part):
    tensors = lightning(draw_pairs(weights))
    for other in {"lora_down.weight", "lora_up.weight", "alpha"} - {part}:
        del tensors[f"diffusion_model.{MODULES[0]}.{other}"]
    refuse(tmp_path, tensors, f"1 key.*{MODULES[0]}.{part}")


def test_a_missing_alpha_means_a_scale_of_1(checkpoint, weights, tmp_path):
    pairs = draw_pairs(weights, MODULES[:1])
    tensors = {k: t for k, t in lightning(pairs).items() if not k.endswith("alpha")}
    result = merged(checkpoint, load_lora(write(tmp_path / "lora.safetensors", tensors)))
    down, up = pairs[MODULES[0]]
    key = f"{MODULES[0]}.weight"
    torch.testing.assert_close(result[key], weights[key] + up @ down, **CLOSE)


def test_halves_of_different_rank_are_refused(weights, tmp_path):
    tensors = peft(draw_pairs(weights, MODULES[:1]))
    key = f"diffusion_model.{MODULES[0]}.lora_A.weight"
    tensors[key] = tensors[key][:2]
    refuse(tmp_path, tensors, f"{key} has rank 2, its other half 4")


def test_dora_is_refused_by_name(weights, tmp_path):
    good = peft(draw_pairs(weights))
    scale = {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(128, 1)}
    refuse(tmp_path, good | scale, "dora_scale.*DoRA")
    vector = {"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": torch.ones(128)}
    refuse(tmp_path, good | vector, "lora_magnitude_vector.*DoRA")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    refuse(tmp_path, good, "use_dora", metadata)


def test_a_file_that_is_no_lora_is_refused(tmp_path, weights):
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="text.safetensors is truncated"):
        load_lora(tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="nowhere.safetensors is missing"):
        load_lora(tmp_path / "nowhere.safetensors")
    refuse(tmp_path, {}, "holds no LoRA")
    refuse(tmp_path, {"lora_A.weight": torch.zeros(1)}, "1 key")
    path = write(tmp_path / "good.safetensors", peft(draw_pairs(weights)))
    for strength in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="strength must be a finite number"):
            load_lora(path, strength)


def test_a_lora_for_a_deeper_or_wider_model_is_refused(checkpoint, weights, tmp_path):
    pair = (torch.zeros(RANK, 128), torch.zeros(128, RANK))
    deeper = load_lora(
        write(tmp_path / "deeper.safetensors", peft({"blocks.39.self_attn.q": pair}))
    )
    with pytest.raises(CheckpointError, match="deeper.*blocks.39.self_attn.q.*does not have"):
        merged(checkpoint, deeper)
    for name, shape in (("wider", (64, 256)), ("other", (256, 64)), ("larger", (256, 128))):
        pair = (torch.zeros(RANK, shape[1]), torch.zeros(shape[0], RANK))
        key = f"blocks.0.{'cross_attn.k' if name == 'larger' else 'self_attn.q'}"
        lora = load_lora(write(tmp_path / f"{name}.safetensors", peft({key: pair})))
        with pytest.raises(CheckpointError, match=rf"{name}.*{key}.*\[128, 128\]"):
            merged(checkpoint, lora)
    difference = {"diffusion_model.blocks.0.norm3.diff": torch.zeros(64)}
    lora = load_lora(write(tmp_path / "narrow.safetensors", difference))
    with pytest.raises(CheckpointError, match=r"narrow.*blocks.0.norm3.diff.*\[128\]"):
        merged(checkpoint, lora)
    bias = {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.zeros(128)}
    lora = load_lora(write(tmp_path / "bias.safetensors", bias))
    with pytest.raises(CheckpointError, match="norm_q.diff_b.*does not have"):
        merged(checkpoint, lora)
