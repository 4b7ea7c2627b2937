"""Training text: from files, and written by the base."""

from __future__ import annotations

import json

import pytest
import torch
from models import reference_base, write_base

from recycle_ext.errors import RecycleError
from recycle_ext.train.documents import documents, packed
from recycle_ext.train.self_text import Prompts, write_text


class Words:
    """A tokenizer with one token for each word: its length."""

    eos_token_ids = (0, 7)
    chat_template = None

    def encode(self, text, add_bos=None):
        return [len(word) for word in text.split()]


def test_documents_of_txt_and_jsonl_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one text", "utf-8")
    rows = [{"text": "first"}, {"text": [{"role": "user", "content": "hi"}, {"content": "ho"}]}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), "utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert list(documents(files, "text")) == ["one text", "first", "hi\nho"]


def test_documents_of_parquet_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read with pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x", None, "y z"], "n": [1, 2, 3]}), file)
    assert list(documents([str(file)], "body")) == ["x", "y z"]
    with pytest.raises(RecycleError, match=r'no column "text" \(there is: body, n\)'):
        list(documents([str(file)], "text"))
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
