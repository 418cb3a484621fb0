"""Our exact attentions on Hopper: what their kernels are told, which blocks take what, numbers."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from tensor_maps import box_of, memory, tensor_map
from torch import Tensor
from triton_kernels import DEVICE

from wan_model import hopper, hopper_attention
from wan_model.attention import check_kernel
from wan_model.backends import check_backends
from wan_model.hopper_attention import BOX, HEAD_DIM, MAX_TEXT_KEYS, QUERIES

SHAPES = [  # B, L, S, H
    (1, 192, 128, 1), (1, 160, 160, 2), (2, 70, 300, 3), (1, 600, 65, 3), (2, 385, 1000, 2),
]  # fmt: skip
TEXT_SHAPES = [(1, 200, 1, 2), (2, 70, 121, 3), (1, 600, 130, 2), (1, 64, 256, 7)]
BFLOAT16 = 2 * 2**-8  # of the largest value: twice half a step, probabilities' and the output's

needs_kernel = pytest.mark.skipif(
    DEVICE == "cpu" or not hopper.has_bindings() or not hopper.is_hopper(0),
    reason="needs a Hopper GPU and cuda-bindings",
)


def draw(b: int, num_queries: int, num_keys: int, h: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_queries)
    shapes = [(b, n, h, HEAD_DIM) for n in (num_queries, num_keys, num_keys)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE, torch.bfloat16) for x in (3 * q, k, v)]


def draw_text(*shape: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the keys' log_counts."""
    q, k, v = draw(*shape)
    log_counts = 3 * torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0))
    return [q, k, v], log_counts.to(DEVICE)


def exactly(
    q: Tensor, k: Tensor, v: Tensor, log_counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blhd,bshd->blhs", q.double(), k.double()) * HEAD_DIM**-0.5
    if log_counts is not None:
        scores += log_counts.double()[:, None, None]
    return torch.einsum("blhs,bshd->blhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def assert_right(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    expected, expected_lse = exactly(q, k, v)
    assert_near(out, expected)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert (out - expected).abs().max() < BFLOAT16 * expected.abs().max()


# ------------------------------------------------------------------- what the kernel is told


# A copy of what attention_bf16_hopper.cu says; that it says so is seen on a card only, below.
def place_of_block(block: int, num_tiles: int, num_heads: int) -> tuple[int, int, bool]:
    """As in attention_bf16_hopper.cu: head, tile, and whether the block is one of a pair."""
    pairs, (cluster, rank) = num_tiles // 2, divmod(block, 2)
    left = cluster - pairs * num_heads
    if left < 0:
        return cluster // pairs, cluster % pairs * 2 + rank, True
    return left * 2 + rank, num_tiles - 1, False


@pytest.mark.parametrize("num_heads", [1, 2, 3, 40])
@pytest.mark.parametrize("num_tiles", [1, 2, 3, 143, 394])
def test_every_tile_of_every_head_has_one_block_and_pairs_share_a_head(num_tiles, num_heads):
    blocks = range(hopper_attention._grid(num_tiles, num_heads)[0])
    places = [place_of_block(block, num_tiles, num_heads) for block in blocks]
    taken = sorted((head, tile) for head, tile, _ in places if head < num_heads)
    assert taken == [(head, tile) for head in range(num_heads) for tile in range(num_tiles)]
    assert len(places) - len(taken) <= 1
    for first, second in zip(places[::2], places[1::2], strict=True):
        assert first[2] == second[2]
        if first[2]:
            assert first[0] == second[0]


def rows(source: Tensor, sample: int, head: int, start: int, number: int) -> Tensor:
    """Tokens of one head, as the kernels copy them."""
    boxes = [
        [box_of(source, BOX, sample, t, head, c)[0, :, 0] for c in (0, 64)]
        for t in range(start, start + number, 64)
    ]
    return torch.cat([torch.cat(row, dim=1) for row in boxes])


def as_the_kernel_does(grid, values, types) -> None:
    """What attention_bf16_hopper.cu makes of its arguments, block after block."""
    (q, box), (k, k_box), (v, v_box), out_at, lse_at, num_queries, num_keys, h, b, scale = values
    assert box == k_box == v_box == BOX and len(types) == len(values)
    num_tiles = -(-num_queries // QUERIES)
    sizes = (HEAD_DIM, h, num_queries, b)
    out = memory(out_at, sizes, (256, 256 * h, 256 * h * num_queries))
    lse = None
    if lse_at:
        raw = (ctypes.c_float * (b * num_queries * h)).from_address(lse_at)
        lse = torch.frombuffer(raw, dtype=torch.float32).view(b, num_queries, h)

    for block in range(grid[0]):
        place, tile, _ = place_of_block(block, num_tiles, b * h)
        if place >= b * h:
            continue
        sample, head = divmod(place, h)
        queries = rows(q, sample, head, tile * QUERIES, QUERIES)
        keys, values_of = (rows(x, sample, head, 0, -(-num_keys // 128) * 128) for x in (k, v))
        scores = (queries @ keys.T * scale)[:, :num_keys]
        highest = scores.amax(1, keepdim=True)
        p = torch.exp2(scores - highest)
        made = p.bfloat16().float() @ values_of[:num_keys] / p.sum(1, keepdim=True)
        tokens = range(tile * QUERIES, min((tile + 1) * QUERIES, num_queries))
        out[sample, tokens.start : tokens.stop, head] = made[: len(tokens)].bfloat16()
        if lse is not None:
            total = (highest + p.sum(1, keepdim=True).log2())[: len(tokens), 0]
            lse[sample, tokens.start : tokens.stop, head] = total / 1.4426950408889634


def as_the_text_kernel_does(grid, values, types) -> None:
    """What text_attention_hopper.cu makes of its arguments, block after block."""
    (q, _), (k, _), (v, _), counts_at, out_at, num_queries, num_keys, h, num_shares, scale = values
    b = grid[0] // (h * num_shares)
    assert len(types) == len(values) and grid == (b * h * num_shares, 1)
    out = memory(out_at, (HEAD_DIM, h, num_queries, b), (256, 256 * h, 256 * h * num_queries))
    raw = (ctypes.c_float * (b * num_keys)).from_address(counts_at)
    counts = torch.frombuffer(raw, dtype=torch.float32).view(b, num_keys) * 1.4426950408889634
    for block in range(grid[0]):
        sample, head, share = block // num_shares // h, block // num_shares % h, block % num_shares
        keys, values_of = (rows(x, sample, head, 0, -(-num_keys // 128) * 128) for x in (k, v))
        for tile in range(share, -(-num_queries // 64), num_shares):
            scores = (rows(q, sample, head, 64 * tile, 64) @ keys.T * scale)[:, :num_keys]
            scores += counts[sample]
            p = torch.exp2(scores - scores.amax(1, keepdim=True))
            made = p.bfloat16().float() @ values_of[:num_keys] / p.sum(1, keepdim=True)
            part = out[sample, 64 * tile : 64 * tile + 64, head]
            part.copy_(made[: len(part)].bfloat16())


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("reads the tensors where a CPU has them")
    monkeypatch.setattr(hopper_attention, "_missing", lambda q: None)
    kernel = SimpleNamespace(who=hopper_attention.KERNEL.who, launch=as_the_kernel_does)
    monkeypatch.setattr(hopper_attention, "KERNEL", kernel)
    text_kernel = SimpleNamespace(who="attention to the text", launch=as_the_text_kernel_does)
    monkeypatch.setattr(hopper_attention, "text_kernel", lambda num_blocks: text_kernel)
    monkeypatch.setattr(hopper, "tensor_map", tensor_map)
    monkeypatch.setattr(hopper, "num_processors", lambda device: 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_boxes_and_blocks_cover_the_attention(on_a_cpu, shape):
    q, k, v = draw(*shape)
    assert_right(*hopper_attention.hopper_attention_with_lse(q, k, v), q, k, v)


@pytest.mark.parametrize("shape", TEXT_SHAPES)
def test_maps_boxes_and_shares_cover_the_attention_to_a_text(on_a_cpu, shape):
    qkv, log_counts = draw_text(*shape)
    out = hopper_attention.text_attention(*qkv, log_counts)
    assert_near(out, exactly(*qkv, log_counts)[0])


def test_parts_of_one_tensor_are_read_where_they_lie(on_a_cpu):
    """As the fused blocks have them: q, k and v between each other."""
    q, k, v = torch.stack(draw(2, 150, 150, 3), dim=2).unbind(2)
    assert all(hopper_attention._mappable(x) is x for x in (q, k[:, :140], v))
    assert_right(*hopper_attention.hopper_attention_with_lse(q, k, v), q, k, v)


def test_what_tma_cannot_read_is_copied_first(on_a_cpu):
    q, k, v = draw(1, 100, 70, 2)
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    apart = k.transpose(1, 3).contiguous().transpose(1, 3)
    for x in (shifted, apart):
        assert hopper_attention._mappable(x) is not x
    assert_right(*hopper_attention.hopper_attention_with_lse(shifted, apart, v), q, k, v)


def test_what_the_kernels_hold_fits_into_shared_memory():
    texts = [hopper_attention.text_kernel(n) for n in range(1, MAX_TEXT_KEYS // 128 + 1)]
    assert max(kernel.shared_bytes for kernel in (hopper_attention.KERNEL, *texts)) <= 232_448


def test_a_long_text_is_left_to_triton(on_a_cpu):
    q = draw(1, 1, 1, 2)[0]
    assert hopper_attention.fits_text(q, MAX_TEXT_KEYS)
    assert not hopper_attention.fits_text(q, MAX_TEXT_KEYS + 1)


# ------------------------------------------------------------------------------------ refusals


def test_it_is_refused_in_a_sentence_where_there_is_no_kernel():
    with pytest.raises(ValueError, match="attention backend hopper needs a Hopper GPU"):
        check_kernel("hopper", device="cpu", dtype=torch.bfloat16, head_dim=128, needs_lse=False)
    with pytest.raises(ValueError, match="hopper is not known to xfuser"):
        check_backends(attention="hopper", parallel_backend="xfuser", ring_degree=1)
    check_backends(attention="hopper", parallel_backend="own", ring_degree=2)


@pytest.mark.parametrize("wrong", ["length", "heads", "dtype"])
def test_keys_and_values_that_do_not_fit_the_queries_are_refused(on_a_cpu, wrong):
    q, k, v = draw(1, 20, 30, 2)
    k = {"length": k[:, 1:], "heads": k[:, :, :1], "dtype": k.float()}[wrong]
    needs = r"needs keys and values of \[1, \d+, 2, 128\] in"
    with pytest.raises(ValueError, match=f"hopper {needs}"):
        hopper_attention.hopper_attention(q, k, v)
    with pytest.raises(ValueError, match=f"to the text {needs}"):
        hopper_attention.text_attention(q, k, v, torch.zeros(1, 30))


# ---------------------------------------------------------------------------------- on the card


@needs_kernel
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1000, 5000, 5), (1, 192 * 7, 2048, 3)])
def test_the_kernel_computes_attention(shape):
    q, k, v = draw(*shape)
    assert_right(*hopper_attention.hopper_attention_with_lse(q, k, v), q, k, v)


@needs_kernel
@pytest.mark.parametrize(
    "shape", [*TEXT_SHAPES, (3, 100, 40, 70), (1, 3000, 121, 70), (1, 3000, 200, 70)]
)
def test_the_texts_kernel_computes_attention_the_same_every_time(shape):
    qkv, log_counts = draw_text(*shape)
    out = hopper_attention.text_attention(*qkv, log_counts)
    assert_near(out, exactly(*qkv, log_counts)[0])
    for _ in range(5):
        assert torch.equal(hopper_attention.text_attention(*qkv, log_counts), out)


@needs_kernel
def test_the_kernel_reads_parts_of_one_tensor():
    q, k, v = torch.stack(draw(2, 500, 500, 3), dim=2).unbind(2)
    assert_right(*hopper_attention.hopper_attention_with_lse(q, k, v), q, k, v)


@needs_kernel
def test_scores_far_apart_and_rising_overflow_nowhere():
    q, k, v = draw(1, 300, 900, 2)
    k = (k * torch.linspace(0.1, 40, 900, device=DEVICE)[:, None, None]).bfloat16()
    assert_right(*hopper_attention.hopper_attention_with_lse(q, k, v), q, k, v)


@needs_kernel
def test_the_same_numbers_come_out_every_time():
    q, k, v = draw(1, 3000, 4000, 5)
    first = hopper_attention.hopper_attention(q, k, v)
    for _ in range(20):
        assert torch.equal(hopper_attention.hopper_attention(q, k, v), first)
