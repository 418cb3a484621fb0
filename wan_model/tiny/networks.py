"""The architecture of wan-tiny: the numbers of its networks, and its tokenizer.

Owns what `config.WAN_TINY*` leave open: sizes chosen so that five experts, two VAEs and one text
encoder are 24 MB in bfloat16. Knows nothing about training; the statistics of the latents are
measured there, and are 0 and 1 here.
"""

from __future__ import annotations

from dataclasses import replace

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from wan_model.config import (
    VAE_2_1,
    VAE_2_2,
    WAN_TINY,
    WAN_TINY_I2V,
    WAN_TINY_TI2V,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    WanConfig,
)
from wan_model.tiny.data import VOCABULARY

_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

TEXT_ENCODER = TextEncoderConfig(
    vocab_size=128, d_model=128, d_kv=32, d_ff=192, num_layers=2, num_heads=4
)
# Four heads, so that Ulysses can be shown on up to four ranks; 32 splits into 12, 10, 10 for the
# rotary embedding. 128 pixels and 17 frames are 320 tokens.
_TRANSFORMER = TransformerConfig(
    dim=128,
    num_heads=4,
    num_layers=6,
    ffn_dim=288,
    in_channels=16,
    out_channels=16,
    text_dim=TEXT_ENCODER.d_model,
    # The longest caption is 31 tokens, and padding is attended to: 512 rows cost time and, perhaps,
    # attention.
    text_len=64,
)


def _unmeasured(vae: VAEConfig, **sizes) -> VAEConfig:
    z = vae.z_dim
    return replace(vae, num_res_blocks=1, latents_mean=(0.0,) * z, latents_std=(1.0,) * z, **sizes)


VAE_TINY_2_1 = _unmeasured(VAE_2_1, encoder_dim=16, decoder_dim=16, dim_mult=(1, 2, 3, 3))
VAE_TINY_2_2 = _unmeasured(VAE_2_2, encoder_dim=16, decoder_dim=24, dim_mult=(1, 2, 2, 2))

MODELS: dict[str, WanConfig] = {
    "t2v": replace(WAN_TINY, transformer=_TRANSFORMER, vae=VAE_TINY_2_1, text_encoder=TEXT_ENCODER),
    "i2v": replace(
        WAN_TINY_I2V,
        transformer=replace(_TRANSFORMER, in_channels=36),
        vae=VAE_TINY_2_1,
        text_encoder=TEXT_ENCODER,
    ),
    "ti2v": replace(
        WAN_TINY_TI2V,
        # A token of 2x2 latents would be 192 numbers, and no noise of 192 numbers passes through
        # a residual stream of 128. A token of one is 48, and 16x16 pixels as in the other models.
        transformer=replace(_TRANSFORMER, in_channels=48, out_channels=48, patch_size=(1, 1, 1)),
        vae=VAE_TINY_2_2,
        text_encoder=TEXT_ENCODER,
    ),
}
"""By task; `name` is the row and the folder of the packaged checkpoint."""

VAE_STAGES = {"t2v": "vae", "i2v": "vae", "ti2v": "vae22"}
"""By task, the stage that trains its VAE."""


def caption_tokenizer() -> Tokenizer:
    """One token a word of the captions, then the end token; case and punctuation do not matter.

    Any other word is <unk>, so the default (Chinese) negative prompt is "<unk> </s>".
    """
    words = [*_SPECIAL_TOKENS, *VOCABULARY]
    if len(words) > TEXT_ENCODER.vocab_size:
        raise ValueError(f"{len(words)} words > vocab_size {TEXT_ENCODER.vocab_size}")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return tokenizer
