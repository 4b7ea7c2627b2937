"""Heads from elsewhere into our module format, and ours into an EAGLE-1 head.

A format is a file here with its names, its formula and what of it cannot be mapped:

    eagle.py          EAGLE-1, both ways
    mimo_mtp.py       the prediction layer of MiMo-7B
    deepseek_mtp.py   DeepSeek-V3's layout, where the layer in it is a Llama layer
    qwen_mtp.py       Qwen's layout ("mtp."), likewise

All of them compute u_i = W_in [a(e(x_{i+1})) ; b(h_i)] (+ bias), g = layers(u), head(n(g)) with h_i the
base's state after its final norm, as ours does; final_norm.py is for heads that saw it before. Where a
head feeds its own output back for a second guess and a third, the formats part ways: each says how.
"""

from __future__ import annotations

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert import deepseek_mtp, eagle, mimo_mtp, qwen_mtp
from recycle_ext.convert.head import Head
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_FORMATS = [eagle, mimo_mtp, deepseek_mtp, qwen_mtp]


def to_module(source: Source, base: Checkpoint, before_norm: bool = False) -> Head:
    """The head in ``source`` as a module for ``base``; its format is told by the names of its tensors.

    before_norm: the head was trained on the base's state before its final norm. Raises RecycleError for
    what has no counterpart in a module, with the reason.
    """
    for format in _FORMATS:
        if format.found_in(source):
            return format.to_module(source, base, before_norm)
    raise RecycleError(
        f"{source.path}: no head of a known format; known by a tensor each are EAGLE-1 (fc.weight), "
        "MiMo (model.mtp_layers.0.input_proj.weight), DeepSeek (model.layers.N.eh_proj.weight) and "
        "Qwen (mtp.fc.weight)"
    )
