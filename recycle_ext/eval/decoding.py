"""One greedy decoding, step by step: what came of it, which drafts counted, how long it took."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError


@dataclass(frozen=True)
class Setup:
    """A mode and its number of drafts (0 in standard mode)."""

    mode: str
    drafts: int

    @property
    def name(self) -> str:
        """ "standard", "verify-1", ..."""
        return f"{self.mode}-{self.drafts}" if self.drafts else self.mode


def setups(drafts: Sequence[int]) -> list[Setup]:
    """standard, then verify and alternate with each number of drafts."""
    return [Setup("standard", 0)] + [Setup(m, k) for k in drafts for m in ("verify", "alternate")]


@dataclass
class Run:
    """What a decoding came to.

    token_ids: the new tokens up to the limit, an end token not among them. steps: decode steps, each one pass over the
    base. step_tokens: tokens they gave, up to an end token and with it, but not cut at the limit (the prefill's
    token is not theirs). seconds: of the steps, by the wall clock.
    offered and accepted [drafts]: by position in the step, from the first: drafts of which all before were accepted,
    and those of them that were accepted too. What follows an end token in a step is not offered.
    """

    token_ids: list[int]
    steps: int = 0
    step_tokens: int = 0
    seconds: float = 0.0
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


def decode(
    decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, end_tokens: Collection[int]
) -> Run:
    """Continues a prompt (token ids) until an end token, or until there are ``max_new_tokens``.

    decoder: of one sequence, greedy, with room for both; what it held before is forgotten.
    """
    drafts = decoder.num_draft_tokens
    try:
        run = Run([decoder.prefill(prompt)], offered=[0] * drafts, accepted=[0] * drafts)
        if decoder.model.weights.is_cuda:
            decoder.capture()
        steps = decoder.run()
        while len(run.token_ids) < max_new_tokens and run.token_ids[-1] not in end_tokens:
            start = time.perf_counter()
            tokens, counts = next(steps)
            run.seconds += time.perf_counter() - start
            count_step(run, tokens[0, : int(counts[0])].tolist(), end_tokens)
    except RuntimeError as error:
        raise RecycleError(f"{decoder.mode}, step {decoder.steps}: {error}") from None
    if run.token_ids[-1] in end_tokens:
        run.token_ids.pop()
    del run.token_ids[max_new_tokens:]
    return run


def count_step(run: Run, tokens: list[int], end_tokens: Collection[int]) -> None:
    """Adds a step's tokens: the accepted drafts, then one of the base's own."""
    run.steps += 1
    for position in range(len(run.offered)):
        run.offered[position] += 1
        if position == len(tokens) - 1:
            break  # this draft was rejected, the token there is the base's own
        run.accepted[position] += 1
        if tokens[position] in end_tokens:
            break
    for token in tokens:
        run.token_ids.append(token)
        run.step_tokens += 1
        if token in end_tokens:
            break


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common before they first differ."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
