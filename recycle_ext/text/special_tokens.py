"""The special tokens of a Hugging Face tokenizer, which tokenizer_config.json and special_tokens_map.json name.

tokenizer.json may be older than these files, or lack what they say; transformers reads all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

Json = dict[str, Any]  # one of the two files, parsed, or both
_END_NAMES = ("eos_token", "eot_token", "eom_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def merged(config: Json, special_tokens_map: Json) -> Json:
    """Both files as one, as in transformers: the map counts first, but not where the config lists the added tokens."""
    return config if "added_tokens_decoder" in config else config | special_tokens_map


def named(values: Json) -> dict[str, str]:
    """Text of each token that has a name (bos_token, eos_token, ...)."""
    extra = values.get("extra_special_tokens")
    values = values | (extra if isinstance(extra, dict) else {})
    return {name: _text(value) for name, value in values.items() if name.endswith("_token") and _text(value)}


def ends(values: Json) -> list[str]:
    """Texts of the tokens that are called an end."""
    tokens = named(values)
    return [tokens[name] for name in _END_NAMES if name in tokens]


def add_to(backend: Tokenizer, values: Json) -> None:
    """Makes every token that is listed or named a special token of ``backend``, with the flags that it is listed with."""
    listed = values.get("added_tokens_decoder")
    listed = listed if isinstance(listed, dict) else {}
    # In the order of their ids: the backend numbers tokens that are new to it.
    ids = sorted((name for name in listed if name.isdecimal()), key=int)
    backend.add_tokens([_token(listed[name], special=False) for name in ids if _text(listed[name])])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for value in filter(_text, _specials(values)):
        token = known.get(_text(value)) or _token(value, special=True)
        token.special = True
        backend.add_special_tokens([token])


def _specials(values: Json) -> Iterator[Any]:
    """The special tokens as the files write them: a text, or an object with the text and flags."""
    yield from (value for name, value in values.items() if name.endswith("_token"))
    for name in ("extra_special_tokens", "additional_special_tokens"):
        tokens = values.get(name)
        if isinstance(tokens, (list, dict)):
            yield from tokens.values() if isinstance(tokens, dict) else tokens


def _text(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _token(value: Any, special: bool) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    flags = {name: flags[name] for name in _FLAGS if isinstance(flags.get(name), bool)}
    return AddedToken(_text(value), **{"special": special} | flags)
