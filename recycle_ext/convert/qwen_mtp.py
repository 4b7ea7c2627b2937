"""A prediction layer in the layout of Qwen3-Next and Qwen3.5, ``mtp.``.

    u_i = fc [pre_fc_norm_embedding(e(x_{i+1})) ; pre_fc_norm_hidden(h_i)]
    g = layers.0(u);  q_i = softmax(lm_head(norm(g_i)))

h is the state after the base's final norm, no embedding is zero, and for a further draft token norm(g) takes the place
of h (vLLM 0.32's qwen3_next_mtp.py and qwen3_5_mtp.py). The norms of Qwen3-Next and Qwen3.5, those of q and k among
them, multiply by 1 + weight; a module's norms multiply by the weight, so the converter adds 1.

Only a layer of Llama's kind can be converted: this layout around a Qwen2 or Qwen3 layer. The published heads gate the
output of their attention, rotate a quarter of each head and mostly have experts, and are refused.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert.head import Head, refuse_other_layers
from recycle_ext.convert.mtp import module_names, mtp_head
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_PREFIX = "mtp."
_NAMES = {
    "fc.weight": "input_proj.weight",
    "pre_fc_norm_embedding.weight": "embed_norm.weight",
    "pre_fc_norm_hidden.weight": "hidden_norm.weight",
    "norm.weight": "output_norm.weight",
}
_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}


def found_in(source: Source) -> bool:
    """Whether the tensors have Qwen's names."""
    return f"{_PREFIX}fc.weight" in source.names


def to_module(source: Source, base: Checkpoint, before_norm: bool) -> Head:
    """As ``recycle_ext.convert.to_module``."""
    names = [name for name in source.names if name.startswith(_PREFIX)]
    refuse_other_layers(source, names)
    _refuse_gated_attention(source)
    layers = [name for name in names if name.startswith(f"{_PREFIX}layers.")]
    if more := [name for name in layers if not name.startswith(f"{_PREFIX}layers.0.")]:
        raise RecycleError(
            f"{source.path}: there are several prediction layers, each for one token further "
            f"(tensor {more[0]}); a module is one layer that drafts again and again"
        )
    ours = module_names(source, base, _PREFIX, _NAMES, _COPIES)
    model_type = source.fields.get("model_type", str, "")
    zero_centered = model_type.startswith(("qwen3_next", "qwen3_5"))
    return mtp_head(source, base, "Qwen MTP", ours, before_norm, zero_centered=zero_centered)


def _refuse_gated_attention(source: Source) -> None:
    """Raises RecycleError for a q_proj with twice as many rows as o_proj has columns: half of them are gates."""
    q, o = (f"{_PREFIX}layers.0.self_attn.{part}_proj.weight" for part in "qo")
    found = source.open([q, o])
    if len(found) == 2 and found[q].shape[0] == 2 * found[o].shape[1]:
        raise RecycleError(
            f"{source.path}: the head's attention gates its output (tensor {q} has "
            f"{found[q].shape[0]} rows for {found[o].shape[1]} columns of o_proj), and a module's does not"
        )
