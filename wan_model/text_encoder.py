"""Prompts -> embeddings: clean text, tokens, and transformers' UMT5 encoder.

Owns the text rules of the reference (cleaning, end token, 512 tokens at most). Knows nothing about
checkpoint files or the transformer's padding: rows beyond a prompt's tokens are not returned.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wan_model.config import TextEncoderConfig

END_TOKEN_ID = 1
PAD_TOKEN_ID = 0
MAX_TOKENS = 512


class TextEncoder:
    """A UMT5 encoder and its tokenizer. Raises ValueError when the two do not fit."""

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS
    ) -> None:
        if model.encoder.embed_tokens.weight is not model.shared.weight:
            raise ValueError("the text encoder's input embedding is not tied to `shared`")
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"the text encoder only {model.config.vocab_size}"
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        if tokenizer.encode("a").ids[-1:] != [END_TOKEN_ID]:
            raise ValueError(f"the tokenizer does not end a text with token {END_TOKEN_ID}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """-> per prompt [num_tokens, d_model] float32 on the encoder's device.

        num_tokens counts the end token and is at most `max_tokens`; longer prompts are cut.
        """
        if not prompts:
            return []
        rows = [self.token_ids(prompt) for prompt in prompts]
        # Padding only to the longest is enough: padded keys are masked and padded rows dropped.
        ids_BL = torch.full((len(rows), max(map(len, rows))), PAD_TOKEN_ID)
        mask_BL = torch.zeros_like(ids_BL)
        for ids_L, mask_L, row in zip(ids_BL, mask_BL, rows, strict=True):
            ids_L[: len(row)] = torch.tensor(row)
            mask_L[: len(row)] = 1
        device = self.model.shared.weight.device
        output = self.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device))
        hidden_BLD = output.last_hidden_state.float()
        return [hidden[: len(row)].clone() for hidden, row in zip(hidden_BLD, rows, strict=True)]

    def token_ids(self, prompt: str) -> list[int]:
        """The cleaned prompt's tokens, the end token last."""
        return self.tokenizer.encode(clean_prompt(prompt)).ids


def clean_prompt(prompt: str) -> str:
    """Repaired Unicode, HTML entities resolved (twice), whitespace collapsed and stripped."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def build_umt5(config: TextEncoderConfig) -> UMT5EncoderModel:
    """The encoder without weights (on whatever device is the default: meta, when loading)."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
            use_cache=False,
        )
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or where there is none from spiece.model, converted by transformers.

    Raises ValueError naming the file that is missing or broken.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
    if not (folder / "spiece.model").is_file():
        raise ValueError(f"{folder} has neither tokenizer.json nor spiece.model")
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(folder).backend_tokenizer
