import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, UMT5EncoderModel

from wan_model.checkpoint_keys import CheckpointError
from wan_model.config import NEGATIVE_PROMPT, TextEncoderConfig
from wan_model.engine import TextEncoderEngine
from wan_model.text_encoder import TextEncoder, build_umt5, clean_prompt, load_tokenizer
from wan_model.tiny.checkpoint import random_text_encoder, tiny_tokenizer
from wan_model.weights import open_checkpoint

LONG = "two cats in boxing gloves fight on a stage, " * 14
PROMPTS = ["a red circle", "", NEGATIVE_PROMPT, LONG]


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny("t2v-A14B")


@pytest.fixture(scope="module")
def encoder(folder):
    return open_checkpoint(folder).load_text_encoder(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(folder):
    """prompt -> its rows by transformers, cleaned and padded to 512 as diffusers does."""
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def encode(prompt):
        tokens = tokenizer(
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=512,
            truncation=True,
            return_tensors="pt",
        )
        rows = model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        return rows[: tokens.attention_mask.sum()]

    return encode


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_those_of_transformers_padded_to_512(encoder, reference, prompt):
    (ours,) = encoder.encode([prompt])
    theirs = reference(prompt)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-5


def test_far_tokens_still_see_each_other(encoder, reference):
    """Beyond 128 positions the relative bias has one value: a shared or missing one shows here."""
    num_tokens = len(encoder.token_ids(LONG))
    assert num_tokens > 200
    (rows,) = encoder.encode([LONG])
    (changed,) = encoder.encode(["x" + LONG[1:]])
    assert (rows[-1] - changed[-1]).abs().max() > 1e-4
    assert (rows - reference(LONG)).abs().max() <= 1e-5


def test_a_prompts_embedding_does_not_depend_on_its_neighbours(encoder):
    together = encoder.encode(PROMPTS)
    for rows, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = encoder.encode([prompt])
        assert rows.shape == alone.shape == (len(encoder.token_ids(prompt)), 32)
        assert (rows - alone).abs().max() <= 1e-5
    assert encoder.encode([]) == []


def test_a_text_ends_with_its_end_token_also_where_it_is_cut(encoder):
    assert encoder.token_ids("") == [1]
    ids = encoder.token_ids("a red circle " * 400)
    assert len(ids) == 512 and ids[-1] == 1
    assert encoder.encode(["a red circle " * 400])[0].shape == (512, 32)


def test_a_prompt_is_cleaned_as_the_reference_does():
    assert clean_prompt("  a &amp;amp; b\n\t c  ") == "a & b c"
    assert clean_prompt("naÃ¯ve â€œquoteâ€\x9d") == 'naïve "quote"'
    assert clean_prompt("") == clean_prompt(" \n ") == ""
    assert clean_prompt("&nbsp;a") == "a"


def test_cleaning_is_that_of_the_diffusers_pipeline():
    for prompt in (*PROMPTS, " ﬁre &lt;b&gt; &amp;lt;i ", "a\u00a0b　c", "&nbsp; x &nbsp;"):
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_an_untied_embedding_is_refused():
    model = build_umt5(TextEncoderConfig(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=1))
    model.encoder.embed_tokens = torch.nn.Embedding(512, 32)
    with pytest.raises(ValueError, match="not tied"):
        TextEncoder(model, tiny_tokenizer())


def test_each_layer_has_its_own_position_bias(encoder):
    state = encoder.model.state_dict()
    biases = [tensor for name, tensor in state.items() if "relative_attention_bias" in name]
    assert len(biases) == 2 and not torch.equal(*biases)


def test_a_tokenizer_that_adds_no_end_token_is_refused():
    config = TextEncoderConfig(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="does not end a text with token 1"):
        TextEncoder(build_umt5(config), tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    config = TextEncoderConfig(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1)
    with pytest.raises(ValueError, match="512 tokens, the text encoder only 300"):
        TextEncoder(build_umt5(config), tiny_tokenizer())


def test_without_tokenizer_json_the_sentencepiece_model_is_read(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a red circle moves left\na blue square falls\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=23,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a red square moves").ids
    assert ids == [*expected.encode("a red square moves"), 1]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither tokenizer.json nor spiece.model"):
        load_tokenizer(tmp_path)


def test_bfloat16_rounds_every_weight_and_still_returns_float32(folder, encoder):
    half = open_checkpoint(folder).load_text_encoder(device="cpu", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.model.state_dict().values()} == {torch.bfloat16}
    assert half.model.encoder.embed_tokens.weight is half.model.shared.weight
    (rows,), (exact,) = half.encode(["a red circle"]), encoder.encode(["a red circle"])
    assert rows.dtype == torch.float32
    assert 0 < (rows - exact).norm() / exact.norm() < 0.03  # a few roundings of 2^-9 each


def test_random_weights_make_text_matter():
    config = TextEncoderConfig(
        vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    model = build_umt5(config)
    model.load_state_dict(random_text_encoder(config, seed=3), strict=False)
    encoder = TextEncoder(model, tiny_tokenizer())
    one, other = encoder.encode(["a red circle", "a red square"])
    assert (one[0] - other[0]).abs().max() > 0.05
    assert 0.5 < one.std() < 2


def test_broken_tokenizers_are_checkpoint_errors(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "broken")
    (root / "tokenizer/tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        open_checkpoint(root).load_text_encoder(device="cpu", dtype=torch.float32)


def test_an_engine_gives_the_same_bits_whatever_else_it_is_asked_for(folder):
    engine = TextEncoderEngine(checkpoint=str(folder), device="cpu")
    alone = engine.encode(["a blue square"])[0]
    beside_a_longer_one = engine.encode(["a blue square", "a red circle " * 20])[0]
    assert np.array_equal(alone, beside_a_longer_one)
