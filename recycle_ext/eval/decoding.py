"""One greedy decoding, from the decoder's records: its text, its accepted draft tokens, its time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.step import SequenceStep
from recycle_ext.errors import RecycleError


@dataclass(frozen=True)
class Setup:
    """A mode and its number of draft tokens per step (0 in standard mode)."""

    mode: str
    drafts: int

    @property
    def name(self) -> str:
        """ "standard", "verify-1", ..."""
        return f"{self.mode}-{self.drafts}" if self.drafts else self.mode


def setups(drafts: Sequence[int]) -> list[Setup]:
    """standard, then verify and alternate with each number of draft tokens."""
    return [Setup("standard", 0)] + [Setup(m, k) for k in drafts for m in ("verify", "alternate")]


@dataclass
class Run:
    """The result of a decoding; nothing past an end token or past the limit of new tokens is counted.

    token_ids: the new tokens without the end token. steps: decode steps, each one pass over the base model. step_tokens:
    tokens that the steps gave, an end token included and the prefill's token not. seconds: of the steps, wall clock.
    offered, accepted [draft tokens per step]: by position in the step. A draft token is offered if all draft tokens before
    it in its step were accepted.
    """

    token_ids: list[int]
    steps: int = 0
    step_tokens: int = 0
    seconds: float = 0.0
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, record: SequenceStep) -> None:
        """Counts a decode step, which is already cut at the end of the text."""
        self.token_ids += record.tokens
        self.steps += 1
        self.step_tokens += len(record.tokens)
        self.seconds += record.seconds
        # The first rejected draft token is offered; the ones behind it are not.
        for position in range(min(record.drafted, record.accepted + 1)):
            self.offered[position] += 1
            self.accepted[position] += position < record.accepted


def decode(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int, end_tokens: Collection[int]) -> Run:
    """Continues a prompt (token ids) until an end token, or until there are ``max_new_tokens``.

    decoder: of one sequence, greedy, with room for both; its earlier text is dropped. Raises RecycleError if a logit is
    not finite.
    """
    num_draft_tokens = decoder.num_draft_tokens
    try:
        records = decoder.decode(prompt, max_new_tokens, end_tokens)
        first = next(records)
        run = Run(list(first.tokens), offered=[0] * num_draft_tokens, accepted=[0] * num_draft_tokens)
        for record in records:
            run.add(record)
    except RuntimeError as error:
        raise RecycleError(f"{decoder.mode}, step {decoder.steps}: {error}") from None
    if run.token_ids[-1] in end_tokens:
        run.token_ids.pop()
    return run


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens before two texts first differ."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
