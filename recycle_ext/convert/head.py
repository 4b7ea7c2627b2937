"""What a conversion gives, and the steps that all MTP formats share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.shapes import module_shapes
from recycle_ext.convert import final_norm
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

# Parts of a Llama layer, which everyone calls the same.
LAYER_PARTS = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
NOT_LLAMA = {
    "self_attn.kv_a_proj_with_mqa.": "multi-head latent attention (MLA), and a module's is grouped-query",
    "self_attn.sinks": "attention sinks, which a module's attention lacks",
    "linear_attn.": "linear attention, which a module lacks",
    "mlp.experts.": "a mixture of experts, and a module's MLP is dense",
    "mlp.gate.": "a mixture of experts, and a module's MLP is dense",
    "mlp.shared_expert": "a mixture of experts, and a module's MLP is dense",
}


@dataclass
class Head:
    """A module: config, tensors (float32, by the names of DESIGN section 5), and what to tell the user."""

    config: ModuleConfig
    tensors: dict[str, torch.Tensor]
    format: str
    notes: list[str] = field(default_factory=list)


def refuse_other_layers(source: Source, names: list[str]) -> None:
    """Refuses a layer that is not Llama's, by the tensor that shows it."""
    for name in names:
        for part, reason in NOT_LLAMA.items():
            if part in name:
                raise RecycleError(f"{source.path}: the head's layer has {reason} (tensor {name})")


def layer_flags(names: dict[str, str]) -> dict[str, bool]:
    """qkv_bias and qk_norm, from the module's names of the tensors that are there."""
    return {
        "qkv_bias": "layers.0.self_attn.q_proj.bias" in names,
        "qk_norm": "layers.0.self_attn.q_norm.weight" in names,
    }


def mtp_head(
    source: Source,
    base: Checkpoint,
    format: str,
    names: dict[str, str],
    before_norm: bool,
    *,
    hidden_first: bool = False,
    zero_first_embedding: bool = False,
    zero_centred: bool = False,
) -> Head:
    """A prediction layer with all four norms and no bias, as MiMo's, DeepSeek's and Qwen's are.

    names: name in ``source`` of each of the module's tensors. hidden_first: W_in takes [b(h) ; a(e)].
    zero_centred: norms multiply by 1 + weight. The others as in ``to_module`` and ``ModuleConfig``.
    """
    config = ModuleConfig(
        **source.sizes(base),
        **layer_flags(names),
        n_layers=1,
        embed_norm=True,
        hidden_norm=True,
        output_norm=True,
        first_input_norm=True,
        input_bias=False,
        zero_first_embedding=zero_first_embedding,
    )
    tensors = source.read(names, module_shapes(config))
    if zero_centred:
        tensors = {n: t + 1 if n.endswith("norm.weight") else t for n, t in tensors.items()}
    if hidden_first:
        hidden, embedding = tensors["input_proj.weight"].chunk(2, dim=1)
        tensors["input_proj.weight"] = torch.cat((embedding, hidden), dim=1)
    head = Head(config, tensors, format)
    if before_norm:
        return final_norm.fold(head, base)
    head.notes.append(
        "the first guess of each step is exactly this head's; further ones (--drafts 2 to 4) are not: "
        "vLLM feeds the head's output back after its last norm, recycle_ext before it"
    )
    return head
