"""decoding/step.py: the record of a step, and what generations count of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import write_base, write_byte_tokenizer, write_module

import recycle_ext
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.step import SequenceStep, Step
from recycle_ext.generate.__main__ import figures
from recycle_ext.generate.generation import Statistics

PROMPT = "the sea"
DRAFTS = 4


def record(tokens: list[int], drafted: int = DRAFTS) -> SequenceStep:
    """A step whose last token is the base model's own."""
    return SequenceStep(tokens, drafted, len(tokens) - 1, 0.5)


@pytest.mark.parametrize(
    ("tokens", "limit", "end_tokens", "expected"),
    [
        # Limits, with 3 of 4 draft tokens accepted: (tokens, drafted, accepted) up to the cut.
        ([7, 8, 9, 5], 1, (), ([7], 1, 1)),
        ([7, 8, 9, 5], 2, (), ([7, 8], 2, 2)),
        ([7, 8, 9, 5], 3, (), ([7, 8, 9], 3, 3)),
        ([7, 8, 9, 5], 4, (), ([7, 8, 9, 5], 4, 3)),
        ([7, 8, 9, 5], 5, (), ([7, 8, 9, 5], 4, 3)),
        ([7, 8, 9, 5], 99, (), ([7, 8, 9, 5], 4, 3)),
        # All accepted: only a fifth token is the base model's own.
        ([7, 8, 9, 6, 5], 4, (), ([7, 8, 9, 6], 4, 4)),
        ([7, 8, 9, 6, 5], 5, (), ([7, 8, 9, 6, 5], 4, 4)),
        # None accepted: the first draft token was verified, and the base model's own stands in its place.
        ([5], 1, (), ([5], 1, 0)),
        ([5], 2, (), ([5], 2, 0)),
        # An end token among the draft tokens, the first of several, and in the last place of all.
        ([7, 8, 9, 5], 99, (8,), ([7, 8], 2, 2)),
        ([7, 8, 9, 8, 5], 99, (8,), ([7, 8], 2, 2)),
        ([7, 8, 9, 5], 99, (9, 7), ([7], 1, 1)),
        ([7, 8, 9, 6, 5], 99, (6,), ([7, 8, 9, 6], 4, 4)),
        # As the base model's own token: the draft token in its place was verified, those behind it don't count.
        ([7, 5], 99, (5,), ([7, 5], 2, 1)),
        ([7, 8, 9, 5], 99, (5,), ([7, 8, 9, 5], 4, 3)),
        ([7, 8, 9, 6, 5], 99, (5,), ([7, 8, 9, 6, 5], 4, 4)),
        # A limit and an end token: the earlier one.
        ([7, 8, 9, 5], 2, (9,), ([7, 8], 2, 2)),
        ([7, 8, 9, 5], 3, (8,), ([7, 8], 2, 2)),
        ([7, 8, 9, 5], 99, (4,), ([7, 8, 9, 5], 4, 3)),
    ],
)
def test_cut_counts_nothing_behind_the_end(tokens, limit, end_tokens, expected):
    step = record(tokens)
    cut = step.cut(limit, end_tokens)
    assert (cut.tokens, cut.drafted, cut.accepted) == expected
    assert cut.seconds == 0.5
    assert cut.cut(limit, end_tokens) == cut
    assert step == record(tokens)


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_cut_of_a_standard_step_is_the_step(limit):
    step = record([5], drafted=0)
    assert step.cut(limit) == step
    assert step.cut(limit, (5,)) == step


def test_sequence_of_a_batch_has_its_own_counts():
    tokens = torch.tensor([[7, 8, 5], [5, -1, -1], [-1, -1, -1], [7, 5, -1]])
    step = Step(tokens, torch.tensor([3, 1, 0, 2]), 2, 0.5)
    assert step.sequence() == step.sequence(0) == SequenceStep([7, 8, 5], 2, 2, 0.5)
    assert step.sequence(1) == SequenceStep([5], 2, 0, 0.5)
    assert step.sequence(3) == SequenceStep([7, 5], 2, 1, 0.5)


def test_sequence_that_is_idle_has_no_tokens_and_no_drafts():
    step = Step(torch.full((1, 3), -1), torch.tensor([0]), 2, 0.5)
    assert step.sequence() == SequenceStep([], 0, 0, 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> recycle_ext.Model:
    """A tiny base with a tokenizer of single bytes, and a module whose draft tokens are right now and then."""
    folder = tmp_path_factory.mktemp("records")
    vocab_size = write_byte_tokenizer(folder / "base")
    base = write_base(folder / "base", vocab_size=vocab_size, n_layers=1)
    write_module(folder / "module", base, like_base=True)
    return recycle_ext.load(folder / "base", module=folder / "module", dtype="f32", threads=1)


def generate(model: recycle_ext.Model, **options) -> recycle_ext.generate:
    """A generation run to its end."""
    generation = recycle_ext.generate(model, PROMPT, **options)
    for _ in generation:
        pass
    return generation


def ending_with(model: recycle_ext.Model, *end_tokens: int) -> recycle_ext.Model:
    """The same model with other end tokens."""
    tokenizer = dataclasses.replace(model.tokenizer, eos_token_ids=end_tokens)
    return dataclasses.replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize("limit", range(1, 9))
def test_statistics_of_a_short_alternate_run_end_with_the_text(model, limit):
    """Each full step has 4 draft tokens and one of the base model's own; the last one is cut."""
    model = ending_with(model)
    generation = generate(model, mode="alternate", drafts=DRAFTS, max_new_tokens=limit)
    statistics, decoded = generation.statistics, limit - 1
    assert len(generation.token_ids) == statistics.new_tokens == limit
    assert statistics.decoded_tokens == decoded
    assert statistics.steps == -(-decoded // (DRAFTS + 1))
    assert statistics.offered_drafts == statistics.accepted_drafts == decoded - decoded // 5
    assert statistics.acceptance_rate == (1 if decoded else None)
    if decoded:
        assert statistics.tokens_per_second == decoded / statistics.decode_seconds
    else:
        assert statistics.tokens_per_second == statistics.decode_seconds == 0


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 8, 30])
@pytest.mark.parametrize("drafts", range(1, DRAFTS + 1))
def test_statistics_of_a_verify_run_end_with_the_text(model, drafts, limit):
    model = ending_with(model)
    standard = generate(model, mode="standard", max_new_tokens=limit)
    generation = generate(model, mode="verify", drafts=drafts, max_new_tokens=limit)
    assert generation.token_ids == standard.token_ids
    assert standard.statistics.steps == limit - 1
    assert standard.statistics.offered_drafts == standard.statistics.accepted_drafts == 0
    statistics = generation.statistics
    assert statistics.decoded_tokens == limit - 1
    # Every step but a cut one has one token that is no draft token.
    assert statistics.accepted_drafts + statistics.steps - (limit - 1) in (0, 1)
    assert statistics.accepted_drafts <= statistics.offered_drafts <= drafts * statistics.steps


def test_acceptance_of_a_short_run_is_that_of_its_tokens(model):
    """Two new tokens are the prefill's and one more: one draft token was verified, whatever their number."""
    model = ending_with(model)
    for drafts in range(1, DRAFTS + 1):
        statistics = generate(model, drafts=drafts, max_new_tokens=2).statistics
        assert statistics.steps == statistics.offered_drafts == 1
        assert statistics.acceptance_rate in (0, 1)


@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
@pytest.mark.parametrize("position", [0, 1, 2, 5, 6, 11])
def test_statistics_of_a_run_with_an_end_token_end_with_the_text(model, mode, position):
    options = {"mode": mode, "drafts": DRAFTS, "max_new_tokens": 20}
    endless = generate(ending_with(model), **options).token_ids
    end = endless[position]
    ended = generate(ending_with(model, end), **options)
    assert ended.token_ids == endless[: endless.index(end)]
    statistics = ended.statistics
    assert statistics.new_tokens == len(ended.token_ids)
    # Of all tokens but the prefill's; the end token, which the text leaves out, may be a draft token.
    decoded = endless.index(end)
    assert statistics.accepted_drafts <= statistics.offered_drafts <= DRAFTS * statistics.steps
    assert statistics.accepted_drafts + statistics.steps - decoded in (0, 1)
    if mode == "standard":
        assert statistics.steps == decoded


def test_records_of_decode_add_up_to_the_limit(model):
    decoder = Decoder(model.packed, "alternate", DRAFTS, capacity=60)
    records = list(decoder.decode([5, 6, 7], max_new_tokens=12))
    assert (records[0].drafted, records[0].accepted, len(records[0].tokens)) == (0, 0, 1)
    assert [len(step.tokens) for step in records[1:]] == [5, 5, 1]
    assert [step.accepted for step in records[1:]] == [4, 4, 1]
    assert all(step.seconds > 0 for step in records)


def test_decode_without_a_limit_fills_the_capacity(model):
    decoder = Decoder(model.packed, "verify", 2, capacity=30)
    tokens = [token for step in decoder.decode([5, 6, 7]) for token in step.tokens]
    assert len(tokens) == 30 - 3
    assert tokens == list(Decoder(model.packed, "verify", 2, capacity=30).stream([5, 6, 7]))


def test_figures_of_a_generation_are_shown_line_by_line():
    counts = {"prompt_tokens": 10, "new_tokens": 21, "steps": 12, "offered_drafts": 10, "accepted_drafts": 8}
    sizes = {"prefill_seconds": 0.5, "decode_seconds": 2.0, "weight_bytes": 10**8, "read_bytes": 4 * 10**9}
    statistics = Statistics("verify", 1, seed=7, **counts, **sizes)
    assert figures(statistics, read_bandwidth=8e9).splitlines() == [
        "prefill         10 tokens    0.500 s      20.0 tokens/s",
        "decode          20 tokens    2.000 s      10.0 tokens/s  (verify)",
        "acceptance   80.0% of 10 draft tokens",
        "base steps      12 for 20 tokens: 8 saved",
        "weights      100.0 MB, read at 2.0 GB/s: 25% of this machine's 8.0 GB/s",
        "seed        7",
    ]
