"""torch.library.opcheck: schemas declare every argument that an op writes, fakes return the right shapes."""

from __future__ import annotations

import pytest
import torch
from models import write_base, write_module

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights.layout import pack_matrix
from recycle_ext.weights.pack import pack_model

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_attention_decode_passes_opcheck(cache_dtype):
    arguments = (
        torch.randn(2, 3, 4, 32),
        torch.randn(2, 3, 2, 32),
        torch.randn(2, 3, 2, 32),
        torch.randn(2, 2, 2, 16, 32).to(cache_dtype),
        torch.tensor([0, 5]),
        torch.rand(16),
    )
    torch.library.opcheck(torch.ops.recycle.attention_decode.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_recycle_head_passes_opcheck(temperature):
    arguments = (
        torch.randn(3, 32),
        torch.ones(32),
        1e-5,
        pack_matrix(torch.randn(50, 32), "q8_0"),
        3,
        50,
        torch.arange(3),
        temperature,
        0,
        1.0,
        torch.arange(3),
    )
    torch.library.opcheck(torch.ops.recycle.recycle_head.default, arguments, test_utils=TESTS)


@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_decode_step_and_prefill_pass_opcheck(tmp_path, mode, temperature):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base)
    decoder = Decoder(pack_model(base, module, "bf16"), mode, 2, batch=2, capacity=40, temperature=temperature)
    decoder.prefill([1, 2, 3], 0)
    decoder.prefill([4, 5], 1)
    arguments = decoder.arguments()
    torch.library.opcheck(torch.ops.recycle.decode_step.default, arguments, test_utils=TESTS)
    prompt = (*arguments, 1, torch.tensor([7, 8, 9]))
    torch.library.opcheck(torch.ops.recycle.prefill.default, prompt, test_utils=TESTS)


def test_decode_step_in_torch_compile_equals_eager(tmp_path):
    base = write_base(tmp_path)
    packed = pack_model(base, None, "bf16")
    eager, compiled = (Decoder(packed, "standard", capacity=40) for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*arguments):
        tokens, counts = torch.ops.recycle.decode_step(*arguments)
        return tokens + 0, counts + 0

    eager.prefill([1, 2, 3])
    compiled.prefill([1, 2, 3])
    for _ in range(3):
        expected = eager.step()
        tokens, counts = step(*compiled.arguments())
        assert torch.equal(tokens, expected[0])
        assert torch.equal(counts, expected[1])
    assert torch.equal(eager.base_cache, compiled.base_cache)
