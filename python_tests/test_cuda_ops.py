"""The CUDA ops in a CUDA build of torch, with or without a GPU: registration, shapes, refusals."""

from __future__ import annotations

import pytest
import torch
from models import write_base, write_module

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.generate.model import load
from recycle_ext.ops.registration import HAS_CUDA_OPS
from recycle_ext.weights.pack import pack_model

needs_cuda_ops = pytest.mark.skipif(not HAS_CUDA_OPS, reason="needs a CUDA build of torch and of recycle_ext")


@needs_cuda_ops
@pytest.mark.parametrize("op", ["attention_decode", "recycle_head", "decode_step", "prefill", "finish_prefill"])
def test_op_has_a_cuda_kernel(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"recycle::{op}", "CUDA")


@needs_cuda_ops
def test_fake_step_without_a_gpu_has_the_shapes(tmp_path):
    base = write_base(tmp_path / "base")
    packed = pack_model(base, write_module(tmp_path / "module", base), "f32")
    decoder = Decoder(packed, "verify", 2, batch=3, capacity=40)
    arguments = decoder.arguments()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            torch.empty_like(mode.from_tensor(a), device="cuda")
            if isinstance(a, torch.Tensor) and a is not packed.plan
            else a
            for a in arguments
        ]
        tokens, counts = torch.ops.recycle.decode_step(*fakes)
        assert (tokens.shape, tokens.device.type) == ((3, 3), "cuda")
        assert (counts.shape, counts.dtype) == ((3,), torch.int64)
        tokens, _ = torch.ops.recycle.finish_prefill(*fakes, 1)
        assert tokens.shape == (3, 3)


@needs_cuda_ops
def test_current_stream_of_torch_is_found():
    assert torch.ops.recycle.knows_streams()


@needs_cuda_ops
def test_zeros_as_a_plan_are_refused():
    with pytest.raises(ValueError, match="not a plan made by recycle_ext"):
        torch.ops.recycle.gpu_scratch_bytes(torch.zeros(9, dtype=torch.int64), 0, 1, 1, True, 0)


@needs_cuda_ops
def test_missing_gpu_is_named(tmp_path):
    packed = pack_model(write_base(tmp_path), None, "f32")
    with pytest.raises(ValueError, match="there is no GPU cuda:63"):
        torch.ops.recycle.gpu_scratch_bytes(packed.plan, packed.weights.numel(), 1, 0, True, 63)


@needs_cuda_ops
def test_finish_prefill_on_the_cpu_is_refused(tmp_path):
    """The CPU's prefill op runs the whole prompt, so finish_prefill has no CPU kernel."""
    packed = pack_model(write_base(tmp_path), None, "f32")
    decoder = Decoder(packed, "standard", capacity=40)
    with pytest.raises(NotImplementedError, match="finish_prefill"):
        torch.ops.recycle.finish_prefill(*decoder.arguments(), 0)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device is 'tpu'; it must be cpu, cuda or cuda:N"),
        ("mps", "device is 'mps'; it must be cpu, cuda or cuda:N"),
        ("cuda:99", "device is 'cuda:99', but "),
    ],
)
def test_unusable_device_is_refused_with_the_reason(device, message):
    with pytest.raises(RecycleError, match=message):
        load(device=device)
