"""Training text: from files, and written by the base."""

from __future__ import annotations

import json

import pytest
import torch
from models import reference_base, write_base
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from recycle_ext.errors import RecycleError
from recycle_ext.text.split_rules import SPLIT_RULES
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.train import documents as text_of_files
from recycle_ext.train.documents import documents, packed, token_ids
from recycle_ext.train.self_text import Prompts, write_text


class Words:
    """A tokenizer with one token for each word: its length."""

    eos_token_ids = (0, 7)
    chat_template = None

    def encode(self, text, add_bos=None):
        return [len(word) for word in text.split()]


CHAT = [{"role": "user", "content": "hi"}, {"content": "ho"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
PARTS = [
    {"type": "text", "text": "look "},
    {"type": "image_url", "image_url": {"url": "x"}},
    {"type": "text", "text": "here"},
]


def jsonl(*texts: object) -> str:
    return "\n\n".join(json.dumps({"text": text}) for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one text", ["one text"]),
        ("a.txt", "\ufeffone text", ["one text"]),
        ("a.TXT", '{"text": "as it is"}', ['{"text": "as it is"}']),
        ("a.jsonl", jsonl("first", CHAT), ["first", "hi\nho"]),
        ("a.jsonl", "\ufeff" + jsonl("first"), ["first"]),
        ("a.JSONL", jsonl("first", None, "second"), ["first", "second"]),
        ("a.ndjson", jsonl("first"), ["first"]),
        ("a.json", jsonl("first", "second"), ["first", "second"]),
        ("a.json", '[{"text": "first"}, {"text": "second"}]', ["first", "second"]),
        ("a.Json", '{"text": "first"}', ["first"]),
        ("a.jsonl", jsonl([CHAT[0], CALL, CHAT[1]]), ["hi\nho"]),
        ("a.jsonl", jsonl([CHAT[0], {"role": "assistant", "tool_calls": []}]), ["hi"]),
        ("a.jsonl", jsonl([{"role": "user", "content": PARTS}]), ["look here"]),
        ("a.jsonl", jsonl([{"role": "user", "content": ["yo", {"type": "text", "text": None}]}]), ["yo"]),
    ],
)
def test_documents_are_the_texts_of_a_file(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, "utf-8")
    assert list(documents([str(tmp_path / name)], "text")) == expected


def test_documents_of_parquet_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read with pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", None, "y z"], "n": [1, 2, 3]}), file)
    assert list(documents([str(file)], "body")) == ["x", "y z"]
    with pytest.raises(RecycleError, match=r'no column "text" \(there is: body, n\)'):
        list(documents([str(file)], "text"))
    chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": None}]
    capitals = tmp_path / "B.PARQUET"
    parquet.write_table(pyarrow.table({"text": [chat]}), capitals)
    assert list(documents([str(capitals)], "text")) == ["hi"]
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(RecycleError, match=r"a\.parquet: cannot be read as parquet"):
        list(documents([str(file)], "body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n ", "there is no text in it"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(.* at byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}', r'line 1: no "text" \(there is: body\); --text-field'),
        ("a.jsonl", b'{"text": 3}', 'line 1: "text" is int, not text'),
        ("a.jsonl", b"", "there is no text in it"),
        ("a.txt", b"x" * 20_000 + b"\xe9", r"not UTF-8 text \(.* at byte 20000\)"),
        ("a.txt", "x".encode("utf-16"), "not UTF-8 text"),
        ("a.json", b'[{"text": "x"}, {"body": "y"}]', r'object 2: no "text" \(there is: body\)'),
        ("a.csv", b"text\nx\n", r"a\.csv: tables are read from \.jsonl, \.json and \.parquet"),
        ("a.TSV", b"text\nx\n", "tables are read from"),
        (
            "a.jsonl",
            jsonl([{"from": "human", "value": "x"}]).encode(),
            r'turn 1: no "content" \(there is: from, value\)',
        ),
        ("a.jsonl", jsonl([CHAT[0], {"content": 5}]).encode(), 'line 1, turn 2: "content" is int, not text'),
        ("a.jsonl", jsonl([{"content": {"text": "x"}}]).encode(), 'turn 1: "content" is dict, not text'),
    ],
)
def test_file_without_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecycleError, match=message):
        list(documents([str(tmp_path / name)], "text"))


def test_missing_file_is_refused(tmp_path):
    for name in ("no.txt", "no.jsonl", "no.parquet"):
        if name.endswith("parquet"):
            pytest.importorskip("pyarrow", reason="parquet is read with pyarrow")
        with pytest.raises(RecycleError, match=name):
            list(documents([str(tmp_path / name)], "text"))


def test_packed_documents_end_with_the_end_token():
    sequences = packed(Words(), iter(["a bb", "ccc", "d"]), 3)
    assert sequences.tolist() == [[1, 2, 0], [3, 0, 1]]  # the last end token is in an incomplete sequence
    with pytest.raises(RecycleError, match="--text has 2 tokens; at least two sequences"):
        packed(Words(), iter(["a"]), 3)


LONG = (
    "The cat's mat, 12 345.\nOn a new line: caf\u00e9 \u2014 d\u00e9j\u00e0 vu!\n\n  Indented (text).\n\u7b2c\u4e00\u884c\u3002\n\u7b2c\u4e8c\u884c\u3002\n"
    * 40
)


def byte_level(name: str) -> Backend:
    """Byte-level BPE that splits words by a rule of this name."""
    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLIT_RULES[name].patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([LONG], trainer)
    return backend


def prefixed() -> Backend:
    """BPE that puts a space before the text, as Llama 2 does."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    words = Backend(models.BPE(unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = backend.normalizer, pre_tokenizers.Metaspace(split=True)
    words.train_from_iterator([LONG.replace("\n", " ")], trainer)
    fields = json.loads(backend.to_str())
    fields["model"] |= {name: json.loads(words.to_str())["model"][name] for name in ("vocab", "merges")}
    return Backend.from_str(json.dumps(fields))


# A name of each rule, but for those whose pieces go on over the space between words.
RULES = {rule: name for name, rule in SPLIT_RULES.items() if name not in ("superbpe", "exaone-moe")}


@pytest.mark.parametrize("kind", [*RULES.values(), "prefixed"])
def test_long_document_in_parts_has_the_tokens_of_the_whole(monkeypatch, kind):
    monkeypatch.setattr(text_of_files, "_PIECE", 50)
    backend = prefixed() if kind == "prefixed" else byte_level(kind)
    tokenizer = Tokenizer(backend, backend.get_vocab_size(), (1,), 0, adds_bos=True, chat_template=None)
    parts = list(token_ids(tokenizer, LONG))
    assert len(parts) > 40
    assert [token for part in parts for token in part] == tokenizer.encode(LONG)


@pytest.mark.parametrize("separator", [" ", "\n", ".\n"])
def test_long_document_is_never_encoded_at_once(separator):
    """The encoding of a text takes a hundred times the text's memory."""
    lengths = []

    class Measured(Words):
        def encode(self, text, add_bos=None):
            lengths.append(len(text))
            return super().encode(text)

    text = separator.join(["word"] * 100_000)
    assert packed(Measured(), iter([text]), 10).dtype == torch.int32
    assert max(lengths) < 66_000


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def base(request, tmp_path):
    return write_base(tmp_path / "base", request.param, vocab_size=40)


class SomePrompts:
    """Prompts of two tokens."""

    def __init__(self):
        self.count = 0

    def next(self):
        self.count += 1
        return [3 + self.count % 30, 5]


def test_written_text_equals_bases_greedy_text_at_temperature_0(base):
    """Rows get the temperatures 0, 0, 0.7 and 1; after the varied tokens the first two are greedy."""
    model = reference_base(base, torch.float32)
    tokens, hidden = write_text(model, SomePrompts(), set(), 8, 40, seed=1)
    states = model(tokens).detach()
    # The cache of the writing loop is in bfloat16.
    torch.testing.assert_close(hidden, states, rtol=0.05, atol=0.05 * states.abs().max().item())
    greedy = model.logits(hidden).argmax(-1)
    agreement = (tokens[:, 15:] == greedy[:, 14:-1]).float().mean(-1)
    for row, share in enumerate(agreement.tolist()):
        assert (share == 1) == (row % 4 < 2), (row, share)


def test_written_text_of_same_seed_is_the_same(base):
    model = reference_base(base, torch.float32)
    first = write_text(model, SomePrompts(), set(), 4, 30, seed=5)[0]
    assert torch.equal(first, write_text(model, SomePrompts(), set(), 4, 30, seed=5)[0])
    assert not torch.equal(first, write_text(model, SomePrompts(), set(), 4, 30, seed=6)[0])


def test_written_text_goes_on_with_a_prompt_after_an_end_token(base):
    model = reference_base(base, torch.float32)
    ends = set(range(0, 40, 2))  # every other token ends a text
    tokens, _ = write_text(model, SomePrompts(), ends, 4, 40, seed=2)
    for row in tokens.tolist():
        position = 2
        while position < 37:
            if row[position] in ends:
                assert row[position + 2] == 5  # the second token of a prompt
                position += 3
            else:
                position += 1


def test_prompts_have_names_replaced_and_differ():
    class Unsplit(Words):
        def encode(self, text, add_bos=None):
            return [text]

    prompts = Prompts(Unsplit(), seed=0)
    texts = [prompts.next()[0] for _ in range(300)]
    assert len(set(texts)) > 150
    assert not any("{topics}" in t or "{number}" in t or "{names}" in t for t in texts)


def test_prompts_of_chat_model_use_its_template():
    class Chat(Words):
        chat_template = "yes"

        def encode(self, text, add_bos=None):
            return [text]

        def apply_chat_template(self, messages):
            return f"<user>{messages[0]['content']}<assistant>"

    prompts = Prompts(Chat(), seed=0)
    texts = [prompts.next()[0] for _ in range(300)]
    asked = sum(t.startswith("<user>") and t.endswith("<assistant>") for t in texts)
    open_ended = sum(t == "<user>" for t in texts)
    assert 120 < asked < 210
    assert 10 < open_ended < 60
