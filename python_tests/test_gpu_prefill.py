"""The prefill of GPUs, without a GPU: the same PyTorch code on CPU tensors, compared with the CPU's kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formats import columns, random_matrix
from models import ARCHITECTURES, reference_base, write_base, write_module
from tolerance import assert_as_good_as
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.ops import cuda_prefill
from recycle_ext.ops.cuda_prefill import fill_caches
from recycle_ext.reference.model import KvCache
from recycle_ext.weights.layout import FORMATS, Matrix
from recycle_ext.weights.pack import pack_model
from recycle_ext.weights.plan import read_plan


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (64, 64), (33, 160)])
def test_unpacked_matrix_is_exact(format, n, k):
    k = columns(format, k)
    weights, exact = random_matrix(format, n, k, torch.Generator().manual_seed(n * k))
    packed = Matrix(weights, 0, format, n, k)
    assert torch.equal(packed.unpacked(), exact.to(packed.compute_dtype))
    ids = torch.tensor([n - 1, 0, n // 2, n - 1])
    assert torch.equal(packed.rows(ids), exact[ids].float())


def compare(base, module, dtype, length, tolerance):
    """fill_caches() and the CPU's prefill leave the same rows in the caches, and no other rows."""
    packed = pack_model(base, module, dtype)
    prompt = torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(3))
    expected, ours = (
        Decoder(
            packed, "verify" if module else "standard", batch=2, capacity=300,
            cache_dtype=torch.float32,
        )
        for _ in range(2)
    )  # fmt: skip
    expected.prefill(prompt.tolist(), 1)
    fill_caches(
        read_plan(packed.weights, packed.plan), ours.base_cache, ours.module_cache if module else None, 1, prompt
    )
    caches = [(ours.base_cache, expected.base_cache)]
    caches += [(ours.module_cache, expected.module_cache)] if module else []
    for given, exact in caches:
        rows = slice(0, length - 1)
        torch.testing.assert_close(given[:, :, 1, :, rows], exact[:, :, 1, :, rows], rtol=0, atol=tolerance)
        assert not given[:, :, 0].any()
        assert not given[:, :, 1, :, length - 1 :].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_of_every_architecture_equals_cpu(tmp_path, architecture):
    compare(write_base(tmp_path, architecture), None, "f32", 40, 2e-5)


@pytest.mark.parametrize(
    "kind", [{}, {"norms": False}, {"input_bias": True, "n_layers": 2}, {"zero_first_embedding": True}], ids=str
)
def test_prefill_of_every_kind_of_module_equals_cpu(tmp_path, kind):
    base = write_base(tmp_path / "base", "qwen3")
    compare(base, write_module(tmp_path / "module", base, **kind), "f32", 40, 2e-5)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 100])
def test_prefill_in_several_passes_equals_cpu(tmp_path, monkeypatch, length):
    monkeypatch.setattr(cuda_prefill, "ROWS_PER_PASS", 16)
    base = write_base(tmp_path / "base")
    compare(base, write_module(tmp_path / "module", base), "f32", length, 2e-5)


def test_long_prefill_unpacks_each_matrix_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_prefill, "ROWS_PER_PASS", 16)
    unpacked = []
    unpack = Matrix.unpacked
    monkeypatch.setattr(Matrix, "unpacked", lambda self: unpacked.append(self.offset) or unpack(self))
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "bf16")
    decoder = Decoder(packed, "verify", capacity=300)
    prompt = torch.randint(0, 101, (100,), generator=torch.Generator().manual_seed(3))
    fill_caches(read_plan(packed.weights, packed.plan), decoder.base_cache, decoder.module_cache, 0, prompt)
    assert len(unpacked) == len(set(unpacked)) == 7 * 3 + 1  # three layers, and the module's input projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_long_prompt_needs_no_mask(dtype):
    """A mask, or grouped queries in float32, leave PyTorch the kernel that writes the scores of all pairs to memory."""
    calls = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                calls.append((type(args[3]), args[1].shape[1], kwargs["enable_gqa"]))
            return function(*args, **(kwargs or {}))

    q, k, v = (torch.randn(heads, rows, 16).to(dtype) for heads, rows in ((4, 5), (2, 12), (2, 12)))
    with Calls():
        out = cuda_prefill._attend(q, k, v)
    assert calls == [(CausalBias, 4, False) if dtype == torch.float32 else (CausalBias, 2, True)]
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
    torch.testing.assert_close(out, expected)


def test_prefill_in_bf16_is_as_exact_as_pytorch(tmp_path):
    base = write_base(tmp_path)
    prompt = torch.randint(0, 101, (40,), generator=torch.Generator().manual_seed(3))
    packed = pack_model(base, None, "bf16")
    ours = Decoder(packed, "standard", capacity=300, cache_dtype=torch.bfloat16).base_cache
    fill_caches(read_plan(packed.weights, packed.plan), ours, None, 0, prompt)
    exact, native = KvCache(), KvCache()
    reference_base(base)(prompt[None, :-1], exact)
    reference_base(base, torch.bfloat16)(prompt[None, :-1], native)
    for layer in range(base.config.n_layers):
        for kv in (0, 1):
            assert_as_good_as(ours[layer, kv, 0, :, :39], native.held(layer)[kv][0], exact.held(layer)[kv][0])


@pytest.fixture
def decoder(tmp_path) -> Decoder:
    """Two sequences with three draft tokens a step; the first has state of its own."""
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    decoder = Decoder(packed, "verify", 3, batch=2, capacity=20)
    decoder.prefill([5, 6, 7], 0)
    return decoder


def end_with(monkeypatch, count: int) -> None:
    """The end of a prefill gives this count, in the place of the GPU's kernels."""
    counts = torch.full((2,), count)
    monkeypatch.setattr(torch.ops.recycle, "finish_prefill", lambda *_: (None, counts), raising=False)


def test_prompt_that_just_fits_is_read_and_a_longer_one_refused(decoder, monkeypatch):
    end_with(monkeypatch, 1)
    room = decoder.base_cache.shape[4]
    prompt = torch.arange(room - 1)  # the draft tokens but the first take two rows
    with pytest.raises(
        ValueError, match=f"prompt has {room - 1} tokens, but the caches have room for {room} positions"
    ):
        cuda_prefill.prefill(*decoder.arguments(), 1, prompt)
    cuda_prefill.prefill(*decoder.arguments(), 1, prompt[:-1])
    assert decoder.lengths[:, 1].tolist() == [room - 3, room - 3]
    assert decoder.pending[1].tolist() == [room - 3, 0, 0, 0]


def test_nonfinite_end_of_a_prefill_leaves_that_sequence_idle_and_the_others_alone(decoder, monkeypatch):
    end_with(monkeypatch, -1)
    pending, lengths = decoder.pending[0].clone(), decoder.lengths[:, 0].clone()
    with pytest.raises(RuntimeError, match=r"a logit is NaN or infinite \(sequence 1, position 4\)"):
        cuda_prefill.prefill(*decoder.arguments(), 1, torch.arange(5))
    assert decoder.pending[1].tolist() == [-1] * 4
    assert decoder.lengths[:, 1].tolist() == [0, 0]
    assert torch.equal(decoder.pending[0], pending)
    assert torch.equal(decoder.lengths[:, 0], lengths)
