"""Token ids to text, as the ids come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

_REPLACEMENT = "\ufffd"
# Tokens of context: a character has at most four bytes, each of which may be a token.
_CONTEXT = 6


class TextStream:
    """Decodes ids one by one; a character spread over several tokens comes out whole.

    All pieces and the flush together are what decoding everything at once adds to the text of the prompt. Each token takes
    the same time, whatever came before. tokenizers.decoders.DecodeStream is not used: it raises where invalid UTF-8
    follows a character of byte tokens, repeats a prompt that ends in U+FFFD, and has no flush.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], after: Sequence[int], has_text: Callable[[int], bool]
    ) -> None:
        """has_text: whether ``decode`` does not leave an id out."""
        self._decode, self._has_text = decode, has_text
        # The last tokens of the prompt decide whether the next token starts with a space.
        self._ids = list(islice(filter(has_text, reversed(after)), _CONTEXT))[::-1]
        text = decode(self._ids)
        self._shown = len(text)  # characters of the text of _ids that have come out
        # The prompt may end in half a character; the character is new text when the other half comes.
        self._prompt_may_be_half = text.endswith(_REPLACEMENT)

    def push(self, token_id: int) -> str:
        """The text that is certain now, often "" or one word."""
        if not self._has_text(token_id):
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if self._prompt_may_be_half and len(text) >= self._shown:
            if text[self._shown - 1] != _REPLACEMENT:
                self._shown -= 1
                self._prompt_may_be_half = False
            elif len(text) > self._shown:
                self._prompt_may_be_half = False
        # One U+FFFD at the end may become a character. Those before it stay.
        certain = max(len(text) - text.endswith(_REPLACEMENT), self._shown)
        new_text, self._shown = text[self._shown : certain], certain
        if len(self._ids) > 2 * _CONTEXT and not self._prompt_may_be_half:
            del self._ids[:-_CONTEXT]
            self._shown += len(self._decode(self._ids)) - len(text)
        return new_text

    def flush(self) -> str:
        """The text that is left at the end; half a character comes out as U+FFFD."""
        text = self._decode(self._ids)
        new_text, self._shown = text[self._shown :], len(text)
        return new_text
