"""Names and shapes of the tensors of a model of given sizes."""

from __future__ import annotations

from collections.abc import Mapping

from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig, StackConfig
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError

Shapes = dict[str, tuple[int, ...]]


def layer_shapes(config: StackConfig, prefix: str, input_norm: bool = True) -> Shapes:
    """Tensors of one layer; ``prefix`` is "model.layers.0." or "layers.0."."""
    d, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: Shapes = {"input_layernorm.weight": (d,)} if input_norm else {}
    for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, d)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes |= {
        "self_attn.o_proj.weight": (d, q_rows),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (inner, d),
        "mlp.up_proj.weight": (inner, d),
        "mlp.down_proj.weight": (d, inner),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def base_shapes(config: ModelConfig) -> Shapes:
    """Tensors of a base model."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.n_layers):
        shapes |= layer_shapes(config, f"model.layers.{index}.")
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def module_shapes(config: ModuleConfig) -> Shapes:
    """Tensors of a recyclable module."""
    d = config.hidden_size
    shapes: Shapes = {"input_proj.weight": (d, 2 * d)}
    if config.input_bias:
        shapes["input_proj.bias"] = (d,)
    for part in ("embed", "hidden", "output"):
        if getattr(config, f"{part}_norm"):
            shapes[f"{part}_norm.weight"] = (d,)
    for index in range(config.n_layers):
        has_norm = index > 0 or config.first_input_norm
        shapes |= layer_shapes(config, f"layers.{index}.", input_norm=has_norm)
    if config.draft_vocab_size:
        shapes["draft_vocab"] = (config.draft_vocab_size,)
    return shapes


def check_layers(n_layers: int, tensors: Mapping[str, TensorSource], file: str) -> None:
    """Refuses more layers than tensors, before listing their shapes takes all memory."""
    if n_layers > len(tensors):
        raise RecycleError(f"{file}: {n_layers} layers, and only {len(tensors)} tensors")


def check_tensors(tensors: Mapping[str, TensorSource], shapes: Shapes, file: str) -> None:
    """Refuses a missing tensor, an unexpected tensor and a wrong shape."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise RecycleError(f"{file}: tensor {name} is missing; its shape would be {list(shape)}")
        if (given := tensors[name].shape) != shape:
            raise RecycleError(
                f"{tensors[name].file}: tensor {name} has shape {list(given)}; "
                f"the sizes of the model ask for {list(shape)}"
            )
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise RecycleError(f"{tensors[unknown[0]].file}: tensor {unknown[0]} has no place in this architecture")
