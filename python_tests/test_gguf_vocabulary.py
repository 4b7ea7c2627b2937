"""Vocabularies of GGUF files as found in the wild: the ids are llama.cpp's, and what is assumed is warned of."""

# ruff: noqa: RUF001 (the texts have such characters)

from __future__ import annotations

import itertools
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import (
    BYTE_LEVEL,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    LlamaCpp,
    byte_level,
    read_vocabulary,
    sentencepiece,
    write_vocabulary,
)

from recycle_ext.errors import RecycleWarning
from recycle_ext.text.split_rules import SPLIT_RULES

# Parts of texts at which the rules differ.
PARTS = [
    *("ab", "Hello", " x", "iPhone", "XMLFile", "it's", "WE'LL", "'S", "don't", "'", "’s", "Ünï", "e\u0301", "ªſK"),
    *("1", "12", "1234567", "12345678", "3.14", "²", "Ⅷ", "٣٣٣٣", "6٣"),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", "   \n", "\u3000", "\u00a0", "\x0b", "\x85", "\x1c", "\x00", "\u200b"),
    *("...", "!!", "\n/", "$+<=>^~|`", "()[]{}", "_", "。", "！", "…", "“”", "۔", "︰"),
    *("北京", "ありカ", "한글", "ㄅㄱ", "Жж", "किெ", "๒", "Å", "🙂👩\u200d🚀", "\ue000", "<sentinel:12>", "IMGIMGABZ"),
]
SPECIALS = ["<|im_end|>", "<|end|>", "<|call|>", "<|flush|>", "<unk>", "<mark>", "<|bos|>", "</s>", "<|tool_response>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module")
def llama_cpp_reads():
    """Ids of texts by llama.cpp and by us."""
    library = pytest.importorskip("llama_cpp", reason="the extra `bench` brings it")
    quiet = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(quiet, None)

    def compare(file, texts):
        theirs = LlamaCpp(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecycleWarning)
            ours = read_vocabulary(file)
        for text in texts:
            assert ours.encode(text) == theirs.encode(text), text
        theirs.close()
        return ours

    yield compare
    del quiet


def mixed_texts(count: int, parts: int) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(PARTS, k=parts)) for _ in range(count)]


@pytest.fixture(scope="module")
def crossing():
    """Metadata of a vocabulary whose merges cross every border that a rule may draw: where a text is split shows."""
    tokens = dict.fromkeys(BYTE_LEVEL)
    merges: dict[str, None] = {}
    mapped = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], BYTE_LEVEL, strict=False))
    others = [byte for byte in range(256) if byte not in mapped]
    mapped |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    for text in mixed_texts(30, 8):
        word = [mapped[byte] for byte in text.encode()]
        while len(word) > 1:
            pairs = list(itertools.pairwise(word))
            pair = next((p for p in pairs if " ".join(p) in merges), pairs[len(pairs) // 2])
            merges[" ".join(pair)] = tokens["".join(pair)] = None
            index = pairs.index(pair)
            word[index : index + 2] = ["".join(pair)]
    return byte_level(*merges)


@pytest.mark.parametrize("pre", SPLIT_RULES)
def test_ids_of_every_split_rule_equal_llama_cpp(folder, llama_cpp_reads, crossing, pre):
    # Words without merges are tokens where the rule ignores merges.
    words = ["Hello", "iPhone", "Ġx"]
    tokens = crossing["tokens"] + [word for word in words if word not in crossing["tokens"]]
    kinds = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2)
    file = write_vocabulary(folder / "rule.gguf", crossing | {"pre": pre, "tokens": tokens, "token_type": kinds})
    llama_cpp_reads(file, mixed_texts(4, 100))


texts = st.lists(st.sampled_from(PARTS + SPECIALS) | st.text(max_size=3), max_size=12).map("".join)
# llama.cpp takes -1 as the number of no token; other numbers outside the vocabulary are warned of.
token_ids = st.sampled_from([None, 0, 1, 2**32 - 1])


@st.composite
def byte_level_vocabularies(draw):
    tokens, merges = [*BYTE_LEVEL, "ab"], ["a b"]
    for left, right in draw(st.lists(st.tuples(*[st.integers(0, 10**6)] * 2), max_size=25)):
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        merges.append(" ".join(pair))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    in_merges = {part for merge in merges for part in merge.split(" ")}
    words = draw(st.lists(st.sampled_from(["Hello", "iPhone", "Ġx", "12", "ab"]), unique=True, max_size=3))
    missing = set(draw(st.lists(st.sampled_from(BYTE_LEVEL), max_size=5))) - in_merges
    letters = {letter for token in [*tokens, *words] if len(token) > 1 for letter in token}
    normal = [t for t in dict.fromkeys([*tokens, *words]) if t not in missing - letters]
    specials = draw(st.lists(st.sampled_from(SPECIALS), min_size=2, unique=True))
    kinds = [draw(st.sampled_from([NORMAL, CONTROL, USER_DEFINED])) for _ in specials]
    return byte_level(
        *merges,
        tokens=[*specials, *normal],
        pre=draw(st.sampled_from([None, *SPLIT_RULES])),
        token_type=draw(st.sampled_from([None, kinds + [NORMAL] * len(normal)])),
        bos_token_id=draw(st.sampled_from([0, 1])),
        eos_token_id=draw(token_ids),
        padding_token_id=draw(token_ids),
        add_bos_token=draw(st.sampled_from([None, True, False])),
    )


@st.composite
def sentencepiece_vocabularies(draw):
    letters = st.sampled_from("▁ab.1é北")
    pieces = draw(st.lists(st.text(letters, min_size=1, max_size=4), unique=True, max_size=40))
    metadata = sentencepiece(*pieces, *SPECIALS[:3])
    count = len(metadata["tokens"])
    scores = [draw(st.sampled_from([0.0, -1.0, -2.5, 3.0])) for _ in pieces]
    kinds = [draw(st.sampled_from([NORMAL, NORMAL, NORMAL, UNUSED, CONTROL, USER_DEFINED])) for _ in pieces]
    named = draw(st.lists(st.sampled_from([NORMAL, CONTROL, USER_DEFINED]), min_size=3, max_size=3))
    return metadata | {
        "scores": draw(
            st.sampled_from([None, [-1000.0] * count, metadata["scores"], [0.0] * 259 + scores + [0.0] * 3])
        ),
        "token_type": draw(st.sampled_from([None, metadata["token_type"][:259] + kinds + named])),
        "bos_token_id": draw(token_ids),
        "eos_token_id": draw(token_ids),
        "unknown_token_id": draw(token_ids),
        "add_space_prefix": draw(st.sampled_from([None, True, False])),
        "add_bos_token": draw(st.sampled_from([None, True, False])),
    }


@settings(max_examples=60, deadline=None)
@given(metadata=byte_level_vocabularies() | sentencepiece_vocabularies(), some=st.lists(texts, min_size=1, max_size=8))
def test_ids_of_any_vocabulary_equal_llama_cpp(folder, llama_cpp_reads, metadata, some):
    llama_cpp_reads(write_vocabulary(folder / "any.gguf", metadata), some)


@pytest.mark.parametrize("key", ["bos", "eos", "unknown", "padding"])
@pytest.mark.parametrize("number", [2**32 - 1, 999])
def test_special_id_outside_the_vocabulary_is_llama_cpp_s(folder, llama_cpp_reads, key, number):
    metadata = sentencepiece("ab", "▁ab", *"▁ab") | {f"{key}_token_id": number}
    ours = llama_cpp_reads(write_vocabulary(folder / "special.gguf", metadata), ["abab", "x"])
    assert ours.bos_token_id == 1


def test_token_that_is_not_utf8_is_no_text_and_decodes_to_u_fffd(folder, llama_cpp_reads):
    texts = ["abab", "ab\ufffdab", "é"]
    for metadata, shown in ((sentencepiece("ab", "▁ab", *"▁ab"), " ab"), (byte_level("a b"), "ab")):
        metadata["tokens"] = [*metadata["tokens"], b"\xff\xfe", b"\xfd"]
        metadata["token_type"] = [*metadata["token_type"], NORMAL, NORMAL]
        file = write_vocabulary(folder / "bytes.gguf", metadata | {"scores": None})
        ours = llama_cpp_reads(file, texts)
        count = len(metadata["tokens"])
        ab = ours.encode("ab", add_bos=False)
        assert ours.decode([*ab, count - 2, *ab, count - 1]) == f"ab\ufffd{shown}\ufffd"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("a b", pre=None), "does not say how its tokenizer splits words"),
        (byte_level("a b", bos_token_id=2**32 - 1), "no such token is named; none is put there"),
        (byte_level("a b", eos_token_id=999), "eos_token_id is 999, of 259 tokens; no token is assumed"),
        (sentencepiece("ab", bos_token_id=999), "bos_token_id is 999, of 260 tokens; 1 is assumed"),
    ],
)
def test_what_a_file_leaves_open_is_warned_of(folder, metadata, message):
    file = write_vocabulary(folder / "open.gguf", metadata)
    with pytest.warns(RecycleWarning, match=message) as caught:
        read_vocabulary(file)
    assert all(str(file) in str(warning.message) for warning in caught)


@pytest.mark.parametrize("number", [None, 2**32 - 1])
def test_file_that_has_no_such_token_is_not_warned_of(folder, number):
    file = write_vocabulary(folder / "none.gguf", sentencepiece("ab", eos_token_id=number))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecycleWarning)
        read_vocabulary(file)


def test_token_types_that_llama_cpp_overrides_are_control_tokens(folder):
    file = write_vocabulary(
        folder / "normal.gguf",
        byte_level("a b", token_type=None, specials=("<|bos|>", "<|im_end|>", "<|fim_prefix|>", "<|channel|>")),
    )
    ours = read_vocabulary(file)
    assert ours.encode("<|im_end|>a<|fim_prefix|>", add_bos=False) == [1, ours.backend.token_to_id("a"), 2]
    assert ours.decode([1, 2, 3]) == "<|channel|>"


def test_special_tokens_of_phi3_take_the_white_space_after_them(folder, llama_cpp_reads):
    pieces = "a", "▁", "▁a", "<|endoftext|>", "<|end|>", "<|user|>"
    kinds = [*sentencepiece(*pieces)["token_type"][:-3], CONTROL, CONTROL, USER_DEFINED]
    metadata = sentencepiece(*pieces, token_type=kinds)
    file = write_vocabulary(folder / "phi3.gguf", metadata, name="My Phi-3 mini")
    ours = llama_cpp_reads(file, ["<|user|>\n a<|end|> \n<s> a", "<unk>  a", "<|endoftext|> a"])
    assert ours.encode("<|user|> a") == ours.encode("<|user|>a")


def test_empty_token_has_the_name_that_llama_cpp_gives(folder, llama_cpp_reads):
    metadata = sentencepiece("ab", "", *"▁ab")
    ours = llama_cpp_reads(write_vocabulary(folder / "empty.gguf", metadata), ["abab", ""])
    assert ours.backend.id_to_token(3 + len(BYTE_TOKENS) + 1) == "[EMPTY_260]"
