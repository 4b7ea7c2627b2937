"""How SentencePiece's BPE cuts a text into tokens, as llama.cpp does it (src/llama-vocab.cpp, llm_tokenizer_spm_session).

tokenizers.models.BPE is not used: its merges have an order in which no two are equal, while tokens may have the same score,
as all have in files of some converters; then the first in the text is merged first.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping

from tokenizers import NormalizedString, PreTokenizedString, Regex, pre_tokenizers

_MAX_CACHED_WORDS = 100_000


class SentencePieceMerges:
    """Of all neighbours that are a token together, those whose token has the best score are merged first."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self._scores = scores  # of each token, by its text
        self._cached: dict[str, list[int]] = {}

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Cuts a text, spaces in the form of ▁, into its tokens and into characters that are no token."""
        merge = pre_tokenizers.PreTokenizer.custom(self)
        # Where no token goes on after a word, the words are cut one by one, and those that come again are remembered.
        if any(re.search("[^▁]▁", text) for text in self._scores):
            return merge
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("▁*[^▁]+|▁+"), "isolated"), merge])

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Called by tokenizers."""
        text.split(self._pieces)

    def _pieces(self, _: int, text: NormalizedString) -> list[NormalizedString]:
        word = str(text)
        if (ends := self._cached.get(word)) is None:
            ends = self._ends(word)
            if len(self._cached) < _MAX_CACHED_WORDS:
                self._cached[word] = ends
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _ends(self, word: str) -> list[int]:
        """Where the tokens of a word end."""
        size = len(word)
        ends = [*range(1, size + 1)]  # of the symbol that starts here; 0 once it is part of its left neighbour
        before = [*range(-1, size)]  # where the left neighbour of the symbol that starts here starts
        candidates: list[tuple[float, int, int, int]] = []

        def offer(left: int, middle: int) -> None:
            if left >= 0 and middle < size:
                score = self._scores.get(word[left : ends[middle]])
                if score is not None:
                    heapq.heappush(candidates, (-score, left, middle, ends[middle]))

        for middle in range(1, size):
            offer(middle - 1, middle)
        while candidates:
            _, left, middle, end = heapq.heappop(candidates)
            if ends[left] != middle or ends[middle] != end:
                continue  # one of the two has been merged with another neighbour
            ends[left], ends[middle], before[end] = end, 0, left
            offer(before[left], left)
            offer(left, end)
        return [end for end in ends if end]
