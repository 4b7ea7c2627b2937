"""Converts a head that was trained on the base's state before its final norm to take the state after that norm.

Let x be the state before the norm, z = x / rms(x), w the weight of the base's final norm, and v the weight of the
head's norm of the state. Elementwise, the module's input is h = w z, and the head's matrix needs z v. A second norm
of h gives another direction unless w is constant. But z v = h (v / w), so that

    W_hidden (z v) = (W_hidden diag(v / w)) h

and a module with this matrix needs no norm on the state (hidden_norm false). The conversion is exact where w has no
zero and both norms have the same eps. For a second draft token the head norms its output before it takes the place of
x; the module without that norm does not.
"""

from __future__ import annotations

import dataclasses

import torch

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.convert.head import Head
from recycle_ext.errors import RecycleError


def fold(head: Head, base: Checkpoint) -> Head:
    """The same head without its norm of the state, for the base's state after the final norm.

    Raises RecycleError where the final norm cannot be undone.
    """
    norm = base.tensors["model.norm.weight"]
    w = norm.to(torch.float64)
    if (w == 0).any():
        raise RecycleError(
            f"{norm.file}: the final norm's weight {norm.name} is 0 in dimension "
            f"{int((w == 0).nonzero()[0])}: the state before the norm, which the head was trained on, cannot "
            "be computed from the state after the norm"
        )
    if head.config.rms_norm_eps != base.config.rms_norm_eps:
        raise RecycleError(
            f"the head's rms_norm_eps is {head.config.rms_norm_eps}, the base's "
            f"{base.config.rms_norm_eps}: the head's norm of the state before the base's final norm "
            "cannot be computed from the state after it"
        )
    tensors = dict(head.tensors)
    v = tensors.pop("hidden_norm.weight").double()
    embedding, hidden = tensors["input_proj.weight"].double().chunk(2, dim=1)
    tensors["input_proj.weight"] = torch.cat((embedding, hidden * (v / w)), dim=1)
    note = (
        "the first draft token of each step is exactly this head's, its norm of the state folded into "
        "input_proj; further ones (--drafts 2 to 4) are not: the head norms its output before feeding "
        "it back, the module does not"
    )
    config = dataclasses.replace(head.config, hidden_norm=False)
    return dataclasses.replace(head, config=config, tensors=tensors, notes=[*head.notes, note])
