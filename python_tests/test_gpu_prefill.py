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
