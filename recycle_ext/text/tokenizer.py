"""Text to token ids and back.

The work is the ``tokenizers`` library's. A Hugging Face model brings tokenizer.json; a GGUF file brings vocabulary
and merges and names the rule that splits text into words ("pre"), from which the same tokenizer is built here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from recycle_ext.errors import RecycleError
from recycle_ext.text import chat_template as chat
from recycle_ext.text import special_tokens
from recycle_ext.text.end_tokens import end_tokens
from recycle_ext.text.stream import TextStream

# Words, numbers, runs of punctuation and of white space, as Llama 3 and Qwen 2 split them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}  # digits that make one word
# Token types in GGUF's tokenizer.ggml.token_type (llama.h, enum llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. ``from_json`` and ``from_gguf`` make one."""

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
        """Text of ``ids`` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """Decodes ids that come one by one, as the continuation of the ids ``after``."""
        return TextStream(self.decode, after)

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


class GgufMetadata(Protocol):
    """The header of a GGUF file, as ``from_gguf`` reads it (checkpoint.gguf_header.GgufHeader)."""

    file: Path
    get: Callable[..., Any]  # (key, type, default) -> value
    strings: Callable[[str], list[str]]  # key -> array
    numbers: Callable[[str, int], list[Any]]  # (key, length) -> array
    token_id: Callable[[str], int | None]  # "bos", "eos", ...


def from_gguf(metadata: GgufMetadata, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """From the metadata of a GGUF file; ``vocab_size`` and ``eos_token_ids`` are the model's.

    Raises RecycleError for a tokenizer that is not supported, and for missing or damaged metadata.
    """
    prefix = "tokenizer.ggml."
    model = metadata.get(prefix + "model", str)
    tokens: list[str] = metadata.strings(prefix + "tokens")
    kinds = metadata.numbers(prefix + "token_type", len(tokens))
    if model == "gpt2":
        pre = metadata.get(prefix + "pre", str, "default")
        merges = [tuple(merge.split(" ", 1)) for merge in metadata.strings(prefix + "merges")]
        backend = _byte_level(metadata.file, pre, tokens, merges)
        adds_bos = pre == "llama-bpe"
    elif model == "llama":
        scores = metadata.numbers(prefix + "scores", len(tokens))
        unknown = metadata.token_id("unknown")
        add_space = metadata.get(prefix + "add_space_prefix", bool, True)
        backend = _sentencepiece(tokens, kinds, scores, unknown, add_space)
        adds_bos = True
    else:
        raise RecycleError(f"{metadata.file}: tokenizer {model!r} is not supported; gpt2 and llama are")
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == _CONTROL)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token_id := metadata.token_id(name)) is not None:
            special_tokens[f"{key}_token"] = tokens[token_id]
    return Tokenizer(
        backend=backend,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        bos_token_id=metadata.token_id("bos"),
        adds_bos=metadata.get(prefix + "add_bos_token", bool, adds_bos),
        chat_template=metadata.get("tokenizer.chat_template", str, "") or None,
        special_tokens=special_tokens,
    )


def _byte_level(file: Path, pre: str, tokens: list[str], merges: list[tuple[str, ...]]) -> Backend:
    """Byte-level BPE (GPT-2, Llama 3, Qwen 2)."""
    if pre not in ("gpt-2", "default", "smollm", *_DIGITS):
        raise RecycleError(
            f"{file}: the tokenizer's pre-tokenizer {pre!r} is not supported; "
            "smollm, llama-bpe, qwen2, gpt-2 and default are"
        )
    words = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _DIGITS)]
    if pre == "smollm":
        words.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre in _DIGITS:
        pattern = Regex(_WORDS.format(digits=_DIGITS[pre]))
        words.insert(0, pre_tokenizers.Split(pattern, "isolated"))
    vocab = {text: index for index, text in enumerate(tokens)}
    try:
        # Llama 3 does not merge the parts of a word that is in the vocabulary.
        model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # tokenizers raises nothing more specific
        raise RecycleError(f"{file}: the tokenizer's merges are damaged: {error}") from None
    backend = Backend(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: list[str], kinds: Sequence[int], scores: Sequence[float], unknown: int | None, add_space: bool
) -> Backend:
    """SentencePiece's BPE, with byte tokens for characters outside the vocabulary (Llama 1 and 2, Mistral)."""
    vocab = {text: index for index, text in enumerate(tokens)}
    never_merged = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    plain = {text for text, kind in zip(tokens, kinds, strict=True) if kind not in never_merged}
    # SentencePiece joins the two neighbours whose union has the best score: every split of a token in two tokens
    # is a merge, the best score first.
    merges = []
    for text in plain:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in plain and right in plain:
                merges.append((-scores[vocab[text]], vocab[left], vocab[right], left, right))
    merges.sort()
    backend = Backend(
        models.BPE(
            vocab,
            [merge[3:] for merge in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    text_of = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        spaces.insert(0, normalizers.Prepend("▁"))
        text_of.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(text_of)
    return backend
