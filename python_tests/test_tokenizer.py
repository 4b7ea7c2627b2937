"""Token ids equal those of transformers, and streamed text equals the text decoded at once."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from models import write_base
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.gguf_header import GgufHeader
from recycle_ext.errors import RecycleError
from recycle_ext.text.gguf_vocabulary import from_gguf

TEXTS = [
    "Once upon a time, in a small village by the sea,",
    " two  spaces,\ttabs\n\n and   lines \r\n",
    "I'm sure we'll've seen IT'S",
    "def f(x: int) -> str:\n    return f'{x!r}' if x >= 10_000 else \"\"",
    "Grüße aus Zürich, 北京 and 🙂👩‍🚀 e\u0301",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "<b>Why</b>?"},
]


@pytest.fixture(scope="module")
def smollm2(default_model):
    return open_checkpoint(default_model).tokenizer


@pytest.fixture(scope="module")
def theirs(default_model):
    return AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)


@pytest.mark.parametrize("text", TEXTS)
def test_default_model_ids_equal_transformers(smollm2, theirs, text):
    assert smollm2.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_default_model_chat_equals_transformers(smollm2, theirs):
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert smollm2.apply_chat_template(CHAT) == expected


def test_default_model_digits_are_single_tokens(smollm2):
    # SmolLM2's rule, which transformers does not read from a GGUF file.
    for text in ("12345", "7", "a1b2"):
        assert len(smollm2.encode(text)) == len(text)
    assert smollm2.encode("x 9")[-2:] == smollm2.encode(" ") + smollm2.encode("9")


# The vocabulary lacks some bytes of control characters.
@given(text=st.text(st.characters(categories=("L", "N", "P", "S", "Zs"), max_codepoint=0xFFFF)))
def test_encoded_text_decodes_to_itself(smollm2, text):
    assume(not any(token.content in text for token in smollm2.backend.get_added_tokens_decoder().values()))
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode(smollm2, text):
    stream = smollm2.stream()
    ids = smollm2.encode(text)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == smollm2.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_a_split_character_emits_it_whole(smollm2):
    ids = smollm2.encode("🙂")
    assert len(ids) > 1
    stream = smollm2.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🙂"]


def test_stream_flush_of_half_a_character_is_u_fffd(smollm2):
    stream = smollm2.stream()
    assert stream.push(smollm2.encode("北")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_encode_of_invalid_utf8_is_refused(smollm2):
    with pytest.raises(RecycleError, match="not valid UTF-8: character 1"):
        smollm2.encode("a\udc80")


# ---- Hugging Face directories ------------------------------------------------------------------------


def write_directory(folder: Path, **settings) -> None:
    """A base model with a byte-level tokenizer trained on TEXTS."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    write_base(folder, vocab_size=backend.get_vocab_size())
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("text", TEXTS)
def test_directory_ids_equal_transformers(tmp_path, text):
    write_directory(tmp_path)
    ours = open_checkpoint(tmp_path).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("adds_bos", [False, True])
def test_directory_add_bos_token_decides_first_token(tmp_path, adds_bos):
    write_directory(tmp_path, add_bos_token=adds_bos)
    tokenizer = open_checkpoint(tmp_path).tokenizer
    bos = tokenizer.backend.token_to_id("<s>")
    assert (tokenizer.encode("sea")[0] == bos) is adds_bos
    assert tokenizer.encode("sea", add_bos=True)[0] == bos
    assert tokenizer.encode("sea", add_bos=False)[0] != bos


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("in_file", [False, True])
def test_directory_chat_template_equals_transformers(tmp_path, in_file):
    write_directory(tmp_path, **({} if in_file else {"chat_template": TEMPLATE}))
    if in_file:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert open_checkpoint(tmp_path).tokenizer.apply_chat_template(CHAT) == expected


def test_chat_template_that_raises_is_an_error(tmp_path):
    write_directory(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RecycleError, match="refuses these messages: roles must alternate"):
        open_checkpoint(tmp_path).tokenizer.apply_chat_template(CHAT)


def test_model_without_chat_template_is_an_error(tmp_path):
    write_directory(tmp_path)
    with pytest.raises(RecycleError, match="no chat template"):
        open_checkpoint(tmp_path).tokenizer.apply_chat_template(CHAT)


def test_directory_without_tokenizer_names_the_file(tmp_path):
    write_base(tmp_path)
    with pytest.raises(RecycleError, match=r"tokenizer\.json: missing"):
        _ = open_checkpoint(tmp_path).tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RecycleError, match=r"tokenizer\.json: not a tokenizer"):
        _ = open_checkpoint(tmp_path).tokenizer


def test_token_beyond_the_embedding_is_an_error(tmp_path):
    write_directory(tmp_path)
    write_base(tmp_path, vocab_size=100)
    with pytest.raises(RecycleError, match="vocabulary ends at 99"):
        open_checkpoint(tmp_path).tokenizer.encode(TEXTS[0])


# ---- GGUF files -----------------------------------------------------------------------------------


def write_vocabulary(file: Path, **changes) -> GgufHeader:
    """A GGUF file with a SentencePiece vocabulary and no tensors.

    The scores rank the merges so that ties and overlaps occur: "ab" before "bc" before "abc".
    """
    pieces = ["ab", "bc", "abc", "▁a", "▁ab", "▁abc", "ca", "▁▁", "cab"]
    letters = list("▁abc.")
    by_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *by_bytes, *pieces, *letters]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-100.0] * len(letters)
    writer = gguf.GGUFWriter(file, "llama")
    settings = {"kind": "llama", "pre": None, "bos": 1} | changes
    writer.add_tokenizer_model(settings["kind"])
    if settings["pre"]:
        writer.add_tokenizer_pre(settings["pre"])
        writer.add_token_merges(["a b"])
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(settings["bos"])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufHeader(file)


def gguf_tokenizer(header: GgufHeader, folder: Path):
    config = write_base(folder / "sizes", vocab_size=300).config
    return from_gguf(header, config.vocab_size, config.eos_token_ids)


@pytest.mark.parametrize("text", ["abc", "abcab  cab.", "caabbc abc", "é a", "b\nc", "xyz"])
def test_sentencepiece_ids_equal_transformers(tmp_path, text):
    ours = gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf"), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="v.gguf")
    ids = ours.encode(text)
    assert ids == [1, *theirs(text, add_special_tokens=False).input_ids]
    assert ours.decode(ids[1:]) == text


def test_sentencepiece_stream_starts_with_the_space_after_a_prompt(tmp_path):
    tokenizer = gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf"), tmp_path)
    prompt, word = tokenizer.encode("abc"), tokenizer.encode("abc", add_bos=False)
    for after, text in (([], "abc"), ([1], "abc"), (prompt, " abc")):
        stream = tokenizer.stream(after=after)
        assert "".join(map(stream.push, word)) + stream.flush() == text


def test_sentencepiece_stream_of_invalid_bytes_goes_on(tmp_path):
    tokenizer = gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf"), tmp_path)
    character = [3 + byte for byte in "北".encode()]
    invalid, letter = 3 + 0xFF, tokenizer.encode("a", add_bos=False)[0]
    after_a_character = tokenizer.stream(after=[1, letter])
    pieces = [after_a_character.push(token) for token in [*character, invalid, letter, 2]]
    assert pieces == ["", "", "北", "", "\ufffd a", ""]
    assert after_a_character.flush() == ""
    after_a_prompt_of_invalid_bytes = tokenizer.stream(after=[1, letter, invalid])
    assert after_a_prompt_of_invalid_bytes.push(letter) == " a"


def test_sentencepiece_puts_a_space_before_text(tmp_path):
    tokenizer = gguf_tokenizer(write_vocabulary(tmp_path / "v.gguf"), tmp_path)
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(" a", add_bos=False)]
    assert names == ["▁", "▁a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gpt2", "pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2' is not supported"),
        ({"kind": "t5"}, "tokenizer 't5' is not supported; gpt2 and llama are"),
        ({"kind": "gpt2"}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_unsupported_vocabulary_is_refused(tmp_path, changes, message):
    header = write_vocabulary(tmp_path / "v.gguf", **changes)
    with pytest.raises(RecycleError, match=message) as caught:
        gguf_tokenizer(header, tmp_path)
    assert "v.gguf" in str(caught.value)
