"""What a conversion returns, and the checks that all formats share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

# Tensors of layers that are not Llama's, each with the reason for the refusal.
_NOT_LLAMA = {
    "self_attn.kv_a_proj_with_mqa.": "multi-head latent attention (MLA), and a module's is grouped-query",
    "self_attn.sinks": "attention sinks, which a module's attention lacks",
    "linear_attn.": "linear attention, which a module lacks",
    "mlp.experts.": "a mixture of experts, and a module's MLP is dense",
    "mlp.gate.": "a mixture of experts, and a module's MLP is dense",
    "mlp.shared_expert": "a mixture of experts, and a module's MLP is dense",
}


@dataclass
class Head:
    """A converted head: a module's config, its tensors (float32, named as in docs/formats.md) and notes for the user."""

    config: ModuleConfig
    tensors: dict[str, torch.Tensor]
    format: str
    notes: list[str] = field(default_factory=list)


def refuse_other_layers(source: Source, names: list[str]) -> None:
    """Raises RecycleError for a layer that is not Llama's; the message names the tensor that shows it."""
    for name in names:
        for part, reason in _NOT_LLAMA.items():
            if part in name:
                raise RecycleError(f"{source.path}: the head's layer has {reason} (tensor {name})")


def layer_flags(names: dict[str, str]) -> dict[str, bool]:
    """qkv_bias and qk_norm of a module with tensors of these names."""
    return {
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in names,
        "qk_norm": "layers.0.self_attn.q_norm.weight" in names,
    }
