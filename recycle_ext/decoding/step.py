"""Step and SequenceStep: the record of one decode step, of a batch and of one sequence, that every loop reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from recycle_ext.errors import RecycleError

# What a count below 0 says (csrc/include/recycle/decode_step.h).
_FAILURES = {
    -1: "a logit is NaN or infinite",
    -2: "there is no room for another step in the sequence's caches",
    -3: "a pending token is outside of the vocabulary",
}


@dataclass(frozen=True)
class SequenceStep:
    """One decode step of one sequence.

    tokens: the accepted draft tokens, then one token of the base model's own. drafted: draft tokens of the
    step; after a rise of k they include padding. accepted: how many of them are in tokens (in alternate mode all). seconds: wall-clock time of the step (of the whole batch).
    """

    tokens: list[int]
    drafted: int
    accepted: int
    seconds: float

    def cut(self, max_tokens: int, end_tokens: Collection[int] = ()) -> SequenceStep:
        """The same step up to its first end token (included), at most ``max_tokens`` tokens.

        Draft tokens behind the cut are not counted, neither as drafted nor as accepted.
        """
        for index, token in enumerate(self.tokens[:max_tokens]):
            if token in end_tokens:
                max_tokens = index + 1
                break
        if max_tokens > self.drafted:
            return self
        return SequenceStep(
            self.tokens[:max_tokens], min(self.drafted, max_tokens), min(self.accepted, max_tokens), self.seconds
        )


class Step(NamedTuple):
    """One decode step of a batch.

    tokens [batch, drafted + 1] int64: the new tokens of each sequence, then -1. counts [batch] int64: how many; 0 for
    an idle sequence; below 0 for one that failed, which is as it was before the step (``failure`` says why). Both on the
    CPU. drafted: draft tokens of each sequence. seconds: wall-clock time of the step.
    """

    tokens: Tensor
    counts: Tensor
    drafted: int
    seconds: float

    def failure(self, index: int = 0) -> str | None:
        """Why one sequence failed; None if it did not."""
        count = int(self.counts[index])
        return f"decode_step, sequence {index}: {_FAILURES[count]}" if count < 0 else None

    def check(self) -> None:
        """Raises RecycleError for the first sequence that failed."""
        for index in range(len(self.counts)):
            if failure := self.failure(index):
                raise RecycleError(failure)

    def sequence(self, index: int = 0) -> SequenceStep:
        """The step of one sequence; an idle one has neither tokens nor draft tokens.

        Raises RecycleError if the sequence failed.
        """
        if failure := self.failure(index):
            raise RecycleError(failure)
        count = int(self.counts[index])
        tokens = self.tokens[index, :count].tolist()
        return SequenceStep(tokens, self.drafted if count else 0, max(count - 1, 0), self.seconds)
