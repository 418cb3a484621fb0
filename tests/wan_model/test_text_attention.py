"""Attention to a prompt: a few rows stand for all of its padding, exactly."""

import pytest
import torch
import torch.nn.functional as F
from triton_kernels import DEVICE, use_kernels

from wan_model import text_attention as ops
from wan_model.config import TransformerConfig
from wan_model.text_attention import TextKeys, count_rows, text_attention
from wan_model.transformer import WanTransformer

TEXT_LEN = 150
LENGTHS = [[0], [5], [130, 3], [149], [150, 1], [150]]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def padded_and_short(lengths, num_heads, head_dim, dtype):
    """Keys and values of prompts padded to TEXT_LEN, all padding alike, and their short form."""
    k, v = (draw(len(lengths), TEXT_LEN, num_heads, head_dim, seed=s, dtype=dtype) for s in (1, 2))
    for i, length in enumerate(lengths):
        for x in (k, v):
            x[i, length:] = x[i, -1].clone()
    log_counts = count_rows(lengths, TEXT_LEN, DEVICE)
    num_rows = log_counts.shape[1]
    return k, v, TextKeys(k[:, :num_rows], v[:, :num_rows], log_counts)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim", [128, 24])
@pytest.mark.parametrize("how", ["definition", "kernel"])
@torch.no_grad()
def test_short_equals_padded(monkeypatch, how, head_dim, lengths):
    dtype = torch.float32
    if how == "kernel":
        use_kernels(monkeypatch, ops)
        dtype = torch.bfloat16 if DEVICE == "cuda" else dtype
    k, v, text = padded_and_short(lengths, 2, head_dim, dtype)
    q = draw(len(lengths), 133, 3, 2, head_dim, seed=3, dtype=dtype)[:, :, 1]  # not contiguous
    got = text_attention(q, text)
    scores = torch.einsum("bnhd,blhd->bnhl", q.double(), k.double()) * head_dim**-0.5
    expected = torch.einsum("bnhl,blhd->bnhd", scores.softmax(-1), v.double())
    # Sums of 150 terms of order 1 in float32; bfloat16 rounds outputs of up to 4 by 2^-7.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_counts_add_up_to_the_whole_text():
    for lengths in LENGTHS:
        counts = count_rows(lengths, TEXT_LEN, DEVICE).exp().cpu()
        assert counts.shape[1] == min(TEXT_LEN, max(lengths) + 1)
        torch.testing.assert_close(counts.sum(1), torch.full((len(lengths),), float(TEXT_LEN)))
        for row, length in zip(counts, lengths, strict=True):
            assert (row[:length] == 1).all()


@torch.no_grad()
def test_a_prompt_is_embedded_as_if_all_of_its_padding_were_there():
    config = TransformerConfig(
        dim=48, num_heads=2, num_layers=2, ffn_dim=64, text_dim=16, text_len=40,
        in_channels=4, out_channels=4, freq_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WanTransformer(config)
    prompts = [torch.randn(n, config.text_dim) for n in (3, 17)]
    short = model.embed_text(prompts)
    whole = model.text_embedding(torch.stack([F.pad(p, (0, 0, 0, 40 - len(p))) for p in prompts]))
    q = torch.randn(2, 9, 2, 24)
    for block, keys in zip(model.blocks, short, strict=True):
        assert keys.k.shape == (2, 18, 2, 24)
        everything = TextKeys(*block.keys_and_values(whole), torch.zeros(2, 40))
        torch.testing.assert_close(
            text_attention(q, keys), text_attention(q, everything), atol=2e-6, rtol=1e-5
        )
