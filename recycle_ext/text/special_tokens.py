"""The special tokens of a Hugging Face tokenizer, which tokenizer_config.json and special_tokens_map.json name.

tokenizer.json may be older than these files, or lack what they say; transformers reads all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer

Json = dict[str, Any]  # one of the two files, parsed
_END_NAMES = ("eos_token", "eot_token", "eom_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def named_tokens(config: Json, special_tokens_map: Json) -> dict[str, str]:
    """Text of each token that has a name (bos_token, eos_token, ...), for chat templates.

    As in transformers: the map counts before tokenizer_config.json, but not where that file lists the added tokens.
    """
    first, then = _named(special_tokens_map), _named(config)
    return first | then if "added_tokens_decoder" in config else then | first


def end_texts(config: Json, special_tokens_map: Json) -> list[str]:
    """Texts of the tokens that either file calls an end."""
    files = _named(config), _named(special_tokens_map)
    return [tokens[name] for tokens in files for name in _END_NAMES if name in tokens]


def add_special_tokens(backend: Tokenizer, config: Json, special_tokens_map: Json) -> None:
    """Makes every token that a file lists or names a special token of ``backend``, with the flags that a file gives."""
    listed = config.get("added_tokens_decoder")
    listed = listed if isinstance(listed, dict) else {}
    # In the order of their ids: the backend numbers tokens that are new to it.
    ids = sorted((name for name in listed if name.isdecimal()), key=int)
    backend.add_tokens([_token(listed[name], special=False) for name in ids if _text(listed[name])])
    for value in [*_values(config), *_values(special_tokens_map)]:
        known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        token = known.get(_text(value)) or _token(value)
        token.special = True
        backend.add_special_tokens([token])


def _named(values: Json) -> dict[str, str]:
    extra = values.get("extra_special_tokens")
    values = values | (extra if isinstance(extra, dict) else {})
    return {name: _text(value) for name, value in values.items() if name.endswith("_token") and _text(value)}


def _values(values: Json) -> Iterator[Any]:
    """The special tokens of one file, as the file writes them: a text, or an object with the text and flags."""
    extra = values.get("extra_special_tokens")
    yield from (value for name, value in values.items() if name.endswith("_token") and _text(value))
    yield from filter(_text, extra.values() if isinstance(extra, dict) else [])
    for name in ("extra_special_tokens", "additional_special_tokens"):
        yield from filter(_text, values[name] if isinstance(values.get(name), list) else [])


def _text(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _token(value: Any, special: bool = True) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    flags = {name: flags[name] for name in _FLAGS if isinstance(flags.get(name), bool)}
    return AddedToken(_text(value), **{"special": special} | flags)
