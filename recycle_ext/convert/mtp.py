"""The steps that the MTP formats share: MiMo's, DeepSeek's and Qwen's prediction layers have one formula.

    u_i = W_in [a(e(x_{i+1})) ; b(h_i)],  g = layer(u),  q_i = softmax(lm_head(n(g_i)))

a, b and n are RMSNorms (DeepSeek-V3 report, arXiv 2412.19437, eq. 21 to 23).
"""

from __future__ import annotations

import torch

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.shapes import module_shapes
from recycle_ext.convert import final_norm
from recycle_ext.convert.head import Head, layer_flags
from recycle_ext.convert.source import Source

# Parts of a Llama layer, which have these names in every format.
_LAYER_PARTS = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def module_names(
    source: Source, base: Checkpoint, prefix: str, renamed: dict[str, str], copies: dict[str, str]
) -> dict[str, str]:
    """Name in ``source`` of each of the module's tensors.

    prefix: of the prediction layer's tensors. renamed: the module's names of those outside the layer. copies: those
    that must be copies of the base's embedding or output matrix, with the base's name. Raises RecycleError where
    one is not.
    """
    names = {}
    for name in source.names:
        if not name.startswith(prefix):
            continue
        part = name.removeprefix(prefix).removeprefix("layers.0.")
        if part in copies:
            source.require_same(name, base, copies[part])
        elif part.startswith(_LAYER_PARTS):
            names[f"layers.0.{part}"] = name
        else:
            names[renamed.get(part, part)] = name
    # The head was trained with the matrices that came with it; --base may be another directory.
    for name in (_EMBEDDING, _LM_HEAD):
        source.require_same(name, base, name)
    return names


def mtp_head(
    source: Source,
    base: Checkpoint,
    format: str,
    names: dict[str, str],
    before_norm: bool,
    *,
    hidden_first: bool = False,
    zero_first_embedding: bool = False,
    zero_centered: bool = False,
) -> Head:
    """A prediction layer as a module.

    names: as ``module_names`` returns them. hidden_first: W_in takes [b(h) ; a(e)]. zero_centered: norms multiply by
    1 + weight. The others as in ``recycle_ext.convert.to_module`` and ``ModuleConfig``.
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
    if zero_centered:
        tensors = {n: t + 1 if n.endswith("norm.weight") else t for n, t in tensors.items()}
    if hidden_first:
        hidden, embedding = tensors["input_proj.weight"].chunk(2, dim=1)
        tensors["input_proj.weight"] = torch.cat((embedding, hidden), dim=1)
    head = Head(config, tensors, format)
    if before_norm:
        return final_norm.fold(head, base)
    head.notes.append(
        "the first draft token of each step is exactly this head's; further ones (--drafts 2 to 4) are not: "
        "vLLM feeds the head's output back after its last norm, recycle_ext before it"
    )
    return head
