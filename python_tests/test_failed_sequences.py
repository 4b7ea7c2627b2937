"""Sequences of a batch that fail: a code in counts, their state as before, and the other sequences as without them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import write_base, write_module

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.step import Step
from recycle_ext.errors import RecycleError
from recycle_ext.weights.layout import PANEL_ROWS
from recycle_ext.weights.pack import PackedModel, pack_model
from recycle_ext.weights.plan import read_plan

PROMPTS = ([5, 17, 3, 99], [42, 7], [8, 8, 1])
MODES = [("standard", 1, 0.0), ("verify", 1, 0.0), ("verify", 3, 0.0), ("verify", 3, 1.2), ("alternate", 2, 0.0)]
NAN = float("nan")

every_mode = pytest.mark.parametrize(("mode", "drafts", "temperature"), MODES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedModel:
    folder = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base", tied=False, vocab_size=997)
    return pack_model(base, write_module(folder / "module", base, like_base=True, draft_vocab_size=600), "f32")


def decoder_of(packed, mode, drafts, temperature, capacity=60) -> Decoder:
    decoder = Decoder(
        packed, mode, drafts, batch=len(PROMPTS), capacity=capacity, temperature=temperature, seeds=range(len(PROMPTS))
    )
    for sequence, prompt in enumerate(PROMPTS):
        decoder.prefill(prompt, sequence)
    return decoder


def state_of(decoder: Decoder, sequence: int) -> list[torch.Tensor]:
    """All that a later step of the sequence depends on, besides its caches up to its lengths."""
    return [t.clone() for t in (decoder.pending[sequence], decoder.lengths[:, sequence], decoder.draft_probs[sequence])]


def assert_others_unharmed(expected: Decoder, given: Decoder, expected_step: Step, step: Step, failed: int) -> None:
    """All sequences but ``failed`` have the bits of a batch in which nothing fails."""
    for sequence in range(len(PROMPTS)):
        if sequence != failed:
            assert step.counts[sequence] == expected_step.counts[sequence] > 0
            assert torch.equal(step.tokens[sequence], expected_step.tokens[sequence])
            for one, other in zip(state_of(given, sequence), state_of(expected, sequence), strict=True):
                assert torch.equal(one, other)
            for name in ("base_cache", "module_cache"):
                one, other = (getattr(decoder, name) for decoder in (given, expected))
                if one.numel():
                    assert torch.equal(one[:, :, sequence], other[:, :, sequence])


@every_mode
@pytest.mark.parametrize("failed", range(len(PROMPTS)))
def test_sequence_with_a_nan_fails_alone(packed, isa, mode, drafts, temperature, failed):
    expected, given = (decoder_of(packed, mode, drafts, temperature) for _ in range(2))
    for decoder in (expected, given):
        decoder.step()
    before = state_of(given, failed)
    given.base_cache[0, 1, failed, 0, 1] = NAN
    for _ in range(2):
        expected_step, step = expected.step(), given.step()
        assert step.counts[failed] == -1
        assert (step.tokens[failed] == -1).all()
        for one, other in zip(state_of(given, failed), before, strict=True):
            assert torch.equal(one, other)
        assert_others_unharmed(expected, given, expected_step, step, failed)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("failed", range(len(PROMPTS)))
def test_sequence_whose_second_draft_is_nan_fails_alone(packed, temperature, failed):
    """The base model has chosen, and the first draft token is made: nothing of them may stay."""
    expected = decoder_of(packed, "verify", 3, temperature)
    expected_step = expected.step()
    # Only the module's second pass reads the embedding of the first draft token.
    nonfinite = dataclasses.replace(packed, weights=packed.weights.clone())
    embedding = read_plan(nonfinite.weights, nonfinite.plan).embedding
    token = int(expected.pending[failed, 1])
    given = decoder_of(nonfinite, "verify", 3, temperature)
    assert token not in given.pending and token not in expected_step.tokens
    assert token not in torch.cat((expected.pending[:failed], expected.pending[failed + 1 :]))
    panel, lane = divmod(token, PANEL_ROWS)
    embedding.panels()[panel].view(torch.float32).view(embedding.k, PANEL_ROWS)[:, lane] = NAN
    before = state_of(given, failed)
    step = given.step()
    assert step.counts[failed] == -1
    for one, other in zip(state_of(given, failed), before, strict=True):
        assert torch.equal(one, other)
    assert_others_unharmed(expected, given, expected_step, step, failed)


@every_mode
def test_full_sequence_fails_alone(packed, mode, drafts, temperature):
    expected, given = (decoder_of(packed, mode, drafts, temperature) for _ in range(2))
    given.lengths[0, 1] = given.base_cache.shape[4] - (2 * given.num_draft_tokens or 1) + 1
    before = state_of(given, 1)
    expected_step, step = expected.step(), given.step()
    assert step.counts[1] == -2
    assert (step.tokens[1] == -1).all()
    for one, other in zip(state_of(given, 1), before, strict=True):
        assert torch.equal(one, other)
    assert_others_unharmed(expected, given, expected_step, step, 1)


def test_batch_of_failed_sequences_alone_returns_their_codes(packed):
    decoder = decoder_of(packed, "verify", 2, 0.0)
    decoder.release(2)
    decoder.base_cache[0, 1, 0, 0, 0] = NAN
    decoder.lengths[0, 1] = decoder.base_cache.shape[4]
    assert decoder.step().counts.tolist() == [-1, -2, 0]


def test_step_says_why_a_sequence_failed():
    tokens = torch.tensor([[7, 8], [-1, -1], [-1, -1], [-1, -1], [-1, -1]])
    step = Step(tokens, torch.tensor([2, -1, -2, -3, 0]), 1, 0.5)
    reasons = [step.failure(sequence) for sequence in range(5)]
    assert reasons[0] is reasons[4] is None
    for reason, text in zip(reasons[1:4], ("NaN or infinite", "no room", "outside of the vocabulary"), strict=True):
        assert text in reason
    assert reasons[2].startswith("decode_step, sequence 2: ")
    assert step.sequence(0).tokens == [7, 8]
    for sequence in (1, 2, 3):
        with pytest.raises(RecycleError, match=f"sequence {sequence}: "):
            step.sequence(sequence)
    with pytest.raises(RecycleError, match="sequence 1: a logit is NaN or infinite"):
        step.check()


def test_decode_of_a_failed_sequence_raises_with_its_position(packed):
    decoder = Decoder(packed, "standard", capacity=60)
    records = decoder.decode(PROMPTS[0])
    next(records), next(records)
    decoder.base_cache[0, 1, 0, 0, 2] = NAN
    with pytest.raises(RecycleError, match=r"sequence 0: a logit is NaN or infinite \(position 5, or"):
        next(records)


@pytest.mark.parametrize("part", ["base", "module"])
def test_prefill_with_a_nan_leaves_its_sequence_idle(packed, part):
    """The sequence's former text is gone from the caches, so its former lengths must not stay."""
    nonfinite = dataclasses.replace(packed, weights=packed.weights.clone())
    decoder = decoder_of(nonfinite, "verify", 2, 0.0, capacity=100)
    other = state_of(decoder, 0)
    view = read_plan(nonfinite.weights, nonfinite.plan)
    (view.final_norm if part == "base" else view.module.output_norm)[0] = NAN
    with pytest.raises(RuntimeError, match=r"NaN or infinite \(sequence 1, position 69\)"):
        decoder.prefill([3] * 70, 1)
    assert (decoder.pending[1] == -1).all()
    assert decoder.lengths[:, 1].tolist() == [0, 0]
    assert decoder.step().counts[1] == 0
    for one, unharmed in zip(state_of(decoder, 0), other, strict=True):
        assert torch.equal(one, unharmed)
