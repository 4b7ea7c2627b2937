"""A head that was trained on the base's state before its final norm, made to take the state after it.

Let x be the state before, z = x / rms(x), w the weight of the base's final norm, and v the weight of the
head's own norm of the state. Elementwise, the module gets h = w z, and the head wants z v. Norming h again
would not do: w h / rms(h) has another direction, unless w is constant. But z v = h (v / w), so that

    W_hidden (z v) = (W_hidden diag(v / w)) h

and the module is one without a norm on the state (hidden_norm false) and with this matrix. It is exact
where w has no zero and both norms have one eps, for h is what the base computes. For a second guess the
head takes its own output in the place of x, and norms it, which the module without that norm does not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.errors import RecycleError

if TYPE_CHECKING:
    from recycle_ext.convert.head import Head


def fold(head: Head, base: Checkpoint) -> Head:
    """The same head without its norm of the state, for the base's state after its final norm."""
    norm = base.tensors["model.norm.weight"]
    w = norm.to(torch.float64)
    if (w == 0).any():
        raise RecycleError(
            f"{norm.file}: the final norm's weight {norm.name} is 0 in dimension "
            f"{int((w == 0).nonzero()[0])}: the state before the norm cannot be had from the one after "
            "it, and the head was trained on the one before"
        )
    if head.config.rms_norm_eps != base.config.rms_norm_eps:
        raise RecycleError(
            f"the head's rms_norm_eps is {head.config.rms_norm_eps}, the base's "
            f"{base.config.rms_norm_eps}: the head's norm of the state before the base's final norm "
            "cannot be had from the state after it"
        )
    tensors = dict(head.tensors)
    v = tensors.pop("hidden_norm.weight").double()
    embedding, hidden = tensors["input_proj.weight"].double().chunk(2, dim=1)
    tensors["input_proj.weight"] = torch.cat((embedding, hidden * (v / w)), dim=1)
    note = (
        "the first guess of each step is exactly this head's, its norm of the state folded into "
        "input_proj; further ones (--drafts 2 to 4) are not: the head norms its own output before it "
        "takes it in again, the module does not"
    )
    config = dataclasses.replace(head.config, hidden_norm=False)
    return dataclasses.replace(head, config=config, tensors=tensors, notes=[*head.notes, note])
