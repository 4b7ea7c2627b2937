"""A prediction layer in the layout of Qwen3-Next and Qwen3.5, ``mtp.``.

    u_i = fc [pre_fc_norm_embedding(e(x_{i+1})) ; pre_fc_norm_hidden(h_i)]
    g = layers.0(u);  guess = lm_head(norm(g_i))

h is the state after the base's final norm, no embedding is zeroed, and a further guess takes norm(g) in the
place of h: vLLM's qwen3_next_mtp.py and qwen3_5_mtp.py (0.32). The norms of Qwen3-Next and Qwen3.5, those
of q and k among them, multiply by 1 + weight; a module's multiply by the weight, so 1 is added.

Only a layer of Llama's kind can be mapped. The published ones gate the output of their attention, rotate a
quarter of each head and mostly have experts: they are refused. What remains is this layout with a Qwen2 or
Qwen3 layer in it.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert.head import LAYER_PARTS, Head, mtp_head, refuse_other_layers
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_PREFIX = "mtp."
_NAMES = {
    "fc.weight": "input_proj.weight",
    "pre_fc_norm_embedding.weight": "embed_norm.weight",
    "pre_fc_norm_hidden.weight": "hidden_norm.weight",
    "norm.weight": "output_norm.weight",
}
_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}


def found_in(source: Source) -> bool:
    """Whether the names are Qwen's."""
    return f"{_PREFIX}fc.weight" in source.names


def to_module(source: Source, base: Checkpoint, before_norm: bool) -> Head:
    """As ``recycle_ext.convert.to_module``."""
    names = [name for name in source.names if name.startswith(_PREFIX)]
    refuse_other_layers(source, names)
    _refuse_gated_attention(source)
    ours = {}
    for name in names:
        rest = name.removeprefix(_PREFIX)
        if rest in _COPIES:
            source.require_same(name, base, _COPIES[rest])
        elif rest.startswith("layers.") and not rest.startswith("layers.0."):
            raise RecycleError(
                f"{source.path}: there are several prediction layers, each for one token further "
                f"(tensor {name}); a module is one layer that guesses again and again"
            )
        elif rest.removeprefix("layers.0.").startswith(LAYER_PARTS):
            ours[rest] = name
        else:
            ours[_NAMES.get(rest, rest)] = name
    for copy in ("model.embed_tokens.weight", "lm_head.weight"):
        source.require_same(copy, base, copy)
    model_type = source.fields.get("model_type", str, "")
    zero_centred = model_type.startswith(("qwen3_next", "qwen3_5"))
    return mtp_head(source, base, "Qwen MTP", ours, before_norm, zero_centred=zero_centred)


def _refuse_gated_attention(source: Source) -> None:
    """q_proj of a gated attention computes a gate beside each query: twice the rows o_proj has columns."""
    q, o = (f"{_PREFIX}layers.0.self_attn.{part}_proj.weight" for part in "qo")
    found = source.open([q, o])
    if len(found) == 2 and found[q].shape[0] == 2 * found[o].shape[1]:
        raise RecycleError(
            f"{source.path}: the head's attention gates its output (tensor {q} has "
            f"{found[q].shape[0]} rows for {found[o].shape[1]} columns of o_proj), and a module's does not"
        )
