"""The CUDA kernels without a GPU: the same sources, compiled as C++ and run one block at a time.

cuda_emulation/emulation.h says how. The tests compare what the kernels compute with the CPU's kernels. Speed and
nvcc's code need a GPU: test_gpu.py, python -m recycle_ext.bench --device cuda.
"""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from cuda_emulation.builds import COMPILER
from cuda_emulation.cases import CACHE_TYPES
from cuda_emulation.library import Emulated, build_library, lm_head
from formats import columns, in_formats, random_matrix
from models import ARCHITECTURES, write_base, write_module
from tolerance import assert_as_good_as

from recycle_ext.bench.random_model import SHAPES, random_model
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights.layout import FORMATS, pack_matrix
from recycle_ext.weights.pack import pack_model
from recycle_ext.weights.plan import read_plan

PROMPT = [5, 17, 3, 99, 42, 7]

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="compiles the CUDA kernels as C++, and there is no C++ compiler"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build_library(tmp_path_factory.mktemp("emulation"))


def compare(library, decoder, steps, changes=()) -> int:
    """Steps a decoder and its emulated copy side by side; returns the number of accepted draft tokens.

    changes: the number of draft tokens of each step, repeated.
    """
    emulated = Emulated(library, decoder)
    accepted = 0
    for i in range(steps):
        if changes:
            decoder.set_num_draft_tokens(changes[i % len(changes)])
            emulated.copy_pending(decoder)
        step = decoder.step()
        tokens, counts = emulated.step()
        assert torch.equal(tokens, step.tokens)
        assert torch.equal(counts, step.counts)
        assert torch.equal(emulated.pending, decoder.pending)
        assert torch.equal(emulated.lengths, decoder.lengths)
        accepted += int((counts - 1).clamp_min(0).sum())
    for b, length in enumerate(decoder.lengths[0].tolist()):
        torch.testing.assert_close(
            emulated.base_cache[:, :, b, :, :length].float(),
            decoder.base_cache[:, :, b, :, :length].float(),
            rtol=2**-7,  # CPU and GPU may round to different neighbours in bfloat16
            atol=1e-4,
        )
    return accepted


def decoder_of(packed, mode="standard", drafts=1, cache_dtype=torch.bfloat16, prompts=(PROMPT,), **sampling) -> Decoder:
    """A decoder after the prefill of `prompts`; an empty prompt leaves its sequence idle."""
    decoder = Decoder(packed, mode, drafts, len(prompts), capacity=400, cache_dtype=cache_dtype, **sampling)
    for sequence, prompt in enumerate(prompts):
        if prompt:
            decoder.prefill(prompt, sequence)
    return decoder


@pytest.mark.parametrize("cache_dtype", CACHE_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_standard_step_of_every_architecture_equals_cpu(tmp_path, library, architecture, cache_dtype):
    packed = pack_model(write_base(tmp_path, architecture), None, "bf16")
    compare(library, decoder_of(packed, cache_dtype=cache_dtype), 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 17, 32), (2, 33, 96), (3, 47, 256), (5, 5, 768), (8, 16, 2304)])
def test_head_of_every_format_is_as_exact_as_pytorch(library, format, rows, n, k):
    generator = torch.Generator().manual_seed(rows)
    packed, matrix = random_matrix(format, n, columns(format, k), generator)
    x = torch.randn(rows, matrix.shape[1], generator=generator)
    ours = lm_head(library, x, packed, format, n)
    assert_as_good_as(ours, x @ matrix.float().T, x.double() @ matrix.T)


@pytest.mark.parametrize("format", FORMATS)
def test_row_of_every_format_is_the_same_alone_and_among_others(library, format):
    """Bit for bit; for eight rows, x is staged in parts."""
    generator = torch.Generator().manual_seed(1)
    packed, matrix = random_matrix(format, 33, 2304, generator)
    x = torch.randn(8, matrix.shape[1], generator=generator)
    alone = torch.cat([lm_head(library, row, packed, format, 33) for row in x.split(1)])
    for rows in range(2, 9):
        assert torch.equal(lm_head(library, x[:rows], packed, format, 33), alone[:rows])


@pytest.mark.parametrize("formats", [[name] for name in FORMATS] + [list(FORMATS)], ids=",".join)
def test_verify_step_of_every_format_equals_cpu(library, formats):
    base = dataclasses.replace(
        SHAPES[1].base, vocab_size=101, hidden_size=256, intermediate_size=256, n_layers=1, n_heads=4, n_kv_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    packed = random_model(base, ModuleConfig.like(base, 1, 37), "f32", torch.device("cpu"))
    packed = in_formats(packed, formats, torch.Generator().manual_seed(7))
    compare(library, decoder_of(packed, "verify", 1, torch.float32), 2)


@pytest.mark.parametrize(
    ("dtype", "module_dtype"), [("f32", None), ("bf16", "bf16"), ("bf16", "q4"), ("q8", "q8"), ("q4", "q4")]
)
def test_verify_step_of_every_dtype_equals_cpu(tmp_path, library, dtype, module_dtype):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, draft_vocab_size=37)
    packed = pack_model(base, module, dtype, module_dtype)
    compare(library, decoder_of(packed, "verify", 2, torch.float32), 6)


MODULES = {
    "all norms": {},
    "EAGLE-1: no norms": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "MTP: first embedding zero": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
}


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
@pytest.mark.parametrize("kind", MODULES)
def test_step_of_every_kind_of_module_equals_cpu(tmp_path, library, kind, mode, drafts):
    base = write_base(tmp_path / "base", "qwen3")
    packed = pack_model(base, write_module(tmp_path / "module", base, **MODULES[kind]), "f32")
    compare(library, decoder_of(packed, mode, drafts, torch.float32), 5)


def test_accepted_draft_tokens_equal_cpu(tmp_path, library):
    """The module isn't random: the base model's layer, on the next token's embedding."""
    base = write_base(tmp_path / "base", n_layers=1)
    packed = pack_model(base, write_module(tmp_path / "module", base, like_base=True), "f32")
    assert compare(library, decoder_of(packed, "verify", 2, torch.float32), 20) > 0


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 80), (8, 1, 32), (7, 1, 128), (4, 4, 16), (2, 1, 256)]
)
@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 300])
def test_attention_of_odd_sizes_equals_cpu(tmp_path, library, n_heads, n_kv_heads, head_dim, length):
    """New rows before, at and after the end of a chunk; more queries than one block attends for."""
    base = write_base(tmp_path / "base", n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, n_layers=1)
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompt = torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    compare(library, decoder_of(packed, "verify", 3, torch.float32, [prompt]), 2)


def test_attention_of_more_chunks_than_splits_equals_cpu(tmp_path, library):
    base = write_base(tmp_path / "base", n_layers=1, context=2048)
    packed = pack_model(base, None, "f32")
    prompt = torch.randint(0, 101, (1100,), generator=torch.Generator().manual_seed(3)).tolist()
    decoder = Decoder(packed, "standard", capacity=1200, cache_dtype=torch.float32)
    decoder.prefill(prompt)
    compare(library, decoder, 2)


@pytest.mark.parametrize("dtype", ["bf16", "q8", "q4"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "drafts"), [(576, 1536, 1), (1056, 32, 1), (32, 2080, 1), (32, 4224, 4)]
)
def test_gemv_of_odd_sizes_equals_cpu(tmp_path, library, dtype, hidden, intermediate, drafts):
    """Panels that aren't a multiple of a block's iteration, or longer than the staged x; 517 tokens."""
    base = write_base(tmp_path / "base", hidden_size=hidden, intermediate_size=intermediate, vocab_size=517, n_layers=1)
    packed = pack_model(base, write_module(tmp_path / "module", base), dtype)
    compare(library, decoder_of(packed, "alternate", drafts, torch.float32), 3)


def test_argmax_of_equal_logits_is_the_lowest_token(library):
    """Equal logits in different threads, the lower token in the later thread: 5 and 64, 21 and 80."""
    config = dataclasses.replace(SHAPES[1].base, n_layers=1, vocab_size=1040, tie_word_embeddings=False)
    packed = random_model(config, None, "bf16", torch.device("cpu"))
    head = torch.zeros(1040, config.hidden_size)
    head[[5, 64]] = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(1))
    head[[21, 80]] = -head[5]
    matrix = read_plan(packed.weights, packed.plan).head
    matrix.panels().copy_(pack_matrix(head, "bf16").view(-1, matrix.panel_bytes()))
    decoder = decoder_of(packed)
    emulated = Emulated(library, decoder)
    for _ in range(4):
        tokens, _ = emulated.step()
        assert torch.equal(tokens, decoder.step().tokens)
        assert int(tokens) in (5, 21)


def test_step_of_unequal_and_idle_sequences_equals_cpu(tmp_path, library):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompts = [PROMPT, [], [7] * 70, [1, 2], [3]]
    compare(library, decoder_of(packed, "verify", 2, torch.float32, prompts), 4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.5, 50, 0.95), (1.0, 1, 1.0), (0.8, 0, 0.6), (1.2, 7, 1.0)]
)
@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
@pytest.mark.parametrize("draft_vocab_size", [0, 60])
def test_sampled_step_equals_cpu(tmp_path, library, mode, temperature, top_k, top_p, draft_vocab_size):
    base = write_base(tmp_path / "base", vocab_size=301)
    module = write_module(tmp_path / "module", base, draft_vocab_size=draft_vocab_size)
    decoder = decoder_of(
        pack_model(base, module, "f32"),
        mode,
        2,
        torch.float32,
        [PROMPT, [3, 4]],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=[2**45 + 11, 5],
    )
    compare(library, decoder, 8)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["MTP: first embedding zero", "draft vocabulary"])
def test_step_after_changed_num_draft_tokens_equals_cpu(tmp_path, library, kind, temperature):
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True, **MODULES[kind])
    decoder = decoder_of(
        pack_model(base, module, "f32"), "verify", 4, torch.float32, [PROMPT, [], [7] * 70], temperature=temperature
    )
    assert compare(library, decoder, 11, [3, 1, 0, 0, 4, 4, 2, 0, 1, 1, 3]) > 0


@pytest.mark.parametrize("dtype", ["bf16", "q8"])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_verify_greedy_equals_standard_bit_for_bit(tmp_path, library, dtype, drafts):
    """Token ids, and the base model's cache bit for bit, alone and in a batch."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), dtype)
    standard = Emulated(library, decoder_of(packed))
    verify = Emulated(library, decoder_of(packed, "verify", drafts, prompts=[[9] * 66, PROMPT]))
    ids = [int(standard.pending[0, 0])]
    others = [int(verify.pending[1, 0])]
    while len(ids) < 20:
        ids += standard.step()[0][0].tolist()
    while len(others) < 20:
        tokens, counts = verify.step()
        others += tokens[1, : counts[1]].tolist()
    assert ids[:20] == others[:20]
    rows = len(PROMPT) + 18
    assert torch.equal(standard.base_cache[:, :, 0, :, :rows], verify.base_cache[:, :, 1, :, :rows])


def assert_only_first_sequence_fails(library, decoder, fail, code) -> Emulated:
    """A step of two sequences: the first one reports `code` and is unchanged, the other one is as without the failure.

    fail(failing, healthy): damages the first sequence of `failing`; `healthy` is a copy after the step. Returns `failing`.
    """
    failing, healthy = Emulated(library, decoder), Emulated(library, decoder)
    expected, expected_counts = healthy.step()
    fail(failing, healthy)
    pending, lengths, probs = (t.clone() for t in (failing.pending, failing.lengths, failing.draft_probs))
    tokens, counts = failing.step()
    assert counts.tolist() == [code, int(expected_counts[1])]
    assert counts[1] > 0
    assert tokens[0].tolist() == [-1] * tokens.shape[1]
    assert torch.equal(tokens[1], expected[1])
    for given, before, other in (
        (failing.pending, pending, healthy.pending),
        (failing.lengths.T, lengths.T, healthy.lengths.T),
        (failing.draft_probs, probs, healthy.draft_probs),
    ):
        assert torch.equal(given[0], before[0])
        assert torch.equal(given[1], other[1])
    return failing


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cache", ["base_cache", "module_cache"])
def test_nonfinite_logit_is_reported_and_leaves_the_state(tmp_path, library, cache, temperature):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    decoder = decoder_of(packed, "verify", 2, prompts=[PROMPT, PROMPT], temperature=temperature)

    def fail(failing, _):
        getattr(failing, cache)[0, 1, 0, 0, 2] = float("nan")

    assert_only_first_sequence_fails(library, decoder, fail, -1)


def test_nonfinite_logit_of_the_second_draft_token_leaves_the_state(tmp_path, library):
    """The first draft token's distribution was drawn from by then."""
    base = write_base(tmp_path / "base", tied=False)
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompts = [PROMPT, [9] * 20]
    decoder = decoder_of(packed, "verify", 2, torch.float32, prompts, temperature=1.0, seeds=[3, 4])

    def fail(_, healthy):
        token = int(healthy.pending[0, 1])  # the module alone reads its embedding, for the second draft token
        assert not torch.any(decoder.pending == token)
        assert token not in healthy.pending[1]
        embedding = read_plan(packed.weights, packed.plan).embedding
        embedding.panels().view(torch.float32).view(-1, embedding.k, 16)[token // 16, :, token % 16] = float("nan")

    assert_only_first_sequence_fails(library, decoder, fail, -1)


@pytest.mark.parametrize(
    ("lengths", "pending", "code"),
    [
        ((404, 6), None, -2),
        ((-1, -1), None, -2),
        ((6, 7), None, -2),
        ((6, -1), None, -2),
        (None, 101, -3),
        (None, -5, -3),
    ],
)
def test_length_or_token_out_of_range_is_reported_and_leaves_the_caches(tmp_path, library, lengths, pending, code):
    """The kernels check them, because the host would have to wait for the GPU."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")

    def fail(failing, _):
        if lengths is not None:
            failing.lengths[:, 0] = torch.tensor(lengths)
        if pending is not None:
            failing.pending[0, 1] = pending

    decoder = decoder_of(packed, "verify", 2, prompts=[PROMPT, PROMPT])
    failing = assert_only_first_sequence_fails(library, decoder, fail, code)
    assert torch.equal(failing.base_cache[:, :, 0], decoder.base_cache[:, :, 0])
    assert torch.equal(failing.module_cache[:, :, 0], decoder.module_cache[:, :, 0])


def test_failed_sequence_without_drafts_leaves_the_others(tmp_path, library):
    decoder = decoder_of(pack_model(write_base(tmp_path), None, "f32"), prompts=[PROMPT, PROMPT])

    def fail(failing, _):
        failing.pending[0, 0] = 101

    assert_only_first_sequence_fails(library, decoder, fail, -3)


@pytest.mark.parametrize(("top_k", "accepted"), [(0, True), (1, False)])
def test_draft_token_outside_the_draft_vocabulary_is_accepted_where_the_base_model_allows(
    tmp_path, library, top_k, accepted
):
    """The draft token's q is 0: it is accepted if p is not 0, whatever was drawn for its neighbours."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base, draft_vocab_size=37), "f32")
    ids = read_plan(packed.weights, packed.plan).module.draft_vocab.tolist()
    decoder = decoder_of(packed, "verify", 1, torch.float32, [PROMPT] * 2, temperature=1.0, top_k=top_k, seeds=[1, 2])
    emulated = Emulated(library, decoder)
    emulated.draft_probs.fill_(1e6)  # of every neighbour: nothing with such a q is accepted
    # Above all of the draft vocabulary, where a search of a row ends in the next row; and between two ids.
    outside = [token for token in range(101) if token not in ids]
    assert outside[-1] > ids[-1]
    emulated.pending[:, 1] = torch.tensor([outside[-1], outside[0]])
    tokens, counts = emulated.step()
    assert counts.tolist() == [2, 2] if accepted else [1, 1]
    if accepted:
        assert tokens[:, 0].tolist() == [outside[-1], outside[0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [101, -1, 2**40])
def test_draft_vocabulary_outside_the_vocabulary_is_reported(tmp_path, library, wrong, temperature):
    """Weights in a GPU's memory are not checked when a plan is read."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base, draft_vocab_size=37), "f32")
    decoder = decoder_of(packed, "verify", 2, torch.float32, temperature=temperature)
    emulated = Emulated(library, decoder)
    pending = emulated.pending.clone()
    read_plan(packed.weights, packed.plan).module.draft_vocab.fill_(wrong)
    tokens, counts = emulated.step()
    assert counts.tolist() == [-3]
    assert tokens.tolist() == [[-1, -1, -1]]
    assert torch.equal(emulated.pending, pending)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=len)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("mode", "drafts"), [("standard", 1), ("verify", 1), ("verify", 3), ("alternate", 2)])
def test_finish_prefill_equals_prefill_of_the_cpu(tmp_path, library, mode, drafts, temperature, prompt):
    """The last token of a prompt runs as a step of its sequence alone, and leaves the state of a prefill."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base, zero_first_embedding=True), "f32")
    prompts, seeds = [[9] * 20, prompt], [3, 4]
    decoder = decoder_of(packed, mode, drafts, torch.float32, prompts, temperature=temperature, seeds=seeds)
    emulated = Emulated(library, decoder)
    emulated.pending[1] = 0
    emulated.pending[1, 0] = prompt[-1]
    emulated.lengths[0, 1] = len(prompt) - 1
    emulated.lengths[1, 1] = len(prompt) - 1 if decoder.num_draft_tokens else 0
    tokens, counts = emulated.step(first_of=1)
    assert counts.tolist() == [0, 1]
    assert tokens[1, 0] == decoder.pending[1, 0]
    assert torch.equal(emulated.pending, decoder.pending)
    assert torch.equal(emulated.lengths, decoder.lengths)
    torch.testing.assert_close(emulated.draft_probs, decoder.draft_probs, rtol=1e-4, atol=1e-6)
    rows = len(prompt)
    caches = [(emulated.base_cache, decoder.base_cache)]
    caches += [(emulated.module_cache, decoder.module_cache)] if decoder.num_draft_tokens else []
    for given, expected in caches:
        torch.testing.assert_close(given[:, :, 1, :, :rows], expected[:, :, 1, :, :rows])
