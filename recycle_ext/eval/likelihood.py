"""Scores of text under the base model: the log-likelihood of each token, and the base model's argmax there.

The base model is ``reference.BaseModel``, in plain PyTorch: the scores do not depend on the kernels under test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.reference.model import BaseModel

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_BATCH = 8  # sequences in a forward pass


def load_base(checkpoint: Checkpoint, dtype: str, device: torch.device) -> BaseModel:
    """The base model with the dequantized weights of its file. dtype: of DTYPES."""
    model = BaseModel(checkpoint.config)
    model.load_state_dict(checkpoint.state_dict(DTYPES[dtype]), assign=True)
    return model.to(device).eval()


@torch.no_grad()
def read(base: BaseModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores texts, given as (prompt, continuation) token ids. Yields for each, in order,

    log_likelihoods [n] float32: ln p(token | prompt, tokens before) of the continuation in nats, temperature 1, and
    argmax [n] int64: the most likely token at each position.
    """
    device = base.inv_freq.device
    for start in range(0, len(texts), _BATCH):
        group = texts[start : start + _BATCH]
        # Padding at the end changes no earlier token: attention is causal.
        length = max(len(prompt) + len(text) for prompt, text in group)
        tokens = torch.zeros(len(group), length, dtype=torch.int64, device="cpu")
        for row, (prompt, text) in zip(tokens, group, strict=True):
            row[: len(prompt) + len(text)] = torch.tensor([*prompt, *text], device="cpu")
        hidden = base(tokens.to(device))
        for row, (prompt, text) in zip(hidden, group, strict=True):
            # The hidden state at a position predicts the next token.
            logits = base.logits(row[len(prompt) - 1 : len(prompt) + len(text) - 1]).float()
            given = torch.tensor(text, dtype=torch.int64, device=device)[:, None]
            log_likelihoods = logits.gather(1, given)[:, 0] - logits.logsumexp(1)
            yield log_likelihoods.cpu(), logits.argmax(1).cpu()
