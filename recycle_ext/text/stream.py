"""Token ids to text, as the ids come."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Decodes ids one by one; a character spread over several tokens comes out whole.

    tokenizers.decoders.DecodeStream is not used: it raises where invalid UTF-8 follows a character of byte tokens,
    repeats a prompt that ends in U+FFFD, and has no flush.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self._decode = decode
        # The last tokens of the prompt decide whether the next token starts with a space.
        self._ids = list(after[-4:])
        self._shown = len(self._ids)  # of _ids, whose text has come out

    def push(self, token_id: int) -> str:
        """The text that is certain now, often "" or one word."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text

    def flush(self) -> str:
        """The text that is left at the end; half a character comes out as U+FFFD."""
        text = self._new_text()
        self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(shown) :]
