"""One generation: text as it comes, and its figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recycle_ext.decoding.decoder import AUTO, Decoder
from recycle_ext.decoding.step import SequenceStep
from recycle_ext.errors import RecycleError
from recycle_ext.generate.model import Model


@dataclass
class Statistics:
    """Figures of one generation; times are wall-clock seconds.

    The figures describe the tokens that the generation returned: draft tokens past its end are not counted.
    """

    mode: str
    drafts: int | str  # draft tokens per step, or "auto"
    prompt_tokens: int
    seed: int | None = None  # of the draws, the caller's or a new one; None: greedy
    new_tokens: int = 0
    steps: int = 0  # decode steps: passes over the base model after the prefill
    offered_drafts: int = 0  # draft tokens of all steps, those after a rejected one included
    accepted_drafts: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    weight_bytes: int = 0  # in memory
    read_bytes: int = 0  # of weights, by all decode steps

    @property
    def acceptance_rate(self) -> float | None:
        """accepted_drafts / offered_drafts; None without draft tokens."""
        return self.accepted_drafts / self.offered_drafts if self.offered_drafts else None

    @property
    def decoded_tokens(self) -> int:
        """New tokens from decode steps: all but the first, which comes from the prefill."""
        return max(self.new_tokens - 1, 0)

    @property
    def tokens_per_second(self) -> float:
        """decoded_tokens / decode_seconds."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """Weights read by the decode steps per second, in 10^9 bytes."""
        return self.read_bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0

    def as_dict(self) -> dict:
        """All fields and the three rates."""
        names = ("acceptance_rate", "tokens_per_second", "gigabytes_per_second")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


class Generation(Iterator[str]):
    """Text as it is generated: iterate over it.

    ``text``, ``token_ids`` and ``statistics`` hold what there is so far; ``token_ids`` are the new tokens, an end token
    not among them.
    """

    def __init__(self, model: Model, decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.statistics = Statistics(
            mode=decoder.mode,
            drafts=decoder.num_draft_tokens if decoder.policy is None else AUTO,
            prompt_tokens=len(prompt),
            seed=None if decoder.greedy else decoder.seeds[0],
            weight_bytes=model.packed.weights.numel(),
        )
        self._model = model
        self._decoder = decoder
        self._prompt = list(prompt)
        self._max_new_tokens = max_new_tokens
        self._stream = model.tokenizer.stream(after=self._prompt)
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        end_tokens = self._model.tokenizer.eos_token_ids
        for record in self._records():
            tokens = record.tokens
            ended = tokens[-1] in end_tokens
            new_ids = tokens[:-1] if ended else tokens
            self.token_ids += new_ids
            self.statistics.new_tokens = len(self.token_ids)
            piece = "".join(self._stream.push(token) for token in new_ids)
            if ended or len(self.token_ids) == self._max_new_tokens:
                piece += self._stream.flush()
            if piece:
                self.text += piece
                yield piece

    def _records(self) -> Iterator[SequenceStep]:
        """The prefill's record and each step's, counted in the statistics."""
        statistics = self.statistics
        try:
            records = self._decoder.decode(self._prompt, self._max_new_tokens, self._model.tokenizer.eos_token_ids)
            first = next(records)
            statistics.prefill_seconds = first.seconds
            yield first
            for record in records:
                statistics.steps += 1
                statistics.offered_drafts += record.drafted
                statistics.accepted_drafts += record.accepted
                statistics.decode_seconds += record.seconds
                # All the step's draft tokens, those past the end too: the step has read the module for each.
                statistics.read_bytes += self._model.packed.step_bytes(self._decoder.num_draft_tokens)
                yield record
        except RuntimeError as error:
            raise RecycleError(f"step {statistics.steps}: {error}") from None
