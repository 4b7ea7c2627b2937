"""Text to token ids and back, and the model's chat format.

The work is the ``tokenizers`` library's. A Hugging Face directory brings its tokenizer.json; a GGUF
file brings vocabulary and merges and names the rule that splits text into words ("pre"), from which
the same tokenizer is built here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.checkpoint.gguf import GgufHeader
from recycle_ext.checkpoint.json_file import read_json
from recycle_ext.errors import RecycleError

# Words, numbers, runs of punctuation and of white space, as Llama 3 and Qwen 2 split them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kinds of tokens in GGUF's tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. ``from_directory`` and ``from_gguf`` make one."""

    backend: Backend = field(repr=False)
    eos_token_ids: tuple[int, ...]
    vocab_size: int  # rows of the model's embedding
    bos_token_id: int | None
    adds_bos: bool  # whether a prompt starts with bos_token_id
    chat_template: str | None = field(repr=False)  # Jinja source
    # Texts that a chat template may refer to: bos_token, eos_token, ...
    special_tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their own ids.

        add_bos: start with the begin-of-text token; None: as the model was trained. Say False for
        the text of a chat template, which writes its own.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecycleError(
                f"the text is not valid UTF-8: character {error.start} cannot be encoded"
            ) from None
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
        """Text of ``ids``, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """For ids that come one by one, as the continuation of the ids ``after``."""
        return TextStream(self.decode, after)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat, up to where the assistant's answer starts.

        messages: [{"role": "user" | "system" | "assistant", "content": text}, ...]
        """
        if self.chat_template is None:
            raise RecycleError("this model has no chat template; give it plain text instead")
        return _render(self.chat_template, messages, self.special_tokens)


class TextStream:
    """Turns ids into text as they come. A character spread over several tokens comes out whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self._decode = decode
        # A few tokens back are enough to know how the next one is written, with or without a space.
        self._ids = list(after[-4:])
        self._window = 0  # where decoding starts
        self._shown = len(self._ids)  # up to where text has come out

    def push(self, token_id: int) -> str:
        """The text that is certain now, often "" or one word."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end; half a character comes out as U+FFFD."""
        text = self._new_text()
        self._window = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(shown) :]


def from_directory(path: Path, model: ModelConfig) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json and chat_template.jinja of a Hugging Face directory."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise RecycleError(f"{file}: missing; the tokenizer is read from this file only")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise RecycleError(f"{file}: not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    special_tokens = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, (str, dict)) and value
    }
    bos_token_id = model.bos_token_id
    if "bos_token" in special_tokens:
        bos_token_id = backend.token_to_id(special_tokens["bos_token"])
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = bos_token_id in backend.encode("").ids
    return Tokenizer(
        backend=backend,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        bos_token_id=bos_token_id,
        adds_bos=adds_bos,
        chat_template=_directory_chat_template(path, config),
        special_tokens=special_tokens,
    )


def from_gguf(header: GgufHeader, model: ModelConfig) -> Tokenizer:
    """From the metadata of a GGUF file."""
    prefix = "tokenizer.ggml."
    kind = header.get(prefix + "model", str)
    tokens: list[str] = header.strings(prefix + "tokens")
    kinds = header.numbers(prefix + "token_type", len(tokens))
    if kind == "gpt2":
        pre = header.get(prefix + "pre", str, "default")
        merges = [tuple(merge.split(" ", 1)) for merge in header.strings(prefix + "merges")]
        backend = _byte_level(header.file, pre, tokens, merges)
        adds_bos = pre == "llama-bpe"
    elif kind == "llama":
        scores = header.numbers(prefix + "scores", len(tokens))
        unknown = header.token_id("unknown")
        add_space = header.get(prefix + "add_space_prefix", bool, True)
        backend = _sentencepiece(tokens, kinds, scores, unknown, add_space)
        adds_bos = True
    else:
        raise RecycleError(
            f"{header.file}: tokenizer {kind!r} is not supported; gpt2 and llama are"
        )
    added = zip(tokens, kinds, strict=True)
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind == _CONTROL)
            for text, kind in added
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token_id := header.token_id(name)) is not None:
            special_tokens[f"{key}_token"] = tokens[token_id]
    return Tokenizer(
        backend=backend,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        bos_token_id=header.token_id("bos"),
        adds_bos=header.get(prefix + "add_bos_token", bool, adds_bos),
        chat_template=header.get("tokenizer.chat_template", str, "") or None,
        special_tokens=special_tokens,
    )


def _byte_level(file: Path, pre: str, tokens: list[str], merges: list[tuple[str, ...]]) -> Backend:
    """Byte-level BPE (GPT-2 and what came after it)."""
    words: list[pre_tokenizers.PreTokenizer]
    if pre in ("gpt-2", "default"):
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre == "smollm":
        words = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre in ("llama-bpe", "qwen2"):
        pattern = _WORDS.format(digits="{1,3}" if pre == "llama-bpe" else "")
        words = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        raise RecycleError(
            f"{file}: the tokenizer's pre-tokenizer {pre!r} is not supported; "
            "smollm, llama-bpe, qwen2, gpt-2 and default are"
        )
    vocab = {text: index for index, text in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token as it is, without going through the merges.
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
    tokens: list[str],
    kinds: Sequence[int],
    scores: Sequence[float],
    unknown: int | None,
    add_space: bool,
) -> Backend:
    """SentencePiece's BPE with bytes for what the vocabulary lacks (Llama 1 and 2, Mistral)."""
    vocab = {text: index for index, text in enumerate(tokens)}
    plain = {text for text, kind in zip(tokens, kinds, strict=True) if kind not in (2, 3, 5, 6)}
    # SentencePiece joins the two neighbours whose union has the best score: a merge for every way
    # to put a token together, best score first.
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


def _directory_chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        # Several templates, by name.
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template


def _render(
    template: str, messages: Iterable[dict[str, str]], special_tokens: dict[str, str]
) -> str:
    """Renders a chat template as transformers does (utils/chat_template_utils.py)."""
    # Imported here: only chats need it.
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, **options
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise RecycleError(f"the model's chat template refuses these messages: {error}") from None
