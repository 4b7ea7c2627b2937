"""Converts heads of other projects to recyclable modules, and modules to EAGLE-1 heads.

Each format is a file with its names, its formula and what cannot be converted:

    eagle.py          EAGLE-1, both ways
    mimo_mtp.py       the prediction layer of MiMo-7B
    deepseek_mtp.py   DeepSeek-V3's layout, where the layer in it is a Llama layer
    qwen_mtp.py       Qwen's layout ("mtp."), likewise

Every format computes u_i = W_in [a(e(x_{i+1})) ; b(h_i)] (+ bias), g = layers(u), head(n(g)), as a module does. h_i is
the base's state after its final norm; final_norm.py is for heads that were trained on the state before that norm. The
formats differ in how the head's output is fed back for the second draft token: each file says how.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert import deepseek_mtp, eagle, mimo_mtp, qwen_mtp
from recycle_ext.convert.head import Head
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_FORMATS = [eagle, mimo_mtp, deepseek_mtp, qwen_mtp]


def to_module(source: Source, base: Checkpoint, before_norm: bool = False) -> Head:
    """The head in ``source`` as a module for ``base``; the names of its tensors tell its format.

    before_norm: whether the head was trained on the base's state before its final norm. Raises RecycleError, with the
    reason, for a head that no module can compute.
    """
    for format in _FORMATS:
        if format.found_in(source):
            return format.to_module(source, base, before_norm)
    raise RecycleError(
        f"{source.path}: no head of a known format; the formats, each with a tensor that shows it, are EAGLE-1 "
        "(fc.weight), MiMo (model.mtp_layers.0.input_proj.weight), DeepSeek "
        "(model.layers.N.eh_proj.weight) and Qwen (mtp.fc.weight)"
    )
