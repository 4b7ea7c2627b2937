"""Text that the base model writes itself: what a module is trained on when no other text is given.

A module has to guess what the base says next, so the base's own words are the right examples. Each
sequence starts from a prompt, goes on hot for a while (so that sequences differ), then at a
temperature of its own, 0 among them, as it will be used. When the model ends a text, a new prompt
follows in the same sequence.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor

from recycle_ext.reference import BaseModel, KvCache

HOT_TOKENS = 12
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)


class Prompts:
    """Endless prompts from the lists in ``prompts.txt``: plain openings and, for a model that knows
    ChatML's markers (SmolLM2, Qwen), turns of a chat.
    """

    def __init__(self, encode: Callable[[str], list[int]], seed: int) -> None:
        text = resources.files("recycle_ext").joinpath("prompts.txt").read_text("utf-8")
        self.lists: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith("["):
                self.lists[line.strip("[]")] = current = []
            elif line and not line.startswith("#"):
                current.append(line)
        self._encode = encode
        self._chat = len(encode("<|im_start|>")) == 1
        self._random = random.Random(seed)

    def next(self) -> list[int]:
        """Token ids of one prompt."""
        kind = self._random.random()
        topic = self._random.choice(self.lists["topics"])
        if not self._chat or kind < 0.4:
            openings = self.lists["openings"]
            return self._encode(self._random.choice(openings).replace("{topic}", topic))
        if kind < 0.6:
            # The model writes the question as well.
            return self._encode("<|im_start|>user\n")
        request = self._random.choice(self.lists["requests"]).replace("{topic}", topic)
        turn = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        return self._encode(turn)


@torch.no_grad()
def write_text(
    base: BaseModel,
    prompts: Prompts,
    ends: set[int],
    batch: int,
    length: int,
    seed: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """Lets the base write ``batch`` sequences of ``length`` tokens.

    ends: tokens after which a new prompt follows. progress: told how many tokens were written.
    Returns tokens [batch, length] int64 and the hidden states they were written from
    [batch, length, d], in the base's dtype: row i is the state after token i.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = KvCache(length)
    tokens = torch.empty(batch, length, dtype=torch.int64)
    dtype = base.model.norm.weight.dtype
    hidden = torch.empty(batch, length, base.config.hidden_size, dtype=dtype)
    forced = [prompts.next() for _ in range(batch)]
    hot = [HOT_TOKENS] * batch
    settled = [TEMPERATURES[i % len(TEMPERATURES)] for i in range(batch)]
    choice = torch.zeros(batch, dtype=torch.int64)
    for position in range(length):
        for row in range(batch):
            if forced[row]:
                tokens[row, position] = forced[row].pop(0)
                continue
            tokens[row, position] = choice[row]
            hot[row] -= 1
            if int(choice[row]) in ends:
                forced[row] = prompts.next()
                hot[row] = HOT_TOKENS
        state = base(tokens[:, position : position + 1], cache)[:, 0]
        hidden[:, position] = state
        logits = base.logits(state).float()
        temperature = torch.tensor([1.0 if h > 0 else t for h, t in zip(hot, settled, strict=True)])
        # Where T > 0: the argmax of logits + T * Gumbel noise draws from softmax(logits / T).
        warm = temperature.nonzero()[:, 0]
        noise = torch.rand(len(warm), logits.shape[1], generator=generator)
        noise = noise.clamp_min_(1e-20).log_().neg_().log_().mul_(temperature[warm, None])
        logits[warm] -= noise
        choice = logits.argmax(-1)
        progress(batch)
    return tokens, hidden
