"""Streamed text, joined, is the text of all ids, whatever the bytes; each token takes the same time."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from vocabularies import BYTE_TOKENS, byte_level, read_vocabulary, sentencepiece, write_vocabulary

from recycle_ext.text.tokenizer import Tokenizer

KINDS = ["sentencepiece", "byte-level", "directory"]


def directory_tokenizer() -> Tokenizer:
    """As a tokenizer.json of Llama 2 is read: byte tokens, and a decoder that strips the first space."""
    vocab = {text: index for index, text in enumerate(["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁a", "b", "▁"])}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, len(vocab), (2,), 1, True, None)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    metadata = {"sentencepiece": sentencepiece("▁a", "b", "▁"), "byte-level": byte_level("å Į", "ð Ł", "Ġ a")}
    found = {kind: read_vocabulary(write_vocabulary(folder / kind, keys)) for kind, keys in metadata.items()}
    found |= {"directory": directory_tokenizer()}
    return found.get  # hypothesis prints a dictionary at length


def ids_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    if (first := tokenizer.backend.token_to_id("<0x00>")) is not None:
        return [first + byte for byte in data]
    letters = dict(zip("北".encode(), "åĮĹ", strict=True)) | dict(zip("é".encode(), "Ã©", strict=True))
    return [tokenizer.backend.token_to_id(letters.get(byte) or chr(byte)) for byte in data]


def streamed(tokenizer: Tokenizer, after: list[int], ids: list[int]) -> list[str]:
    stream = tokenizer.stream(after=after)
    return [*map(stream.push, ids), stream.flush()]


# Of 262 ids: the first are special, the last is outside the vocabularies.
token_ids = st.lists(st.integers(0, 262) | st.sampled_from([232, 143, 154, 2, 258, 259, 260]), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@given(after=token_ids, ids=token_ids)
@example(after=[3 + 0xE5], ids=[3 + 0x8C, 3 + 0x97])  # the prompt ends in half a character
@example(after=[3 + 0xE5, 3 + 0x8C, 3 + 0x97, 3 + 0xE5], ids=[259])
@example(after=[259, 1, 1, 1, 1, 1, 1, 1], ids=[259])
def test_stream_joined_is_the_decoded_text_that_is_new(tokenizers, kind, after, ids):
    tokenizer = tokenizers(kind)
    before, text = tokenizer.decode(after), tokenizer.decode(after + ids)
    start = len(before)
    if before.endswith("\ufffd") and text[start - 1] != "\ufffd":
        start -= 1
    assert text.startswith(before[:start])
    assert "".join(streamed(tokenizer, after, ids)) == text[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_stream_after_a_prompt_of_byte_tokens_goes_on(tokenizers, kind):
    tokenizer = tokenizers(kind)
    bytes_of = "北é".encode()
    for cut in range(len(bytes_of)):
        prompt, rest = ids_of(tokenizer, bytes_of[:cut]), ids_of(tokenizer, bytes_of[cut:])
        whole = "北é" if cut < 3 else "é"
        assert "".join(streamed(tokenizer, prompt, rest)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_leaves_those_before_it(tokenizers, kind):
    tokenizer = tokenizers(kind)
    ids = ids_of(tokenizer, "北北".encode()[:4])
    assert tokenizer.decode(ids) == "北\ufffd"
    assert streamed(tokenizer, [], ids) == ["", "", "北", "", "\ufffd"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0xE5, 0x8C])
def test_stream_of_undecodable_bytes_is_linear(tokenizers, kind, byte):
    """A step decodes a few ids, and the text comes out on the way."""
    tokenizer = tokenizers(kind)
    stream = tokenizer.stream()
    decode, decoded = stream._decode, []
    stream._decode = lambda ids: decoded.append(len(ids)) or decode(ids)
    ids = ids_of(tokenizer, bytes([byte])) * 300
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == "\ufffd" * 299
    assert stream.flush() == "\ufffd"
    assert sum(decoded) < 30 * len(ids)
