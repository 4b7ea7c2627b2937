"""The runners of python -m recycle_ext.bench: jobs, the counts of one measurement, and the choice of peers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_model import jobs_of, request, write_model

from recycle_ext.bench.peers import LlamaCpp, open_system
from recycle_ext.bench.runners import Job, Runner, growth, jobs
from recycle_ext.bench.story import part
from recycle_ext.bench.systems import Decoded, Ours, count_draft_tokens
from recycle_ext.bench.worker import decode_figures
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.decoding.step import Step


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("bench") / "base")


# ---- Jobs --------------------------------------------------------------------------------------------


def test_sequences_of_a_batch_differ_and_wrap_around_the_story(model):
    (job,) = jobs_of(model, modes=["standard"], batches=[3])
    assert [len(ids) for ids in job.sequences] == [5, 6, 7]
    assert len({tuple(ids[:5]) for ids in job.sequences}) == 3
    assert job.prompt[:5] == job.sequences[0]
    assert part([1, 2, 3], 2, 5) == [3, 1, 2, 3, 1]


def test_job_through_json_is_unchanged(model):
    for job in jobs_of(model):
        assert Job.from_dict(json.loads(json.dumps(job.as_dict()))) == job


def test_drafts_auto_is_for_verify_alone(model):
    assert [job.runner.drafts for job in jobs_of(model, drafts="auto")] == [0, "auto", 1]


# ---- The counts of one measurement -------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
def test_decode_counts_equal_those_of_a_plain_loop_over_the_op(model, mode, batch, drafts):
    (job,) = jobs_of(model, modes=[mode], batches=[batch], drafts=drafts, new_tokens=25)
    system = Ours(job)
    decoder = system._prefilled(25)
    num_draft_tokens = decoder.num_draft_tokens
    left, steps, verified, accepted = 25 * batch, 0, 0, 0
    while left:
        _, counts = torch.ops.recycle.decode_step(*decoder.arguments())
        steps += 1
        for count in counts.tolist():  # a draft token whose place is past the end does not count
            verified += min(num_draft_tokens, left)
            accepted += min(count - 1, left)
            left -= min(count, left)
    decoded = system.decode(25)
    assert (decoded.steps, decoded.tokens) == (steps, 25 * batch)
    assert decoded.acceptance_rate == (accepted / verified if verified else None)
    assert (accepted == verified) == (mode != "verify")


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (100, (8, 4)),
        (9, (8, 4)),
        (8, (7, 4)),
        (7, (6, 4)),
        (6, (5, 4)),
        (5, (4, 3)),
        (4, (3, 3)),
        (3, (2, 2)),
        (0, (0, 0)),
    ],
)
def test_draft_tokens_past_the_end_are_not_counted(max_tokens, expected):
    """Two sequences and two steps of two draft tokens each: counts 3 and 2, then 2 and 1."""
    first = Step(torch.tensor([[4, 5, 7], [4, 7, -1]]), torch.tensor([3, 2]), 2, 0.1)
    second = Step(torch.tensor([[4, 7, -1], [7, -1, -1]]), torch.tensor([2, 1]), 2, 0.1)
    assert count_draft_tokens([first, second], max_tokens) == expected


def test_draft_tokens_of_an_idle_sequence_are_not_counted():
    step = Step(torch.tensor([[4, 7], [-1, -1]]), torch.tensor([2, 0]), 1, 0.1)
    assert count_draft_tokens([step], 100) == (1, 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_of_all_sequences_count(model, batch):
    standard, verify, alternate = (Ours(job) for job in jobs_of(model, batches=[batch]))
    decoded = standard.decode(6)
    assert (decoded.steps, decoded.tokens) == (6, 6 * batch)
    assert decoded.acceptance_rate is None
    decoded = alternate.decode(6)
    assert (decoded.steps, decoded.tokens) == (3, 6 * batch)
    assert decoded.acceptance_rate == 1
    decoded = verify.decode(6)
    assert decoded.tokens == 6 * batch
    assert 3 <= decoded.steps <= 6


def test_cache_bytes_are_those_of_the_positions_read(model):
    standard, _, alternate = jobs_of(model, batches=[2])
    assert [len(ids) for ids in standard.sequences] == [5, 6]
    position = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head_dim, bytes
    positions = (5 + 3) + (6 + 3)  # in the middle of six steps
    assert standard.cache_values * 2 == position
    assert Ours(standard).decode(6).cache_bytes == positions * position
    # The module's one layer is half of the base model's two.
    assert Ours(alternate).decode(6).cache_bytes == positions * position * 1.5
    in_8_bits = dataclasses.replace(standard, cache_dtype="q8")
    # A head's 16 values in a byte each, and a scale of four.
    assert Ours(in_8_bits).decode(6).cache_bytes == positions * position * 20 / 32


def test_fastest_growth_fills_the_capacity_to_the_last_position(model):
    """Four draft tokens that are all accepted are the fastest growth of a sequence."""
    for batch in (1, 3):
        (job,) = jobs_of(model, modes=["alternate"], drafts=4, batches=[batch])
        system = Ours(job)
        decoder = system._prefilled(6)
        decoded = system._run(decoder, 6)
        grown = (decoder.lengths[0] - torch.tensor([len(ids) for ids in job.sequences])).tolist()
        assert grown == [5 * decoded.steps] * batch
        assert max(grown) == growth(6, batch, 4) or batch > 1
        assert max(grown) <= growth(6, batch, 4)
        assert decoded.tokens == 6 * batch


def test_drafts_auto_counts_the_bytes_and_draft_tokens_of_its_steps(model):
    _, job, _ = jobs_of(model, drafts="auto")
    system = Ours(job)
    decoder = system._prefilled(60)
    steps, step = [], decoder.step
    decoder.step = lambda: steps.append(step()) or steps[-1]
    decoded = system._run(decoder, 60)
    assert (decoded.steps, decoded.tokens) == (len(steps), 60)
    drafts = sum(step.drafted for step in steps) / len(steps)
    assert 0 < drafts <= 4
    expected = system.standard_step_bytes + drafts * system._model.packed.module_bytes
    assert decoded.step_bytes == pytest.approx(expected)
    left, verified, accepted = 60, 0, 0
    for step in steps:
        verified += min(step.drafted, left)
        accepted += min(int(step.counts[0]) - 1, left)
        left -= int(step.counts[0])
    assert left <= 0
    assert decoded.acceptance_rate == accepted / verified


# ---- Peers -------------------------------------------------------------------------------------------


def test_torch_compile_writes_the_tokens_of_transformers(model):
    pytest.importorskip("transformers", reason="the extra `test` brings it")
    prompt = list(range(5, 25))
    written = {}
    for system in ("transformers", "torch.compile"):
        runner = Runner(system, "standard", "bf16", 1, 1, 0)
        peer = open_system(Job(runner, str(model), None, prompt, [prompt], 6, 1))
        tokens = []

        def note(logits, tokens=tokens):
            tokens.append(int(logits[0, -1].argmax()))
            return logits

        peer._model.lm_head.register_forward_hook(lambda _, __, logits: note(logits))
        assert peer.decode(6).tokens == 6
        written[system] = tokens
    assert len(written["transformers"]) == 7
    assert written["torch.compile"] == written["transformers"]


def test_peer_that_is_not_installed_is_left_out(model, monkeypatch):
    for package in ("llama_cpp", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    notes = []
    found = jobs_of(model, notes, peers=["transformers", "llama.cpp"])
    assert [job.runner.system for job in found] == ["recycle_ext"] * 3
    assert len(notes) == 2
    assert "transformers is left out: it is not installed; `pip install transformers" in notes[0]
    assert "llama.cpp is left out: it is not installed; `pip install llama-cpp-python`" in notes[1]


def test_peer_that_does_not_fit_the_model_is_left_out(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    notes = []
    jobs_of(model, notes, peers=["llama.cpp", "transformers"], dtypes=["q8"])
    assert "llama.cpp is left out: it needs a GGUF file" in notes[0]
    assert "transformers is left out: it runs in bf16" in notes[1]


def test_llama_cpp_prefills_and_decodes(default_model):
    pytest.importorskip("llama_cpp", reason="the extra `bench` brings it")
    (job,) = (
        job
        for job in jobs(
            request(dtypes=["native"], modes=["standard"], threads=[1], peers=["llama.cpp"]),
            open_checkpoint(default_model),
            None,
            default_model.parent,
            print,
        )
        if job.runner.system == "llama.cpp"
    )
    system = open_system(job)
    assert isinstance(system, LlamaCpp)
    assert system.prefill(job.prompt) > 0
    decoded = system.decode(4)
    assert (decoded.steps, decoded.tokens) == (4, 4)
    assert 0.9 * default_model.stat().st_size < system.step_bytes < default_model.stat().st_size


@pytest.mark.parametrize(("step_bytes", "read"), [(None, 4 * (1000 + 500)), (700.0, 4 * (700 + 500))])
def test_figures_of_a_decoding_count_weights_and_cache_of_every_step(step_bytes, read):
    decoded = Decoded(2.0, steps=4, tokens=6, cache_bytes=500.0, step_bytes=step_bytes, acceptance_rate=0.5)
    assert decode_figures(decoded, SimpleNamespace(step_bytes=1000), bandwidth=5000.0) == {
        "tokens": 6,
        "steps": 4,
        "tokens_per_second": 3.0,
        "gigabytes_per_second": read / 2 / 1e9,
        "read_bandwidth_gigabytes_per_second": 5e-6,
        "roofline_fraction": read / 2 / 5000,
        "acceptance_rate": 0.5,
    }
