"""Text read under the base model, in one pass: how likely each token was, and what the base would have said.

The base is the one in plain PyTorch (``reference.BaseModel``), so that the judge is none of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.reference.model import BaseModel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_AT_ONCE = 8  # sequences in a pass


def load_base(checkpoint: Checkpoint, dtype: str, device: torch.device) -> BaseModel:
    """The base with the weights of its file (dequantised), in a format of DTYPES."""
    model = BaseModel(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict(DTYPES[dtype]), assign=True)
    return model.to(device).eval()


@torch.no_grad()
def read(
    base: BaseModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """texts: prompts and what follows them, token ids. Yields for each, in their order,

    log_likelihoods [n] float32: ln p(token | prompt, tokens before), in nats (temperature 1), and
    picks [n] int64: the most likely token there.
    """
    device = base.inv_freq.device
    for start in range(0, len(texts), _AT_ONCE):
        group = texts[start : start + _AT_ONCE]
        # Zeros at the end are seen by no token before them.
        length = max(len(prompt) + len(text) for prompt, text in group)
        tokens = torch.zeros(len(group), length, dtype=torch.int64)
        for row, (prompt, text) in zip(tokens, group, strict=True):
            row[: len(prompt) + len(text)] = torch.tensor([*prompt, *text])
        hidden = base(tokens.to(device))
        for row, (prompt, text) in zip(hidden, group, strict=True):
            # The state before a token is what speaks of it.
            logits = base.logits(row[len(prompt) - 1 : len(prompt) + len(text) - 1]).float()
            given = torch.tensor(text, dtype=torch.int64, device=device)[:, None]
            log_likelihoods = logits.gather(1, given)[:, 0] - logits.logsumexp(1)
            yield log_likelihoods.cpu(), logits.argmax(1).cpu()
