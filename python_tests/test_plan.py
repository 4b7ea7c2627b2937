"""weights/plan.py: what the writer writes is what both readers read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from formats import converted_matrix
from models import ARCHITECTURES, write_base, write_module
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES, MODULE_DTYPES
from recycle_ext.weights.layout import FORMATS, Matrix, matrix_bytes
from recycle_ext.weights.pack import PackedModel, describe, pack_model
from recycle_ext.weights.plan import Stack, read_plan

MODULES = {
    "none": None,
    "all norms": {},
    "no norms": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "first embedding zero": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
}
# A list of its own: the order is the contract with csrc/common/plan.cpp and with plans of other versions.
LAYER = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def write_model(folder, architecture: str, kind: str, tied: bool = True):
    """A base and a module of a kind (or None)."""
    base = write_base(folder / "base", architecture, tied=tied)
    options = MODULES[kind]
    return base, None if options is None else write_module(folder / "module", base, **options)


def assert_holds(given: Tensor | Matrix | None, source, format: str) -> None:
    """A vector or matrix of the plan holds what the checkpoint has, in that format."""
    if source is None:
        assert given is None
    elif isinstance(given, Matrix):
        assert (given.format, given.n, given.k) == (format, *source.shape)
        _, exact = converted_matrix(source.to(), format)
        assert torch.equal(given.unpacked(), exact.to(given.compute_dtype))
    else:
        assert torch.equal(given, source.to())


def assert_stack_holds(stack: Stack, config, tensors, prefix: str, format: str) -> None:
    """A stack of the plan has the sizes of the config and the tensors of the checkpoint."""
    for name in ("hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads"):
        assert getattr(stack, name) == getattr(config, name)
    assert stack.head_dim == config.head_dim
    assert stack.eps == torch.tensor(config.rms_norm_eps, dtype=torch.float32).item()
    assert torch.equal(stack.inv_freq, config.inv_freq())
    assert len(stack.layers) == config.n_layers
    for index, layer in enumerate(stack.layers):
        assert {field.name for field in dataclasses.fields(layer)} == set(LAYER)
        for field, name in LAYER.items():
            source = tensors.get(f"{prefix}{index}.{name}")
            assert_holds(getattr(layer, field), source, format)


def assert_accepted_by_cpp(packed: PackedModel) -> None:
    """The C++ reader accepts the plan, and a step with as many draft tokens as the model has a module for."""
    drafts = 0 if packed.module_config is None else _C.MAX_DRAFTS
    plan, weights = packed.plan.numpy(), packed.weights.numpy()
    assert _C.scratch_bytes(plan, weights, 2, drafts, True, 1) > 0


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plan_of_every_architecture_and_module_is_read_as_written(tmp_path, architecture, kind):
    base, module = write_model(tmp_path, architecture, kind)
    packed = pack_model(base, module, "f32")
    view = read_plan(packed.weights, packed.plan)
    assert_accepted_by_cpp(packed)
    assert_stack_holds(view.stack, base.config, base.tensors, "model.layers.", "f32")
    embedding = base.tensors["model.embed_tokens.weight"]
    assert_holds(view.embedding, embedding, "f32")
    assert_holds(view.head, embedding, "f32")
    assert_holds(view.final_norm, base.tensors["model.norm.weight"], "f32")
    if module is None:
        assert view.module is None
        return
    assert_stack_holds(view.module.stack, module.config, module.tensors, "layers.", "f32")
    assert_holds(view.module.input_proj, module.tensors["input_proj.weight"], "f32")
    names = {"input_bias": "input_proj.bias"}
    names |= {name: f"{name}.weight" for name in ("embed_norm", "hidden_norm", "output_norm")}
    for field, name in names.items():
        assert_holds(getattr(view.module, field), module.tensors.get(name), "f32")
    assert view.module.zero_first_embedding == module.config.zero_first_embedding
    head = embedding.to()
    if module.config.draft_vocab_size:
        assert torch.equal(view.module.draft_vocab, module.draft_vocab())
        head = head[module.draft_vocab()]
    else:
        assert view.module.draft_vocab is None
    assert torch.equal(view.module.head.unpacked(), head)


@pytest.mark.parametrize("module_dtype", MODULE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_of_every_dtype_is_read_as_written(tmp_path, dtype, module_dtype):
    base, module = write_model(tmp_path, "qwen2", "draft vocabulary", tied=False)
    packed = pack_model(base, module, dtype, module_dtype)
    view = read_plan(packed.weights, packed.plan)
    assert_accepted_by_cpp(packed)
    format, head_format = DTYPES[dtype]
    assert_stack_holds(view.stack, base.config, base.tensors, "model.layers.", format)
    assert_holds(view.embedding, base.tensors["model.embed_tokens.weight"], head_format)
    assert_holds(view.head, base.tensors["lm_head.weight"], head_format)
    format, head_format = MODULE_DTYPES[module_dtype]
    assert_stack_holds(view.module.stack, module.config, module.tensors, "layers.", format)
    rows = base.tensors["lm_head.weight"].to()[module.draft_vocab()]
    exact = converted_matrix(rows, head_format)[1].to(view.module.head.compute_dtype)
    assert torch.equal(view.module.head.unpacked(), exact)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_weights_of_a_plan_are_aligned_and_do_not_overlap(tmp_path, kind, tied):
    base, module = write_model(tmp_path, "qwen3", kind, tied)
    packed = pack_model(base, module, "q4")
    view = read_plan(packed.weights, packed.plan)
    regions = set()  # a set: a tied or shared head is the embedding's or the base's region again
    stacks = [view.stack] + ([view.module.stack] if view.module else [])
    parts = [vars(view), *([vars(view.module)] if view.module else []), *map(vars, stacks)]
    parts += [vars(layer) for stack in stacks for layer in stack.layers]
    for part in parts:
        for value in part.values():
            if isinstance(value, Matrix):
                regions.add((value.offset, matrix_bytes(value.format, value.n, value.k)))
            elif isinstance(value, Tensor):
                start = value.data_ptr() - packed.weights.data_ptr()
                regions.add((start, value.numel() * value.element_size()))
    assert len(regions) > 20
    end = 0
    for start, size in sorted(regions):
        assert start % 64 == 0
        assert end <= start < end + 64  # no byte but padding is unused
        end = start + size
    assert end <= len(packed.weights) < end + 64


def test_plan_is_the_same_with_and_without_the_weights(tmp_path):
    """The first pass finds the size, the second fills the weights."""
    base, module = write_model(tmp_path, "qwen2", "draft vocabulary", tied=False)
    described = describe(base, module, "q4")
    weights = torch.empty(described.weights_bytes, dtype=torch.uint8)
    assert describe(base, module, "q4", weights=weights) == described
    assert described.entries[:4] == [_C.PLAN_MAGIC, _C.PLAN_VERSION, len(described.entries), 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plan: plan[:-1], "cut off"),
        (lambda plan: torch.cat((plan, plan[-1:])), "cut off"),
        (lambda plan: torch.cat((plan[:1], plan[1:2] + 1, plan[2:])), "another version"),
        (lambda plan: plan + 1, "not a plan"),
    ],
)
def test_damaged_plan_is_refused_by_cpp(tmp_path, damage, message):
    base, module = write_model(tmp_path, "llama", "all norms")
    packed = pack_model(base, module, "f32")
    plan = damage(packed.plan).numpy()
    with pytest.raises(ValueError, match=message):
        _C.scratch_bytes(plan, packed.weights.numpy(), 1, 1, True, 1)


def test_matrix_with_rows_of_no_whole_block_is_packed_in_bfloat16(tmp_path):
    base = write_base(tmp_path, hidden_size=48)
    packed = pack_model(base, None, "q8")
    view = read_plan(packed.weights, packed.plan)
    assert view.embedding.format == view.stack.layers[0].q.format == "bf16"
    assert view.stack.layers[0].down.format == "q8_0"  # its rows are 96 long
    assert_accepted_by_cpp(packed)
    assert set(FORMATS) >= set(packed.formats.split(", ")) == {"bf16", "q8_0"}
