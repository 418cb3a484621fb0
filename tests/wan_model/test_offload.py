"""Two blocks on the device, the others in host memory: the same forward."""

import dataclasses

import pytest
import torch

from wan_model import offload
from wan_model.config import T2V_A14B
from wan_model.engine import ExpertEngine
from wan_model.offload import NUM_PLACES, _pieces, offload_blocks
from wan_model.parallel import SequenceParallel
from wan_model.transformer import WanTransformer


def model_of(num_layers: int) -> WanTransformer:
    config = dataclasses.replace(
        T2V_A14B.transformer, dim=48, num_heads=2, num_layers=num_layers, ffn_dim=64, text_dim=32
    )
    torch.manual_seed(0)
    return WanTransformer(config).eval().requires_grad_(False)


@torch.inference_mode()
def two_forwards(model: WanTransformer) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(1, model.config.in_channels, 3, 8, 8, generator=draw)
    text = model.embed_text([torch.randn(7, 32, generator=draw)])
    timesteps = torch.tensor([[900.0]])
    return [model(latents, timesteps, text, SequenceParallel()) for _ in range(2)]


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5])
def test_the_output_is_equal_to_the_bit_and_two_blocks_are_on_the_device(num_layers):
    """An odd number too: the last block and the first of the next forward share a place."""
    expected = two_forwards(model_of(num_layers))
    model = offload_blocks(model_of(num_layers), "cpu")
    for place in model.offload.places:
        place.fill_(255)  # NaN in every format: weights that were not fetched would be seen
    for got, wanted in zip(two_forwards(model), expected, strict=True):
        assert torch.equal(got, wanted)
    storages = {p.untyped_storage().data_ptr() for p in model.blocks.parameters()}
    assert storages <= {place.data_ptr() for place in model.offload.places}
    assert len(storages) == min(num_layers, NUM_PLACES)


def test_the_next_block_is_fetched_before_its_turn():
    model = offload_blocks(model_of(4), "cpu")
    model.offload.use(0)
    assert model.offload.in_place == [0, 1]
    model.offload.use(1)
    assert model.offload.in_place == [2, 1]


@pytest.mark.parametrize("num_bytes", [256, 2**20, 3 * 2**20, 703_088_640, 333_201_408])
def test_blocks_are_pinned_in_pieces_that_pytorch_does_not_round_up(num_bytes):
    pieces = _pieces(num_bytes)
    assert sum(pieces) == num_bytes and min(pieces) > 0
    rounded = [2 ** (piece - 1).bit_length() for piece in pieces]
    assert sum(rounded) - num_bytes < 2**20


def test_pieces_make_the_same_block(monkeypatch):
    expected = two_forwards(model_of(3))
    monkeypatch.setattr(offload, "LAST_PIECE_BYTES", 256)
    model = offload_blocks(model_of(3), "cpu")
    assert all(len(pieces) > 2 for pieces in model.offload.host)
    assert all(map(torch.equal, two_forwards(model), expected))


def test_an_expert_offloads_by_option_and_refuses_what_has_no_effect(tiny):
    options = {"checkpoint": str(tiny("t2v-A14B")), "expert": "high_noise", "device": "cpu"}
    ExpertEngine(**options, offload=True).warm_up()
    with pytest.raises(ValueError, match="shard_weights has no effect on one rank"):
        ExpertEngine(**options, shard_weights=True)
    with pytest.raises(ValueError, match="shard_weights and offload exclude each other"):
        ExpertEngine(**options, shard_weights=True, offload=True)
