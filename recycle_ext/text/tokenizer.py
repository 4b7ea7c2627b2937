"""Text to token ids and back.

The work is the ``tokenizers`` library's. A Hugging Face model brings tokenizer.json, which is read here; a GGUF file brings
a vocabulary (text/gguf_vocabulary.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from recycle_ext.errors import RecycleError
from recycle_ext.text import chat_template as chat
from recycle_ext.text import special_tokens
from recycle_ext.text.byte_tokens import ByteTokens
from recycle_ext.text.end_tokens import end_tokens
from recycle_ext.text.stream import TextStream


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. ``from_json`` and ``gguf_vocabulary.from_gguf`` make one."""

    backend: Backend = field(repr=False)
    vocab_size: int  # rows of the model's embedding
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    adds_bos: bool  # whether a prompt starts with bos_token_id
    chat_template: str | None = field(repr=False)  # Jinja source
    # Texts that a chat template may refer to: bos_token, eos_token, ...
    special_tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of ``text``; special tokens written out in the text become their own ids.

        add_bos: whether to start with the begin-of-text token; None: as the model was trained; False for the text
        of a chat template, which writes its own. Raises RecycleError for text that is not valid UTF-8 and for ids
        outside the model's vocabulary.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecycleError(f"the text is not valid UTF-8: character {error.start} cannot be encoded") from None
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if (self.adds_bos if add_bos is None else add_bos) and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        if ids and max(ids) >= self.vocab_size:
            token = self.backend.id_to_token(max(ids))
            raise RecycleError(
                f"the tokenizer gives {token!r} the id {max(ids)}, "
                f"but the model's vocabulary ends at {self.vocab_size - 1}"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; each part of the bytes that is not UTF-8 becomes one U+FFFD."""
        return self.backend.decode(self._byte_tokens.in_utf8([i for i in ids if self._has_text(i)]))

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Decodes ids that come one by one, as the continuation of the ids ``after``."""
        return TextStream(self.decode, after, self._has_text)

    @functools.cached_property
    def _byte_tokens(self) -> ByteTokens:
        return ByteTokens(self.backend)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        tokens = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in tokens.items() if token.special)

    def _has_text(self, token_id: int) -> bool:
        """Whether an id is a token, and no special token. The rows of an embedding may be more than the tokens."""
        return token_id not in self._special_ids and self.backend.id_to_token(token_id) is not None

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat, up to where the assistant's answer starts.

        messages: [{"role": "user" | "system" | "assistant", "content": text}, ...]. Raises RecycleError where the
        model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise RecycleError("this model has no chat template; give it plain text instead")
        return chat.render(self.chat_template, messages, self.special_tokens)


def from_json(
    file: Path,
    config: dict[str, Any],
    special_tokens_map: dict[str, Any],
    chat_template: str | None,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    bos_token_id: int | None,
) -> Tokenizer:
    """From the tokenizer.json of a Hugging Face model and the model's other files.

    config, special_tokens_map: the parsed tokenizer_config.json and special_tokens_map.json. chat_template: the text
    of chat_template.jinja; None: ``config`` may have one. eos_token_ids: the ends that the model's config names. The
    others: the model's. Raises RecycleError for a missing or damaged tokenizer.json.
    """
    if not file.is_file():
        raise RecycleError(f"{file}: missing; the tokenizer is read from this file only")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise RecycleError(f"{file}: not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = special_tokens.merged(config, special_tokens_map)
    special_tokens.add_to(backend, settings)
    named = special_tokens.named(settings)
    if "bos_token" in named:
        bos_token_id = backend.token_to_id(named["bos_token"])
    named_ends = [*special_tokens.ends(config), *special_tokens.ends(special_tokens_map)]
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bos_token_id in backend.encode("").ids
    return Tokenizer(
        backend=backend,
        vocab_size=vocab_size,
        eos_token_ids=end_tokens(
            [*eos_token_ids, *map(backend.token_to_id, named_ends)], backend.token_to_id, vocab_size
        ),
        bos_token_id=bos_token_id,
        adds_bos=adds_bos,
        chat_template=chat.template_in(config) if chat_template is None else chat_template,
        special_tokens=named,
    )
