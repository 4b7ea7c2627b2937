"""Packed models of given shapes with random weights; the speed does not depend on the weights' values."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.checkpoint.shapes import Shapes, base_shapes, module_shapes
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.weights.layout import PANEL_ROWS, Matrix, pack_matrix
from recycle_ext.weights.pack import PackedModel, describe
from recycle_ext.weights.plan import Stack, read_plan


@dataclass(frozen=True)
class ShapeOf:
    """A base model to measure, and the modules to measure it with, by name."""

    name: str
    base: ModelConfig
    modules: dict[str, ModuleConfig]


def _base(name: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int,
          head_dim: int, tied: bool) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        qkv_bias=False,
        qk_norm=False,
        bos_token_id=None,
        eos_token_ids=(),
        name=name,
    )


def _module(
    base: ModelConfig, layers: int, inner: int, heads: int, kv_heads: int, draft_vocab: int = 0
) -> ModuleConfig:
    return dataclasses.replace(
        ModuleConfig.like(base, layers, draft_vocab), intermediate_size=inner, n_heads=heads, n_kv_heads=kv_heads
    )


def _shapes() -> list[ShapeOf]:
    # The paper's (arXiv 2308.03421): 24 layers, hidden size 2048, 32 heads, intermediate size 5504, vocabulary 50,257
    # (here a multiple of 16). The paper's module has 6 layers and 15% of the parameters, hence narrower layers.
    paper = _base("RecycleGPT-1.3B", 50272, 2048, 5504, 24, 32, 32, 64, True)
    small = _base("SmolLM2-135M", 49152, 576, 1536, 30, 9, 3, 64, True)
    llama = _base("Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, 64, True)
    return [
        ShapeOf(
            paper.name,
            paper,
            {"module +15%": _module(paper, 6, 3744, 16, 16), "6 full layers": _module(paper, 6, 5504, 32, 32)},
        ),
        ShapeOf(small.name, small, {"1 layer": _module(small, 1, 1536, 9, 3, 8192)}),
        ShapeOf(llama.name, llama, {"1 layer": _module(llama, 1, 8192, 32, 8)}),
    ]  # fmt: skip


SHAPES = _shapes()


def random_model(base: ModelConfig, module: ModuleConfig | None, dtype: str, device: torch.device) -> PackedModel:
    """A packed model with random matrices; the norms' weights are 1."""
    description = describe(
        _sources(base, base_shapes(base)), None if module is None else _sources(module, module_shapes(module)), dtype
    )
    weights = torch.zeros(description.weights_bytes, dtype=torch.uint8, device=device)
    packed = description.packed_model(weights)
    view = read_plan(weights, packed.plan)
    samples: dict[tuple[str, int], Tensor] = {}
    _fill(view.stack, base, samples)
    for matrix in (view.embedding, view.head):
        _fill_matrix(matrix, samples)
    view.final_norm.fill_(1)
    if module is not None:
        _fill(view.module.stack, module, samples)
        for matrix in (view.module.input_proj, view.module.head):
            _fill_matrix(matrix, samples)
        for norm in (view.module.embed_norm, view.module.hidden_norm, view.module.output_norm):
            norm.fill_(1)
        if module.draft_vocab_size:
            view.module.draft_vocab.copy_(torch.arange(module.draft_vocab_size, device="cpu"))
    return packed


def _sources(config: ModelConfig | ModuleConfig, shapes: Shapes) -> SimpleNamespace:
    """The attributes of a checkpoint that ``describe`` reads, without a file."""
    nowhere = Path("random weights")
    tensors = {name: TensorSource(name, shape, "bf16", nowhere, 0, 0) for name, shape in shapes.items()}
    if "draft_vocab" in tensors:  # the only tensor whose values ``describe`` reads
        tensors["draft_vocab"] = SimpleNamespace(raw_rows=functools.partial(torch.arange, device="cpu"))
    return SimpleNamespace(config=config, tensors=tensors, path=str(nowhere))


def _fill(stack: Stack, config: ModelConfig | ModuleConfig, samples: dict[tuple[str, int], Tensor]) -> None:
    stack.inv_freq.copy_(config.inv_freq())
    for layer in stack.layers:
        for value in vars(layer).values():
            if isinstance(value, Matrix):
                _fill_matrix(value, samples)
            elif value is not None:
                value.fill_(1)


def _fill_matrix(matrix: Matrix, samples: dict[tuple[str, int], Tensor]) -> None:
    """Repeats eight random panels: drawing and packing all of a large matrix would take minutes."""
    key = (matrix.format, matrix.k)
    if key not in samples:
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(8 * PANEL_ROWS, matrix.k, generator=generator, dtype=torch.float32, device="cpu")
        packed = pack_matrix(rows / matrix.k**0.5, matrix.format)
        samples[key] = packed.view(8, matrix.panel_bytes()).to(matrix.weights.device)
    panels = matrix.panels()
    for start in range(0, len(panels), 8):
        rest = panels[start : start + 8]
        rest.copy_(samples[key][: len(rest)])
