"""torch.ops.recycle.recycle_head: RMSNorm, matmul with the packed output matrix, softmax, argmax or a sample."""

from __future__ import annotations

import pytest
import torch
from formats import columns, random_matrix
from tolerance import assert_as_good_as, error

from recycle_ext import _C
from recycle_ext.checkpoint.tensor_source import BLOCKS
from recycle_ext.reference import ops as reference_ops
from recycle_ext.weights.layout import FORMATS, pack_matrix

EPS = 1e-5


def case(rows: int, d: int, n_vocab: int, format: str):
    d = columns(format, d)
    generator = torch.Generator().manual_seed(rows + d + n_vocab)
    hidden = torch.randn(rows, d, generator=generator)
    norm = 1 + 0.1 * torch.randn(d, generator=generator)
    return hidden, norm, *random_matrix(format, n_vocab, d, generator)


def call(hidden, norm, packed, format, n_vocab, temperature=0.0, top_k=0, top_p=1.0, seeds=None):
    rows = len(hidden)
    positions = torch.arange(rows) + 7
    seeds = torch.arange(rows) if seeds is None else seeds
    return torch.ops.recycle.recycle_head(
        hidden, norm, EPS, packed, FORMATS[format], n_vocab, positions, temperature, top_k, top_p, seeds
    )


@pytest.mark.parametrize("format", BLOCKS)
def test_rounded_activations_cost_a_fiftieth_of_bfloat16(isa, format):
    hidden, norm, packed, matrix = case(64, 576, 200, format)
    tokens, log_probs = call(hidden, norm, packed, format, 200)
    normed = reference_ops.rms_norm(hidden.double(), norm.double(), EPS)
    exact = (normed @ matrix.T).log_softmax(-1)
    bfloat16 = (normed.bfloat16().double() @ matrix.T).log_softmax(-1)
    column = tokens[:, None]
    ours = (log_probs[:, None] - exact.gather(1, column)).abs().mean()
    theirs = (bfloat16 - exact).gather(1, column).abs().mean()
    assert ours < theirs / 50


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "d", "n_vocab"),
    [
        (1, 32, 1),
        (1, 576, 1000),
        (2, 64, 17),
        (3, 96, 63),
        (4, 32, 64),
        (5, 160, 65),
        (6, 64, 130),
        (7, 32, 257),
        (8, 576, 333),
        (33, 64, 100),
    ],
)
def test_greedy_token_is_the_argmax_of_the_exact_logits(isa, format, rows, d, n_vocab):
    hidden, norm, packed, matrix = case(rows, d, n_vocab, format)
    tokens, log_probs = call(hidden, norm, packed, format, n_vocab)
    normed = reference_ops.rms_norm(hidden.double(), norm.double(), EPS)
    exact = (normed @ matrix.T).log_softmax(-1)
    native = (reference_ops.rms_norm(hidden, norm, EPS) @ matrix.float().T).log_softmax(-1)
    assert torch.equal(tokens, exact.argmax(-1))
    column = tokens[:, None]
    log_probs, exact = log_probs[:, None], exact.gather(1, column)
    if format in BLOCKS:
        # Activations are rounded to 1/32767 of the largest in their block of 32. Each error is at most half of
        # that, and the error of a log-probability at most twice that of a logit.
        steps = normed.view(rows, -1, 32).abs().amax(-1) / 32767
        max_error = (steps / 2) @ matrix.view(n_vocab, -1, 32).abs().sum(-1).T
        assert error(log_probs, exact) <= 2 * max_error.max().item() + 1e-6
    else:
        assert_as_good_as(log_probs, native.gather(1, column), exact)


def test_equal_logits_give_the_lowest_id(isa):
    matrix = torch.zeros(200, 32)
    matrix[[37, 90, 150]] = 1.0
    for threads in (1, 2, 5):  # equal logits in one thread's rows, and in several threads'
        _C.set_n_threads(threads)
        tokens, _ = call(torch.ones(2, 32), None, pack_matrix(matrix, "f32"), "f32", 200)
        assert tokens.tolist() == [37, 37]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 20, 0.9), (1.0, 1, 1.0)],
)
def test_sampled_token_equals_reference(isa, temperature, top_k, top_p):
    """Both use the same counter-based random numbers and the same top-k and top-p cuts."""
    n_vocab, rows = 300, 64
    hidden, norm, packed, matrix = case(rows, 64, n_vocab, "f32")
    seeds = torch.arange(rows) * 7919 + 2**40
    tokens, log_probs = call(hidden, norm, packed, "f32", n_vocab, temperature, top_k, top_p, seeds)
    expected, expected_log_probs = reference_ops.recycle_head(
        hidden.double(), norm.double(), EPS, matrix, torch.arange(rows) + 7, temperature, top_k, top_p, seeds
    )
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs.double(), expected_log_probs, rtol=0, atol=1e-5)
    if top_k == 1:
        assert torch.equal(tokens, call(hidden, norm, packed, "f32", n_vocab)[0])


TEMPERATURES_NEAR_0 = [1e-6, 1e-12, 1e-30, 3e-38, 2e-39, 1e-40, 1e-46, 5e-324]


@pytest.mark.parametrize("temperature", TEMPERATURES_NEAR_0)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9)])
def test_temperature_near_0_gives_the_argmax(isa, temperature, top_k, top_p):
    hidden, norm, packed, matrix = case(6, 32, 50, "f32")
    greedy, _ = call(hidden, norm, packed, "f32", 50)
    tokens, log_probs = call(hidden, norm, packed, "f32", 50, temperature, top_k, top_p)
    assert torch.equal(tokens, greedy)
    assert torch.isfinite(log_probs).all()
    for dtype in (torch.float32, torch.float64):
        logits = reference_ops.rms_norm(hidden.to(dtype), norm.to(dtype), EPS) @ matrix.to(dtype).T
        probs = reference_ops.distribution(logits[0], temperature, top_k, top_p)
        assert probs.argmax() == greedy[0]
        assert probs.max() == 1


def test_top_p_that_equal_tokens_reach_exactly_keeps_the_lowest_ids(isa):
    packed = pack_matrix(torch.zeros(16, 32), "f32")
    drawn = set()
    for seed in range(4):
        tokens, _ = call(torch.ones(64, 32), None, packed, "f32", 16, 1.0, 0, 0.5, torch.arange(64) + 64 * seed)
        drawn |= set(tokens.tolist())
    assert drawn == set(range(8))


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_temperature_of_any_size_keeps_the_cuts(isa, temperature):
    hidden, norm, packed, _ = case(64, 32, 50, "f32")
    greedy, _ = call(hidden, norm, packed, "f32", 50)
    tokens, _ = call(hidden, norm, packed, "f32", 50, temperature, top_k=1)
    assert torch.equal(tokens, greedy)
    tokens, _ = call(hidden, norm, packed, "f32", 50, temperature)
    assert len(set(tokens.tolist())) > 20


def test_philox_of_the_reference_gives_the_published_numbers():
    """The known answers are those of Random123, the implementation of Salmon et al. (SC 2011)."""
    ones = 0xFFFFFFFF
    assert reference_ops.philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference_ops.philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("format", FORMATS)
def test_row_in_any_batch_and_thread_count_has_the_same_bits(isa, format):
    n_vocab = 1000
    hidden, norm, packed, _ = case(8, 96, n_vocab, format)
    together = call(hidden, norm, packed, format, n_vocab)
    for threads in (1, 2, 3, 5):
        _C.set_n_threads(threads)
        for rows in range(1, 9):
            some = call(hidden[:rows], norm, packed, format, n_vocab)
            assert torch.equal(some[0], together[0][:rows])
            assert torch.equal(some[1], together[1][:rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_logit_is_reported_with_its_row(isa, bad, temperature):
    hidden, norm, packed, _ = case(3, 32, 50, "f32")
    hidden[1, 5] = bad
    with pytest.raises(RuntimeError, match=r"NaN or infinite \(row 1, position 8\)"):
        call(hidden, norm, packed, "f32", 50, temperature)
