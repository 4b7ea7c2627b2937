"""Decoder(drafts="auto"): the decoder follows the policy, reports each step to it, and keeps the text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import write_base, write_module

from recycle_ext.decoding import decoder as decoder_module
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights.pack import PackedModel, pack_model

PROMPT = [5, 17, 3, 99, 42, 7]
CHOICES = [0, 0, 1, 3, 3, 0, 4, 2, 2, 2, 1, 0, 1]


class Script:
    """A policy with given choices."""

    def __init__(self, choices) -> None:
        self.choices = itertools.cycle(choices)
        self.next = next(self.choices)
        self.seen = []

    def choose(self) -> int:
        return self.next

    def observe(self, k, accepted, seconds) -> None:
        self.seen.append((k, accepted, seconds))
        self.next = next(self.choices)


@pytest.fixture
def packed(tmp_path) -> PackedModel:
    base = write_base(tmp_path / "base", n_layers=1)
    return pack_model(base, write_module(tmp_path / "module", base, like_base=True), "f32")


def standard(packed, n) -> list[int]:
    return list(Decoder(packed, "standard", capacity=len(PROMPT) + n).stream(PROMPT))


def test_decoder_follows_the_policy_and_reports_each_step(packed, monkeypatch):
    clock = itertools.count(100)
    monkeypatch.setattr(decoder_module.time, "perf_counter", lambda: next(clock))
    decoder = Decoder(packed, drafts="auto", batch=3, capacity=100)
    decoder.policy = script = Script(CHOICES)
    decoder.prefill(PROMPT, 0)
    decoder.prefill([1, 2], 2)
    for k in CHOICES:
        tokens, counts, *_ = decoder.step()
        assert tokens.shape == (3, k + 1)
        assert script.seen[-1] == (k, [int(counts[0]) - 1, int(counts[2]) - 1], 1)


def test_auto_drafts_equal_standard(packed):
    expected = standard(packed, 300)
    for _ in range(2):
        decoder = Decoder(packed, drafts="auto", capacity=len(PROMPT) + 300)
        assert list(decoder.stream(PROMPT)) == expected
    (history,) = packed.shared.values()
    assert history.costs()[1] < math.inf
    assert history.acceptance.shares[0] != pytest.approx(0.4)


def test_history_is_shared_by_batch_and_greediness(packed):
    decoders = [
        Decoder(packed, drafts="auto", batch=batch, temperature=temperature)
        for batch, temperature in ((1, 0), (1, 1), (2, 0), (1, 0))
    ]
    shared = [decoder.policy._history for decoder in decoders]
    assert shared[0] is shared[3]
    assert len({id(history) for history in shared}) == 3


def test_prefill_without_draft_tokens_fills_the_module_cache(packed):
    decoder = Decoder(packed, drafts="auto", capacity=100)
    decoder.policy = Script([0])
    decoder.set_num_draft_tokens(0)
    decoder.prefill(PROMPT)
    assert decoder.num_draft_tokens == 0
    assert decoder.lengths.tolist() == [[len(PROMPT)], [len(PROMPT)]]
    assert decoder.module_cache[:, :, 0, :, : len(PROMPT)].any()


class OnCpu:
    """GraphedStep on the CPU: start() runs the step, read() returns its results."""

    def __init__(self, arguments) -> None:
        self.arguments = arguments
        self.results = []
        self.seconds = 0.0

    @property
    def n_started(self) -> int:
        return len(self.results)

    def start(self) -> None:
        self.results.append(torch.ops.recycle.decode_step(*self.arguments))
        assert len(self.results) <= 2

    def read(self):
        return self.results.pop(0)

    def forget(self, sequence) -> None:
        self.results.clear()


def test_started_steps_are_read_before_k_changes(packed, monkeypatch):
    monkeypatch.setattr(decoder_module, "GraphedStep", OnCpu)
    expected = standard(packed, 200)
    decoder = Decoder(packed, drafts="auto", capacity=len(PROMPT) + 200)
    decoder._on_gpu = True
    decoder.policy = script = Script([0] * 3 + [2] * 4 + [1] * 5 + [0, 4, 4, 4])
    assert list(decoder.stream(PROMPT)) == expected
    ks = [k for k, _, _ in script.seen]
    assert set(ks) == {0, 1, 2, 4}
    assert len(decoder._graphs) == 4
    # A step that was started before the policy changed k has the old k.
    assert ks[:8] == [0, 0, 0, 0, 2, 2, 2, 2]


def test_prefill_beside_a_running_sequence_keeps_its_text(packed, monkeypatch):
    monkeypatch.setattr(decoder_module, "GraphedStep", OnCpu)
    expected = standard(packed, 60)
    decoder = Decoder(packed, drafts="auto", batch=2, capacity=len(PROMPT) + 60)
    decoder._on_gpu = True
    decoder.policy = Script([0, 0, 3, 0, 1])
    out = [decoder.prefill(PROMPT, 0)]
    for step in range(15):
        if step == 4:
            decoder.prefill([1, 2, 3], 1)
        tokens, counts, *_ = decoder.step()
        out += tokens[0, : counts[0]].tolist()
    assert out == expected[: len(out)]
