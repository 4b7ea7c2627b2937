"""Decode steps give the same result with every instruction set that this build has and this processor runs.

The vector instruction sets (avx2, avx512) add in the same order with the same fused operations: bit for bit the same.
The generic code has no fused multiply-add, so its results are those of the others up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from formats import columns, random_matrix
from models import write_base, write_module
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.reference.ops import from_rows
from recycle_ext.weights.layout import FORMATS
from recycle_ext.weights.pack import PackedModel, pack_model

VECTOR_SETS = [name for name in _C.runnable_isas() if name != "generic"]
PROMPTS = ([5, 17, 3, 99, 42, 7], list(range(70)))  # the second takes two passes of 64 rows
STEPS = 12
DRAFTS = 3
CAPACITY = 130

two_vector_sets = pytest.mark.skipif(
    len(VECTOR_SETS) < 2,
    reason="a comparison of AVX2 with AVX-512 needs a processor (and a build) with both: this one runs "
    f"{', '.join(_C.runnable_isas())}",
)


@dataclass
class Record:
    """All that decode steps left behind."""

    tokens: list[list[int]] = field(default_factory=list)  # of each step, all sequences
    states: list[Tensor] = field(default_factory=list)  # pending, lengths, draft_probs, caches


@pytest.fixture(scope="module", params=DTYPES)
def packed(request, tmp_path_factory) -> PackedModel:
    folder = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base", "qwen3", hidden_size=96)  # three blocks of 32: an odd number
    module = write_module(folder / "module", base, like_base=True, draft_vocab_size=37)
    return pack_model(base, module, request.param)


def decode(packed: PackedModel, name: str, cache: str, mode: str, temperature: float) -> Record:
    """Prefill and steps of two sequences with the instruction set ``name``."""
    _C.force_isa(name)
    try:
        decoder = Decoder(
            packed,
            mode,
            DRAFTS,
            batch=len(PROMPTS),
            capacity=CAPACITY,
            temperature=temperature,
            seeds=range(len(PROMPTS)),
            cache_dtype=CACHE_DTYPES[cache],
        )
        record = Record([[decoder.prefill(prompt, b) for b, prompt in enumerate(PROMPTS)]])
        record.tokens += [decoder.step().tokens.flatten().tolist() for _ in range(STEPS)]
    finally:
        _C.force_isa(None)
    record.states = [decoder.pending, decoder.lengths, decoder.draft_probs]
    record.states += [decoder.base_cache, decoder.module_cache]
    return record


def bits(tensor: Tensor) -> Tensor:
    """The bytes: equal also where a NaN is, and different where zeros have other signs."""
    return tensor.contiguous().flatten().view(torch.uint8)


MODES = [("standard", 0.0), ("verify", 0.0), ("verify", 1.2), ("alternate", 0.0)]


@two_vector_sets
@pytest.mark.parametrize(("mode", "temperature"), MODES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_steps_with_avx2_and_avx512_have_the_same_bits(packed, cache, mode, temperature):
    first, *others = (decode(packed, name, cache, mode, temperature) for name in VECTOR_SETS)
    for other in others:
        assert first.tokens == other.tokens
        for ours, theirs in zip(first.states, other.states, strict=True):
            assert torch.equal(bits(ours), bits(theirs))


@two_vector_sets
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_recycle_head_with_avx2_and_avx512_has_the_same_bits(format, rows):
    """Every format, also those that no dtype gives the base model of the steps above."""
    generator = torch.Generator().manual_seed(rows)
    k = columns(format, 96)
    hidden = torch.randn(rows, k, generator=generator)
    matrix, _ = random_matrix(format, 500, k, generator)
    seeds = torch.arange(rows)
    for temperature in (0.0, 1.0):
        sampling = (temperature, 40, 0.95, seeds)
        results = []
        for name in VECTOR_SETS:
            _C.force_isa(name)
            results.append(
                torch.ops.recycle.recycle_head(
                    hidden, torch.ones(k), 1e-5, matrix, FORMATS[format], 500, seeds, *sampling
                )
            )
        _C.force_isa(None)
        for tokens, log_probs in results[1:]:
            assert torch.equal(tokens, results[0][0])
            assert torch.equal(bits(log_probs), bits(results[0][1]))


def test_comparison_of_bits_can_fail(packed):
    """What the comparisons above hold against each other differs where the arithmetic does."""
    one = decode(packed, _C.runnable_isas()[-1], "f32", "verify", 0.0)
    again = decode(packed, _C.runnable_isas()[-1], "f32", "verify", 0.0)
    other = decode(packed, "generic", "f32", "verify", 0.0)
    caches = [record.states[3] for record in (one, again, other)]
    assert torch.equal(bits(caches[0]), bits(caches[1]))
    if VECTOR_SETS:
        assert not torch.equal(bits(caches[0]), bits(caches[2]))


@pytest.mark.skipif(not VECTOR_SETS, reason="this processor or build has the generic code alone")
@pytest.mark.parametrize(("mode", "temperature"), MODES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_steps_with_generic_code_give_the_tokens_of_vector_code(packed, cache, mode, temperature):
    generic = decode(packed, "generic", cache, mode, temperature)
    for name in VECTOR_SETS:
        vector = decode(packed, name, cache, mode, temperature)
        assert generic.tokens == vector.tokens
        for one, other in zip(generic.states[:2], vector.states[:2], strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(generic.states[2], vector.states[2], rtol=0, atol=1e-3)
        # Sums on both sides of a tie round to neighbours: of the cache's dtype, and in a quantized matmul of the
        # activations, which are multiples of 1/32767 of the largest in their block.
        is_quantized = packed.formats.startswith("q")
        step = {"f32": 8 / 32767 if is_quantized else 1e-5, "bf16": 2**-7, "q8": 1 / 127}[cache]
        for one, other in zip(generic.states[3:], vector.states[3:], strict=True):
            if one.numel():
                one, other = (from_rows(held, torch.float32) for held in (one, other))
                largest = one.abs().amax(-1, keepdim=True)
                assert ((one - other).abs() <= step * largest * 1.01 + 1e-6).all()


def test_instruction_set_of_another_processor_is_refused():
    before = _C.isa()
    with pytest.raises(ValueError, match="instruction set sve is not in this build"):
        _C.force_isa("sve")
    assert _C.isa() == before == _C.runnable_isas()[-1]
