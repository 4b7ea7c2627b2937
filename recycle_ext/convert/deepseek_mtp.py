"""A prediction layer in DeepSeek-V3's layout: one more layer, ``model.layers.N.``, after the model's N.

    u_i = eh_proj [enorm(e(x_{i+1})) ; hnorm(h_i)]
    g = layer(u);  q_i = softmax(shared_head.head(shared_head.norm(g_i)))

(DeepSeek-V3 report, arXiv 2412.19437, eq. 21 to 23.) As in vLLM 0.32, h is the state after the base's final norm, the
embedding of row 0 is zero (SGLang does not zero it), and for a further draft token shared_head.norm(g) takes the place
of h. The layer may have copies of the embedding and of the output matrix.

Only a layer of Llama's kind can be converted: dense, with grouped-query attention. DeepSeek-V3 and R1 (latent
attention, experts) and GLM-4.5 (experts) have other layers and are refused.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert.head import Head, refuse_other_layers
from recycle_ext.convert.mtp import module_names, mtp_head
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_MARK = "eh_proj.weight"
_NAMES = {
    _MARK: "input_proj.weight",
    "enorm.weight": "embed_norm.weight",
    "hnorm.weight": "hidden_norm.weight",
    "shared_head.norm.weight": "output_norm.weight",
}
_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def found_in(source: Source) -> bool:
    """Whether a layer has a projection of DeepSeek's name."""
    return any(n.startswith("model.layers.") and n.endswith(_MARK) for n in source.names)


def to_module(source: Source, base: Checkpoint, before_norm: bool) -> Head:
    """As ``recycle_ext.convert.to_module``."""
    prefixes = [name.removesuffix(_MARK) for name in source.names if name.endswith(_MARK)]
    if len(prefixes) > 1:
        raise RecycleError(
            f"{source.path}: there are {len(prefixes)} prediction layers, each for one token further; "
            "a module is one layer that drafts again and again"
        )
    prefix = prefixes[0]
    refuse_other_layers(source, [name for name in source.names if name.startswith(prefix)])
    ours = module_names(source, base, prefix, _NAMES, _COPIES)
    return mtp_head(source, base, "DeepSeek MTP", ours, before_norm, zero_first_embedding=True)
