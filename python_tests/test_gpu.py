"""The ops on a GPU, compared with the CPU's.

test_cuda_emulated.py and test_gpu_prefill.py test the same without a GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from models import ARCHITECTURES, write_base, write_module
from test_attention_decode import cast, inputs
from test_recycle_head import EPS, case
from tolerance import assert_as_good_as

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.ops.registration import HAS_CUDA_OPS
from recycle_ext.reference import ops as reference_ops
from recycle_ext.weights.layout import FORMATS
from recycle_ext.weights.pack import pack_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HAS_CUDA_OPS and torch.cuda.is_available()),
        reason="needs an NVIDIA GPU, a CUDA build of torch and of recycle_ext",
    ),
]

CUDA = torch.device("cuda", 0)
PROMPT = [5, 17, 3, 99, 42, 7]


def on_gpu(arguments):
    return {name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "rows", "n_heads", "n_kv_heads", "head_dim"),
    [
        ([0], 1, 4, 4, 16),
        ([63], 2, 9, 3, 64),
        ([200, 7], 5, 6, 3, 48),
        ([33], 6, 2, 2, 80),
        ([1100], 8, 4, 2, 256),
        ([3000, 64, 129], 2, 32, 8, 128),
    ],
)
def test_attention_decode_is_as_exact_as_pytorch(lengths, rows, n_heads, n_kv_heads, head_dim, cache_dtype):
    capacity = max(lengths) + rows + 3
    given = inputs(lengths, rows, n_heads, n_kv_heads, head_dim, capacity, cache_dtype)
    exact_in = cast(given, torch.float64, torch.float64) | {"inv_freq": given["inv_freq"]}
    native_in = cast(given, torch.float32, cache_dtype)
    ours_in = on_gpu(cast(given, torch.float32, cache_dtype))
    exact = reference_ops.attention_decode(**exact_in)
    native = reference_ops.attention_decode(**native_in)
    ours = torch.ops.recycle.attention_decode(**ours_in)
    assert_as_good_as(ours.cpu(), native, exact)
    assert_as_good_as(ours_in["cache"].cpu(), native_in["cache"], exact_in["cache"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "d", "n_vocab"), [(1, 32, 1), (1, 576, 1000), (2, 64, 17), (5, 160, 65), (8, 576, 333), (33, 64, 100)]
)
def test_recycle_head_greedy_returns_the_argmax(format, rows, d, n_vocab):
    hidden, norm, packed, matrix = case(rows, d, n_vocab, format)
    tokens, log_probs = torch.ops.recycle.recycle_head(
        hidden.to(CUDA), norm.to(CUDA), EPS, packed.to(CUDA), FORMATS[format], n_vocab,
        torch.arange(rows, device=CUDA), 0.0, 0, 1.0, torch.arange(rows, device=CUDA),
    )  # fmt: skip
    normed = reference_ops.rms_norm(hidden.double(), norm.double(), EPS)
    exact = (normed @ matrix.T).log_softmax(-1)
    native = (reference_ops.rms_norm(hidden, norm, EPS) @ matrix.float().T).log_softmax(-1)
    expected = exact.argmax(-1)[:, None]
    assert torch.equal(tokens.cpu(), expected[:, 0])
    assert_as_good_as(log_probs.cpu()[:, None], native.gather(1, expected), exact.gather(1, expected))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 20, 0.9), (1.0, 1, 1.0)]
)
def test_recycle_head_sampled_equals_reference(temperature, top_k, top_p):
    n_vocab, rows = 300, 64
    hidden, norm, packed, matrix = case(rows, 64, n_vocab, "f32")
    positions, seeds = torch.arange(rows) + 7, torch.arange(rows) * 7919 + 2**40
    tokens, _ = torch.ops.recycle.recycle_head(
        hidden.to(CUDA), norm.to(CUDA), EPS, packed.to(CUDA), FORMATS["f32"], n_vocab,
        positions.to(CUDA), temperature, top_k, top_p, seeds.to(CUDA),
    )  # fmt: skip
    expected, _ = reference_ops.recycle_head(
        hidden.double(), norm.double(), EPS, matrix, positions, temperature, top_k, top_p, seeds
    )
    assert torch.equal(tokens.cpu(), expected)


def both(packed, mode, drafts, cache_dtype=torch.float32, prompts=(PROMPT,), **sampling):
    """A decoder on the CPU and one on the GPU, after the prefill of the same prompts."""
    decoders = [
        Decoder(model, mode, drafts, len(prompts), capacity=400, cache_dtype=cache_dtype, **sampling)
        for model in (packed, packed.to(CUDA))
    ]
    for decoder in decoders:
        for sequence, prompt in enumerate(prompts):
            if prompt:
                decoder.prefill(prompt, sequence)
    return decoders


def compare(cpu, gpu, steps) -> int:
    """Steps both decoders side by side; returns the number of accepted draft tokens."""
    accepted = 0
    assert torch.equal(gpu.pending.cpu(), cpu.pending)
    for _ in range(steps):
        expected, given = cpu.step(), gpu.step()
        assert torch.equal(given.tokens, expected.tokens)
        assert torch.equal(given.counts, expected.counts)
        assert torch.equal(gpu.pending.cpu(), cpu.pending)
        assert torch.equal(gpu.lengths.cpu(), cpu.lengths)
        accepted += int((given.counts - 1).clamp_min(0).sum())
    return accepted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_standard_step_of_every_architecture_equals_cpu(tmp_path, architecture):
    packed = pack_model(write_base(tmp_path, architecture), None, "f32")
    compare(*both(packed, "standard", 1), 20)


MODULES = {
    "all norms": {},
    "EAGLE-1: no norms": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "MTP: first embedding zero": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
}


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
@pytest.mark.parametrize("kind", MODULES)
def test_step_of_every_kind_of_module_equals_cpu(tmp_path, kind, mode, drafts):
    base = write_base(tmp_path / "base", "qwen3")
    packed = pack_model(base, write_module(tmp_path / "module", base, **MODULES[kind]), "f32")
    compare(*both(packed, mode, drafts, prompts=[PROMPT, [], [7] * 70]), 12)


def test_accepted_draft_tokens_equal_cpu(tmp_path):
    base = write_base(tmp_path / "base", n_layers=1)
    packed = pack_model(base, write_module(tmp_path / "module", base, like_base=True), "f32")
    assert compare(*both(packed, "verify", 2), 30) > 0


@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
def test_sampled_step_equals_cpu(tmp_path, mode):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base, draft_vocab_size=60), "f32")
    compare(*both(packed, mode, 2, temperature=1.5, top_k=50, top_p=0.95, seeds=[2**45 + 11]), 20)


@pytest.mark.parametrize("dtype", ["bf16", "q8", "q4"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_verify_greedy_equals_standard_bit_for_bit(tmp_path, dtype, drafts):
    """Token ids and cache, in CUDA graphs, for different batches and numbers of rows."""
    base = write_base(tmp_path / "base", hidden_size=576, intermediate_size=1536, vocab_size=517)
    packed = pack_model(base, write_module(tmp_path / "module", base), dtype).to(CUDA)
    standard = Decoder(packed, "standard", capacity=400)
    standard.prefill(PROMPT)
    ids = [int(standard.pending[0, 0])]
    verify = Decoder(packed, "verify", drafts, batch=2, capacity=400)
    verify.prefill([9] * 66, 0)
    verify.prefill(PROMPT, 1)
    others = [int(verify.pending[1, 0])]
    while len(ids) < 60:
        ids += standard.step().tokens[0].tolist()
    while len(others) < 60:
        step = verify.step()
        others += step.tokens[1, : step.counts[1]].tolist()
    assert ids[:60] == others[:60]
    rows = len(PROMPT) + 58
    assert torch.equal(standard.base_cache[:, :, 0, :, :rows], verify.base_cache[:, :, 1, :, :rows])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_step_after_changed_num_draft_tokens_equals_cpu(tmp_path, temperature):
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True, draft_vocab_size=37)
    packed = pack_model(base, module, "f32")
    prompts = [PROMPT, [], [7] * 70]
    decoders = both(packed, "verify", 4, prompts=prompts, temperature=temperature)
    accepted = 0
    for drafts in [3, 1, 0, 0, 4, 4, 2, 0, 1, 1, 3] * 2:
        for decoder in decoders:
            decoder.set_num_draft_tokens(drafts)
        accepted += compare(*decoders, 1)
    assert accepted > 0


def test_auto_drafts_equal_standard_and_time_their_steps(tmp_path):
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True)
    packed = pack_model(base, module, "f32").to(CUDA)
    auto, standard = (
        Decoder(packed, mode, drafts, capacity=400, cache_dtype=torch.float32)
        for mode, drafts in (("verify", "auto"), ("standard", 1))
    )
    assert list(auto.stream(PROMPT)) == list(standard.stream(PROMPT))
    (history,) = packed.shared.values()
    assert history.costs()[1] < math.inf
    assert all(0 < graph.seconds < 1 for graph in auto._graphs.values())


def test_run_with_steps_ahead_equals_step(tmp_path):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "bf16").to(CUDA)
    one, other = (Decoder(packed, "verify", 2, capacity=400) for _ in range(2))
    one.prefill(PROMPT)
    other.prefill(PROMPT)
    steps = other.run()
    for _ in range(20):
        expected, given = one.step(), next(steps)
        assert torch.equal(given.tokens, expected.tokens)


def test_new_prompt_discards_the_step_ahead(tmp_path):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    on_cpu, on_gpu = (
        Decoder(model, "verify", 1, capacity=30, cache_dtype=torch.float32) for model in (packed, packed.to(CUDA))
    )
    for prompt in (PROMPT, [29, 6, 84]):
        given = on_gpu.stream(prompt)
        assert [next(given) for _ in range(9)] == list(on_cpu.stream(prompt))[:9]


def test_step_without_a_graph_runs(tmp_path):
    """For compute-sanitizer, which checks bounds where each tensor has its own allocation."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "bf16").to(CUDA)
    decoder = Decoder(packed, "verify", 2, batch=2, capacity=400)
    decoder.prefill(PROMPT, 1)
    for _ in range(3):
        _, counts = torch.ops.recycle.decode_step(*decoder.arguments())
    assert counts[0] == 0
    assert counts[1] > 0


def test_op_in_a_users_graph_and_compiled_function_equals_op(tmp_path):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "bf16").to(CUDA)
    plain, graphed, compiled = (Decoder(packed, "verify", 1, capacity=400) for _ in range(3))
    for decoder in (plain, graphed, compiled):
        decoder.prefill(PROMPT)
    graph = torch.cuda.CUDAGraph()
    torch.ops.recycle.decode_step(*plain.arguments())  # loads the kernels
    torch.ops.recycle.decode_step(*graphed.arguments())
    with torch.cuda.graph(graph):
        results = torch.ops.recycle.decode_step(*graphed.arguments())
    step = torch.compile(lambda *state: torch.ops.recycle.decode_step(*state), fullgraph=True)
    step(*compiled.arguments())
    for _ in range(10):
        expected = torch.ops.recycle.decode_step(*plain.arguments())
        graph.replay()
        assert torch.equal(results[0], expected[0])
        assert torch.equal(step(*compiled.arguments())[0], expected[0])


def test_nonfinite_logit_is_reported_and_leaves_the_state(tmp_path):
    base = write_base(tmp_path)
    decoder = Decoder(pack_model(base, None, "f32").to(CUDA), "standard", capacity=50)
    decoder.prefill(PROMPT)
    decoder.step()
    before = decoder.pending.clone(), decoder.lengths.clone()
    decoder.base_cache[0, 1, 0, 0, 2] = float("nan")
    assert decoder.step().failure() == "decode_step, sequence 0: a logit is NaN or infinite"
    assert torch.equal(decoder.pending, before[0])
    assert torch.equal(decoder.lengths, before[1])


def test_full_cache_is_reported(tmp_path):
    decoder = Decoder(pack_model(write_base(tmp_path), None, "f32").to(CUDA), "standard", capacity=8)
    decoder.prefill(PROMPT)
    for _ in range(3):
        decoder.step()
    assert "no room for another step" in decoder.step().failure()


def test_decode_step_passes_opcheck(tmp_path):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32").to(CUDA)
    decoder = Decoder(packed, "verify", 1, capacity=40)
    decoder.prefill(PROMPT)
    torch.library.opcheck(torch.ops.recycle.decode_step.default, decoder.arguments())
