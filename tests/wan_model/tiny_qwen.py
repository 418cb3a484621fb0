"""Qwen2.5 and Qwen2.5-VL checkpoints of a few kilobytes, with random weights and a byte tokenizer.

The architectures and the files are those of the real ones; what such a model writes is noise.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEXT_CONFIG = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # or what is written hardly depends on what was read
    "bos_token_id": None,
    "eos_token_id": 256 + 2,
    "pad_token_id": 256,
}


def write_tiny_qwen(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    Qwen2ForCausalLM(Qwen2Config(**TEXT_CONFIG)).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def write_tiny_qwen_vl(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    mrope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=TEXT_CONFIG | {"rope_parameters": mrope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": TEXT_CONFIG["hidden_size"],
            "fullatt_block_indexes": [0],
            "window_size": 112,
        },
        **{f"{name}_token_id": 256 + SPECIAL.index(f"<|{token}|>") for name, token in (
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
            ("image", "image_pad"), ("video", "video_pad"),
        )},
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    _write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
            }
        )
    )
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Every byte is a token, and then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "unk_token": None,
                "model_max_length": 16384,
            }
        )
    )
