"""The prediction layer of MiMo-7B (Base, SFT, RL), ``model.mtp_layers.0.``.

    u_i = input_proj [hidden_layernorm(h_i) ; token_layernorm(e(x_{i+1}))]       hidden first
    g = a Qwen2 layer (u), with a bias on q, k and v;  q_i = softmax(lm_head(final_layernorm(g_i)))

h is the base's state after its final norm, the embedding of row 0 is zero, and for a further draft token
final_layernorm(g) takes the place of h (MiMo's modeling_mimo.py; vLLM 0.32's mimo_mtp.py).
MiMo-V2's attention has sinks and windows and cannot be converted.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert.head import Head, refuse_other_layers
from recycle_ext.convert.mtp import module_names, mtp_head
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_PREFIX = "model.mtp_layers."
_NAMES = {
    "input_proj.weight": "input_proj.weight",
    "token_layernorm.weight": "embed_norm.weight",
    "hidden_layernorm.weight": "hidden_norm.weight",
    "final_layernorm.weight": "output_norm.weight",
}


def found_in(source: Source) -> bool:
    """Whether the tensors have MiMo's names."""
    return any(name.startswith(_PREFIX) for name in source.names)


def to_module(source: Source, base: Checkpoint, before_norm: bool) -> Head:
    """As ``recycle_ext.convert.to_module``."""
    names = [name for name in source.names if name.startswith(_PREFIX)]
    refuse_other_layers(source, names)
    if more := [name for name in names if not name.startswith(f"{_PREFIX}0.")]:
        raise RecycleError(
            f"{source.path}: there are several prediction layers, each for one token further "
            f"(tensor {more[0]}); a module is one layer that drafts again and again"
        )
    ours = module_names(source, base, f"{_PREFIX}0.", _NAMES, copies={})
    return mtp_head(source, base, "MiMo MTP", ours, before_norm, hidden_first=True, zero_first_embedding=True)
