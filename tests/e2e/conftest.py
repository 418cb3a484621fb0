"""The running services of the end-to-end tests: three tiny models behind one `serve run`."""

import pytest
import torch
from live_service import live, on_cpu, service_args
from safetensors.torch import save_file
from tiny_qwen import write_tiny_qwen, write_tiny_qwen_vl
from webhook_receiver import SECRET, receiving

from wan_model.tiny.checkpoint import write_tiny_checkpoint

TASKS = {"t2v": "t2v-A14B", "i2v": "i2v-A14B", "ti2v": "ti2v-5B"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Served name -> folder of a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: root / name for name in TASKS}
    for name, task in TASKS.items():
        write_tiny_checkpoint(folders[name], task=task, seed=5)
    return folders


@pytest.fixture(scope="session")
def style_lora(tmp_path_factory):
    """A LoRA file for the values of one block's self-attention, in PEFT's form."""
    generator = torch.Generator().manual_seed(3)
    dim = 128  # of the tiny checkpoints
    tensors = {
        "diffusion_model.blocks.0.self_attn.v.lora_A.weight": (4, dim),
        "diffusion_model.blocks.0.self_attn.v.lora_B.weight": (dim, 4),
    }
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(
        {key: torch.randn(shape, generator=generator) for key, shape in tensors.items()}, path
    )
    return path


@pytest.fixture(scope="session")
def webhook_receiver():
    """Where the service announces the end of every video."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def service(tmp_path_factory, checkpoints, style_lora, webhook_receiver):
    """t2v, i2v and ti2v in one service on SQLite, all with t2v's text encoder, i2v with its VAE;
    and t2v-style, which is t2v but for a LoRA on its low-noise expert."""
    args = service_args(checkpoints)
    args["models"]["t2v-style"] = {
        "checkpoint": str(checkpoints["t2v"]),
        "high_noise_expert_from": "t2v",
        "low_noise_expert": on_cpu(lora=[{"path": str(style_lora), "strength": 0.5}]),
    }
    args["models"]["i2v"] |= {"text_encoder_from": "t2v", "vae_from": "t2v"}
    args["models"]["ti2v"] |= {"text_encoder_from": "t2v"}
    language_models = tmp_path_factory.mktemp("language-models")
    args["prompt_extension"] = on_cpu(
        backend="local_qwen",
        checkpoint=str(write_tiny_qwen(language_models / "text")),
        vl_checkpoint=str(write_tiny_qwen_vl(language_models / "vision")),
        max_new_tokens=16,
    )
    args["webhooks"] = {"url": webhook_receiver.url, "first_retry_s": 0.5}
    env = {"WAN_WEBHOOK_SECRET": SECRET}
    with live(tmp_path_factory.mktemp("service"), args, env=env) as running:
        yield running
