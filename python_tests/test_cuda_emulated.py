"""The CUDA kernels without a GPU: the same sources, compiled as C++ and run a block at a time.

python_tests/cuda_emulation/emulation.h says how. What a kernel computes is held to the CPU kernels here; speed, races and what
nvcc makes of it are for python -m recycle_ext.bench --device cuda.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, write_base, write_module

from recycle_ext.bench.random_model import SHAPES, random_model
from recycle_ext.decoding.decoder import MODES, Decoder
from recycle_ext.weights.layout import pack_matrix
from recycle_ext.weights.pack import pack_model
from recycle_ext.weights.plan import read_plan

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted(
        set((ROOT / "csrc" / "cuda").glob("*.cu")) - {ROOT / "csrc" / "cuda" / "device_info.cu"}
    ),
    ROOT / "csrc" / "common" / "plan.cpp",
    ROOT / "python_tests" / "cuda_emulation" / "entry.cpp",
]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1}
PROMPT = [5, 17, 3, 99, 42, 7]

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="compiles the CUDA kernels as C++, and there is no C++ compiler"
)


class State(ctypes.Structure):
    """EmulatedState of cuda_emulation.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p if name in ("plan", "weights") else ctypes.c_int64)
          for name in ("plan", "plan_length", "weights", "weights_bytes")),
        *((name, ctypes.c_int64) for name in ("batch", "drafts", "mode", "cache_type")),
        ("base_cache", ctypes.c_void_p),
        ("base_capacity", ctypes.c_int64),
        ("module_cache", ctypes.c_void_p),
        ("module_capacity", ctypes.c_int64),
        ("pending", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("draft_probs", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("seeds", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = "-std=c++20 -O2 -fPIC -shared -ffp-contract=off -U_FORTIFY_SOURCE -Wno-unknown-pragmas"
    sources = [word for file in SOURCES for word in ("-x", "c++", str(file))]
    subprocess.run(
        [
            COMPILER,
            *flags.split(),
            "-DRECYCLE_EMULATE_CUDA",
            f"-I{ROOT / 'csrc' / 'include'}",
            f"-I{ROOT / 'csrc' / 'cuda'}",
            f"-I{ROOT / 'python_tests' / 'cuda_emulation'}",
            *sources,
            "-o",
            str(out),
        ],
        check=True,
    )
    loaded = ctypes.CDLL(str(out))
    loaded.emulated_scratch_bytes.restype = ctypes.c_int64
    loaded.emulated_decode_step.restype = ctypes.c_char_p
    return loaded


class Emulated:
    """A decoder's state, copied, and stepped by the emulated kernels."""

    def __init__(self, library: ctypes.CDLL, decoder: Decoder) -> None:
        self.library = library
        self.model = decoder.model
        self.base_cache = decoder.base_cache.clone()
        self.module_cache = decoder.module_cache.clone()
        self.lengths = decoder.lengths.clone()
        temperature, top_k, top_p, self.seeds = decoder._sampling
        model = decoder.model
        self.state = State(
            plan=model.plan.data_ptr(),
            plan_length=model.plan.numel(),
            weights=model.weights.data_ptr(),
            weights_bytes=model.weights.numel(),
            batch=decoder.batch,
            cache_type=CACHE_TYPES[self.base_cache.dtype],
            base_cache=self.base_cache.data_ptr(),
            base_capacity=self.base_cache.shape[4],
            module_cache=self.module_cache.data_ptr(),
            module_capacity=self.module_cache.shape[4] if len(self.module_cache) else 0,
            lengths=self.lengths.data_ptr(),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seeds=self.seeds.data_ptr(),
        )
        self.take_pending(decoder)

    def take_pending(self, decoder: Decoder) -> None:
        """As many drafts as the decoder has now."""
        self.pending, self.draft_probs = decoder.pending.clone(), decoder.draft_probs.clone()
        self.state.drafts = decoder.num_draft_tokens
        self.state.mode = MODES[decoder.mode if decoder.num_draft_tokens else "standard"]
        self.state.pending = self.pending.data_ptr()
        self.state.draft_probs = self.draft_probs.data_ptr()
        size = self.library.emulated_scratch_bytes(ctypes.byref(self.state))
        # Full of NaN: what a kernel reads it must have been given.
        self.scratch = torch.full((size,), 255, dtype=torch.uint8)
        self.state.scratch = self.scratch.data_ptr()

    def step(self, first_of: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, counts = torch.empty_like(self.pending), torch.empty_like(self.lengths[0])
        wrong = self.library.emulated_decode_step(
            ctypes.byref(self.state),
            ctypes.c_int64(first_of),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_void_p(counts.data_ptr()),
        )
        assert wrong is None, wrong
        return tokens, counts


def compare(library, decoder, steps, changes=()) -> int:
    """The CPU's kernels and the emulated ones side by side; returns how many drafts counted.

    changes: drafts before each step, in turn.
    """
    emulated = Emulated(library, decoder)
    accepted = 0
    for step in range(steps):
        if changes:
            decoder.set_num_draft_tokens(changes[step % len(changes)])
            emulated.take_pending(decoder)
        tokens, counts, *_ = decoder.step()
        ours = emulated.step()
        assert torch.equal(ours[0], tokens)
        assert torch.equal(ours[1], counts)
        assert torch.equal(emulated.pending, decoder.pending)
        assert torch.equal(emulated.lengths, decoder.lengths)
        accepted += int((counts - 1).clamp_min(0).sum())
    for b, length in enumerate(decoder.lengths[0].tolist()):
        torch.testing.assert_close(
            emulated.base_cache[:, :, b, :, :length].float(),
            decoder.base_cache[:, :, b, :, :length].float(),
            rtol=2**-7,  # a rounding of bfloat16 may fall to the other side
            atol=1e-4,
        )
    return accepted


def decoder_of(
    packed, mode="standard", drafts=1, cache_dtype=torch.bfloat16, prompts=(PROMPT,), **sampling
):
    decoder = Decoder(
        packed, mode, drafts, len(prompts), capacity=400, cache_dtype=cache_dtype, **sampling
    )
    for sequence, prompt in enumerate(prompts):
        if prompt:
            decoder.prefill(prompt, sequence)
    return decoder


@pytest.mark.parametrize("cache_dtype", CACHE_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_standard_mode_of_every_architecture(tmp_path, library, architecture, cache_dtype):
    packed = pack_model(write_base(tmp_path, architecture), None, "bf16")
    compare(library, decoder_of(packed, cache_dtype=cache_dtype), 6)


@pytest.mark.parametrize(
    ("dtype", "module_dtype"),
    [("f32", None), ("bf16", "bf16"), ("bf16", "q4"), ("q8", "q8"), ("q4", "q4")],
)
def test_every_width(tmp_path, library, dtype, module_dtype):
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
def test_every_kind_of_module(tmp_path, library, kind, mode, drafts):
    base = write_base(tmp_path / "base", "qwen3")
    packed = pack_model(base, write_module(tmp_path / "module", base, **MODULES[kind]), "f32")
    compare(library, decoder_of(packed, mode, drafts, torch.float32), 5)


def test_drafts_that_are_accepted(tmp_path, library):
    """Not a random module: the base's own last layer on the next token's embedding."""
    base = write_base(tmp_path / "base", n_layers=1)
    packed = pack_model(base, write_module(tmp_path / "module", base, like_base=True), "f32")
    assert compare(library, decoder_of(packed, "verify", 2, torch.float32), 20) > 0


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"),
    [(9, 3, 64), (2, 2, 80), (8, 1, 32), (7, 1, 128), (4, 4, 16), (2, 1, 256)],
)
@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 300])
def test_attention_of_odd_sizes(tmp_path, library, n_heads, n_kv_heads, head_dim, length):
    """The new rows before, on and after a chunk's end; more queries than a block takes."""
    base = write_base(
        tmp_path / "base", n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, n_layers=1
    )
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompt = torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    compare(library, decoder_of(packed, "verify", 3, torch.float32, [prompt]), 2)


def test_more_chunks_than_splits(tmp_path, library):
    base = write_base(tmp_path / "base", n_layers=1, context=2048)
    packed = pack_model(base, None, "f32")
    prompt = torch.randint(0, 101, (1100,), generator=torch.Generator().manual_seed(3)).tolist()
    decoder = Decoder(packed, "standard", capacity=1200, cache_dtype=torch.float32)
    decoder.prefill(prompt)
    compare(library, decoder, 2)


@pytest.mark.parametrize("dtype", ["bf16", "q8", "q4"])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "drafts"),
    [(576, 1536, 1), (1056, 32, 1), (32, 2080, 1), (32, 4224, 4)],
)
def test_products_of_odd_sizes(tmp_path, library, dtype, hidden, intermediate, drafts):
    """Panels that are no multiple of what a block reads at once, or longer than what it stages; 517 tokens."""
    base = write_base(
        tmp_path / "base",
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=517,
        n_layers=1,
    )
    packed = pack_model(base, write_module(tmp_path / "module", base), dtype)
    compare(library, decoder_of(packed, "alternate", drafts, torch.float32), 3)


def test_the_lowest_token_wins_among_equal_logits(library):
    """Equal ones with different threads of a block, the lower with the later thread: 5 and 64, or 21 and 80."""
    config = dataclasses.replace(
        SHAPES[1].base, n_layers=1, vocab_size=1040, tie_word_embeddings=False
    )
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
        assert torch.equal(tokens, decoder.step()[0])
        assert int(tokens) in (5, 21)


def test_sequences_of_different_lengths_and_an_idle_one(tmp_path, library):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompts = [PROMPT, [], [7] * 70, [1, 2], [3]]
    compare(library, decoder_of(packed, "verify", 2, torch.float32, prompts), 4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (1.5, 50, 0.95), (1.0, 1, 1.0), (0.8, 0, 0.6), (1.2, 7, 1.0)],
)
@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
@pytest.mark.parametrize("draft_vocab_size", [0, 60])
def test_sampled_steps_draw_what_the_cpu_draws(
    tmp_path, library, mode, temperature, top_k, top_p, draft_vocab_size
):
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
def test_steps_of_different_widths(tmp_path, library, kind, temperature):
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True, **MODULES[kind])
    decoder = decoder_of(
        pack_model(base, module, "f32"),
        "verify",
        4,
        torch.float32,
        [PROMPT, [], [7] * 70],
        temperature=temperature,
    )
    assert compare(library, decoder, 11, [3, 1, 0, 0, 4, 4, 2, 0, 1, 1, 3]) > 0


@pytest.mark.parametrize("dtype", ["bf16", "q8"])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_verify_writes_the_bits_of_standard(tmp_path, library, dtype, drafts):
    """Not only the ids: what the base leaves in its cache is the same, bit for bit, alone or in a batch."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), dtype)
    standard = Emulated(library, decoder_of(packed))
    verify = Emulated(library, decoder_of(packed, "verify", drafts, prompts=[[9] * 66, PROMPT]))
    ids = [int(standard.pending[0, 0])]
    others = [int(verify.pending[1, 0])]
    while len(ids) < 20:
        ids += standard.step()[0][0].tolist()
    while len(others) < 20:
        tokens, counts, *_ = verify.step()
        others += tokens[1, : counts[1]].tolist()
    assert ids[:20] == others[:20]
    rows = len(PROMPT) + 18
    assert torch.equal(standard.base_cache[:, :, 0, :, :rows], verify.base_cache[:, :, 1, :, :rows])


def test_a_logit_that_is_no_number_is_reported_and_the_state_stays(tmp_path, library):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    emulated = Emulated(library, decoder_of(packed, "verify", 2, prompts=[PROMPT, PROMPT]))
    emulated.base_cache[0, 1, 0, 0, 2] = float("nan")
    before = emulated.pending[0].clone(), emulated.lengths[:, 0].clone()
    tokens, counts, *_ = emulated.step()
    assert counts[0] == -1
    assert counts[1] > 0
    assert tokens[0].tolist() == [-1] * 3
    assert torch.equal(emulated.pending[0], before[0])
    assert torch.equal(emulated.lengths[:, 0], before[1])


@pytest.mark.parametrize(
    ("lengths", "pending"),
    [((404, 6), None), ((-1, -1), None), ((6, 7), None), ((6, -1), None), (None, 101), (None, -5)],
)
def test_lengths_and_tokens_out_of_range_touch_nothing(tmp_path, library, lengths, pending):
    """The host can't look at them without waiting for the GPU, so the kernels do."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    emulated = Emulated(library, decoder_of(packed, "verify", 2, prompts=[PROMPT, PROMPT]))
    if lengths is not None:
        emulated.lengths[:, 0] = torch.tensor(lengths)
    if pending is not None:
        emulated.pending[0, 1] = pending
    caches = emulated.base_cache[:, :, 0].clone(), emulated.module_cache[:, :, 0].clone()
    tokens, counts, *_ = emulated.step()
    assert counts[0] == -2
    assert counts[1] > 0
    assert tokens[0].tolist() == [-1] * 3
    assert torch.equal(emulated.base_cache[:, :, 0], caches[0])
    assert torch.equal(emulated.module_cache[:, :, 0], caches[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("mode", "drafts"), [("standard", 1), ("verify", 1), ("verify", 3), ("alternate", 2)]
)
def test_the_last_token_of_a_prompt(tmp_path, library, mode, drafts, temperature):
    """It runs as a step of its own sequence, which then has what a prefill leaves; others are left alone."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    prompts, seeds = [[9] * 20, PROMPT], [3, 4]
    decoder = decoder_of(
        packed, mode, drafts, torch.float32, prompts, temperature=temperature, seeds=seeds
    )
    emulated = Emulated(library, decoder)
    emulated.pending[1] = 0
    emulated.pending[1, 0] = PROMPT[-1]
    emulated.lengths[0, 1] = len(PROMPT) - 1
    emulated.lengths[1, 1] = len(PROMPT) - 1 if decoder.num_draft_tokens else 0
    tokens, counts = emulated.step(first_of=1)
    assert counts.tolist() == [0, 1]
    assert tokens[1, 0] == decoder.pending[1, 0]
    assert torch.equal(emulated.pending, decoder.pending)
    assert torch.equal(emulated.lengths, decoder.lengths)
    torch.testing.assert_close(emulated.draft_probs, decoder.draft_probs, rtol=1e-4, atol=1e-6)
    rows = len(PROMPT)
    caches = [(emulated.base_cache, decoder.base_cache)]
    caches += [(emulated.module_cache, decoder.module_cache)] if decoder.num_draft_tokens else []
    for ours, theirs in caches:
        torch.testing.assert_close(ours[:, :, 1, :, :rows], theirs[:, :, 1, :, :rows])
