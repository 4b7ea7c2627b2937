"""Greedy verify mode gives the tokens of standard mode in every format, batch, thread count and number of drafts."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, write_base, write_module

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.weights.pack import PackedModel, pack_model

NEW_TOKENS = 40
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def model(architecture: str, seed: int, dtype: str, draft_vocab: int, module_dtype: str | None = None) -> PackedModel:
    folder = Path(FOLDER.name, f"{architecture}-{seed}-{draft_vocab}")
    base = write_base(folder / "base", architecture, seed, n_layers=1 + seed % 2)
    module = write_module(folder / "module", base, draft_vocab_size=draft_vocab, like_base=seed % 3 > 0)
    return pack_model(base, module, dtype, module_dtype)


def decode(packed, mode, drafts, prompts, cache_dtype, changes=()) -> tuple[list[list[int]], int]:
    """Decodes all prompts as one batch: the new tokens of each prompt, and the accepted draft tokens of all.

    changes: numbers of draft tokens that the steps are set to, in turn.
    """
    changes = itertools.cycle(changes)
    decoder = Decoder(packed, mode, drafts, batch=len(prompts), capacity=100, cache_dtype=cache_dtype)
    out = [[decoder.prefill(prompt, b)] for b, prompt in enumerate(prompts)]
    accepted = 0
    while any(len(tokens) < NEW_TOKENS for tokens in out):
        if (changed := next(changes, None)) is not None:
            decoder.set_num_draft_tokens(changed)
        tokens, counts, *_ = decoder.step()
        for b, count in enumerate(counts.tolist()):
            out[b] += tokens[b, :count].tolist()
            accepted += max(count - 1, 0)
            if len(out[b]) >= NEW_TOKENS:
                decoder.release(b)
    return [tokens[:NEW_TOKENS] for tokens in out], accepted


@settings(max_examples=60)
@given(
    architecture=st.sampled_from(list(ARCHITECTURES)),
    seed=st.integers(0, 5),
    dtype=st.sampled_from(list(DTYPES)),
    module_dtype=st.sampled_from([None, *DTYPES]),
    draft_vocab=st.sampled_from([0, 50]),
    prompts=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=30), min_size=1, max_size=4),
    drafts=st.integers(1, 4),
    threads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cache_dtype=st.sampled_from(list(CACHE_DTYPES.values())),
)
def test_verify_greedy_equals_standard(
    architecture, seed, dtype, module_dtype, draft_vocab, prompts, drafts, threads, cache_dtype
):
    packed = model(architecture, seed, dtype, draft_vocab, module_dtype)
    _C.set_n_threads(threads[0])
    expected = [decode(packed, "standard", 1, [prompt], cache_dtype)[0][0] for prompt in prompts]
    _C.set_n_threads(threads[1])
    given, _ = decode(packed, "verify", drafts, prompts, cache_dtype)
    assert given == expected


@settings(max_examples=20)
@given(
    seed=st.integers(0, 5),
    dtype=st.sampled_from(list(DTYPES)),
    draft_vocab=st.sampled_from([0, 50]),
    prompts=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=30), min_size=1, max_size=3),
    changes=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    cache_dtype=st.sampled_from(list(CACHE_DTYPES.values())),
)
@pytest.mark.parametrize("name", _C.runnable_isas())
def test_verify_with_changing_num_draft_tokens_equals_standard(
    name, seed, dtype, draft_vocab, prompts, changes, cache_dtype
):
    packed = model("llama", seed, dtype, draft_vocab)
    _C.force_isa(name)
    try:
        expected = [decode(packed, "standard", 1, [p], cache_dtype)[0][0] for p in prompts]
        given, _ = decode(packed, "verify", 4, prompts, cache_dtype, changes)
    finally:
        _C.force_isa(None)
    assert given == expected


def test_models_of_these_tests_accept_some_draft_tokens_and_not_all():
    """Otherwise the tests above would hold whatever verify mode does; and alternate mode gives other tokens."""
    prompts = [[seed, 40, 7] for seed in range(4)]
    accepted = offered = 0
    differs = False
    for seed in range(6):
        packed = model("llama", seed, "f32", 0)
        tokens, right = decode(packed, "verify", 1, prompts, torch.float32)
        accepted += right
        offered += sum(map(len, tokens)) - right
        differs |= decode(packed, "alternate", 1, prompts, torch.float32)[0] != tokens
    assert 0.02 < accepted / offered < 0.98
    assert differs


def test_sequences_that_join_and_leave_do_not_disturb_the_others():
    packed = model("llama", 1, "bf16", 0)
    prompts = [[3, 1, 4], [15, 9, 2, 6], [5, 3, 5, 8, 97]]
    alone = [decode(packed, "verify", 2, [p], torch.bfloat16)[0][0] for p in prompts]
    decoder = Decoder(packed, "verify", 2, batch=2, capacity=100)
    out = {0: [decoder.prefill(prompts[0], 0)]}
    slots = {0: 0}
    for step in range(60):
        if step == 5:
            out[1], slots[1] = [decoder.prefill(prompts[1], 1)], 1
        if step == 45:
            decoder.release(0)
            out[2], slots[0] = [decoder.prefill(prompts[2], 0)], 2
        tokens, counts, *_ = decoder.step()
        for slot, sequence in slots.items():
            out[sequence] += tokens[slot, : counts[slot]].tolist()
    for sequence, tokens in out.items():
        length = min(len(tokens), NEW_TOKENS)
        assert length > 10
        assert tokens[:length] == alone[sequence][:length]
