"""The tokenizer of a GGUF file, from its vocabulary: the token ids are those that llama.cpp gives.

The work is the ``tokenizers`` library's, except for the merges of a SentencePiece vocabulary (text/sentencepiece.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from recycle_ext.errors import RecycleError, RecycleWarning
from recycle_ext.text.end_tokens import CODE_ENDS, MESSAGE_ENDS, no_ends
from recycle_ext.text.sentencepiece import SentencePieceMerges
from recycle_ext.text.split_rules import SPLIT_RULES, SplitRule
from recycle_ext.text.tokenizer import Tokenizer

# Token types in tokenizer.ggml.token_type (llama.h, enum llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Texts of tokens of code completion. llama.cpp makes one of a role a control token, unless the file names the role's token.
_CODE_TEXTS = CODE_ENDS | {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim▁begin\uff5c>", "<PRE>", "▁<PRE>")
    + ("<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim▁hole\uff5c>", "<SUF>", "▁<SUF>")
    + ("<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim▁end\uff5c>", "<MID>", "▁<MID>")
    + ("<|code_middle|>", "<|middle|>"),
}
# Marks of a message that are part of the text.
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# A fine-tuned Phi-3 can have Llama's architecture: its special tokens take the white space after them, but for these.
_PHI3_NAMES, _PHI3_KEEPS_SPACE_AFTER = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # as GgufMetadata.strings writes bytes that are not UTF-8
# A token without a text that a tokenizer can hold: its bytes are not UTF-8. U+10FFFE is no character.
_NO_TEXT, _NO_TEXT_PATTERN = "\U0010fffe{}\U0010fffe", "\U0010fffe[0-9]+\U0010fffe"


class GgufMetadata(Protocol):
    """The header of a GGUF file, as ``from_gguf`` reads it (checkpoint.gguf_header.GgufHeader)."""

    file: Path
    get: Callable[..., Any]  # (key, type, default) -> value
    strings: Callable[[str], list[str]]  # key -> array
    numbers: Callable[[str, int, float], list[Any]]  # (key, length, default) -> array
    token_id: Callable[[str], int | None]  # "bos", "eos", ...


def from_gguf(metadata: GgufMetadata, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """From the metadata of a GGUF file; ``vocab_size`` and ``eos_token_ids`` are the model's.

    Warns of what the metadata leave open and is assumed. Raises RecycleError for a tokenizer that is not supported, and
    for missing or damaged metadata.
    """
    file, prefix = metadata.file, "tokenizer.ggml."
    model = metadata.get(prefix + "model", str)
    tokens = _texts(metadata.strings(prefix + "tokens"))
    kinds = _kinds(metadata, tokens)
    if model == "gpt2":
        merges = metadata.strings(prefix + "merges")
        rule = _split_rule(file, metadata.get(prefix + "pre", str, ""))
        backend = _byte_level(file, rule, tokens, merges)
        adds_bos = rule.adds_bos
    elif model == "llama":
        scores = metadata.numbers(prefix + "scores", len(tokens), 0.0)
        unknown = metadata.token_id("unknown")
        add_space = metadata.get(prefix + "add_space_prefix", bool, True)
        backend = _sentencepiece(tokens, scores, None if unknown is None else tokens[unknown], add_space)
        adds_bos = True
    else:
        raise RecycleError(f"{file}: tokenizer {model!r} is not supported; gpt2 and llama are")
    is_phi3 = any(name in metadata.get("general.name", str, "").lower() for name in _PHI3_NAMES)
    backend.add_tokens(
        [
            AddedToken(
                text,
                normalized=False,
                special=kind != _USER_DEFINED,
                rstrip=is_phi3 and text not in _PHI3_KEEPS_SPACE_AFTER,
            )
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token_id := metadata.token_id(name)) is not None:
            special_tokens[f"{key}_token"] = tokens[token_id]
    bos, adds_bos = metadata.token_id("bos"), metadata.get(prefix + "add_bos_token", bool, adds_bos)
    if adds_bos and bos is None:
        _warn(f"{file}: a prompt starts with a begin-of-text token, but no such token is named; none is put there")
    return Tokenizer(
        backend=backend,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos,
        adds_bos=adds_bos,
        chat_template=metadata.get("tokenizer.chat_template", str, "") or None,
        special_tokens=special_tokens,
    )


def _warn(message: str) -> None:
    warnings.warn(message, RecycleWarning, stacklevel=1)


def _texts(tokens: list[str]) -> list[str]:
    """The tokens' texts, names in place of those that are empty (llama.cpp's) or not UTF-8."""
    texts = []
    for index, text in enumerate(tokens):
        if not text:
            text = f"[EMPTY_{index}]"
        elif _NOT_UTF8.search(text):
            text = _NO_TEXT.format(index)
        texts.append(text)
    return texts


def _kinds(metadata: GgufMetadata, tokens: list[str]) -> list[int]:
    """The tokens' types as llama.cpp corrects them: many converters write the marks of a chat as normal tokens."""
    kinds = metadata.numbers("tokenizer.ggml.token_type", len(tokens), _NORMAL)
    ids = {text: index for index, text in enumerate(tokens)}
    control = [text for text in MESSAGE_ENDS if text in ids]
    for role, texts in _CODE_TEXTS.items():
        if metadata.token_id(role) is None:
            control += [text for text in texts if text in ids][:1]
    corrections = dict.fromkeys(control, _CONTROL) | dict.fromkeys(_SHOWN_TEXTS, _USER_DEFINED)
    for text in no_ends(ids.__contains__):
        corrections[text] = _NORMAL if text == "</s>" else _USER_DEFINED
    for text, kind in corrections.items():
        if text in ids:
            kinds[ids[text]] = kind
    return kinds


def _split_rule(file: Path, pre: str) -> SplitRule:
    if not pre:
        _warn(
            f'{file}: the file does not say how its tokenizer splits words (tokenizer.ggml.pre); "default" is assumed, as '
            "in llama.cpp, and answers may be worse; convert the model again with a newer llama.cpp"
        )
        pre = "default"
    if pre not in SPLIT_RULES:
        raise RecycleError(
            f"{file}: the tokenizer's pre-tokenizer {pre!r} is not supported; give the model's Hugging Face version"
        )
    return SPLIT_RULES[pre]


def _byte_level(file: Path, rule: SplitRule, tokens: list[str], merges: list[str]) -> Backend:
    """Byte-level BPE (GPT-2, Llama 3, Qwen 2)."""
    vocab = {text: index for index, text in enumerate(tokens)}
    # Of a merge that is there twice, the first counts. A space at the start belongs to the left part.
    merges = [merge for merge in dict.fromkeys(merges) if not _NOT_UTF8.search(merge)]
    pairs = [(merge[:1] + left, right) for merge in merges for left, _, right in [merge[1:].partition(" ")]]
    try:
        model = models.BPE(vocab, pairs, ignore_merges=rule.ignore_merges)
    except Exception as error:  # tokenizers raises nothing more specific
        raise RecycleError(f"{file}: the tokenizer's merges are damaged: {error}") from None
    backend = Backend(model)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if missing := [byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte not in vocab]:
        # A byte without a token is left out, and what stands on its two sides is not merged.
        steps.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, missing))), "removed"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), *_without_text(tokens)])
    return backend


def _sentencepiece(tokens: list[str], scores: Sequence[float], unknown: str | None, add_space: bool) -> Backend:
    """SentencePiece's BPE, with byte tokens for characters outside the vocabulary (Llama 1 and 2, Mistral)."""
    vocab = {text: index for index, text in enumerate(tokens)}
    merges = SentencePieceMerges({text: scores[index] for text, index in vocab.items()})
    # The pre-tokenizer cuts a text into tokens; the model has only to number them.
    backend = Backend(models.BPE(vocab, [], unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=True))
    backend.pre_tokenizer = merges.pre_tokenizer()
    spaces = [normalizers.Replace(" ", "▁")]
    text_of = [*_without_text(tokens), decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        spaces.insert(0, normalizers.Prepend("▁"))
        text_of.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(text_of)
    return backend


def _without_text(tokens: list[str]) -> list[decoders.Decoder]:
    """The decoder that writes U+FFFD for a token whose bytes are not UTF-8, if there are such tokens."""
    if not any(text.startswith(_NO_TEXT[0]) for text in tokens):
        return []
    return [decoders.Replace(Regex(_NO_TEXT_PATTERN), "\ufffd")]
