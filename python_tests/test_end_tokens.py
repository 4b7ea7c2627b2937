"""A text ends at every token that any file of the model calls an end, and at those of well-known texts."""

from __future__ import annotations

import json

import gguf
import pytest
from model_files import TEXTS, edit_json, write_gguf
from models import write_base, write_byte_tokenizer
from tokenizers import Tokenizer as Backend

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.text.end_tokens import END_TEXTS, end_tokens

NOT_ENDS = ["<x>", "<s>", "<|im_start|>", "<|eot|>", "<|file_separator|>", "<|end_of_turn|>", "</s", "<pad>"]


def ends_of(texts, named=()):
    """Texts that end, of a vocabulary of ``texts``."""
    ids = {text: index for index, text in enumerate(texts)}
    return {texts[i] for i in end_tokens(named, ids.get, len(texts))}


@pytest.fixture(scope="module")
def llama_cpp():
    library = pytest.importorskip("llama_cpp", reason="the extra `bench` brings it")
    # Its Python logger fails at texts that are not ASCII.
    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, None)
    library.llama_backend_init()
    yield library
    library.llama_log_set(library._logger.llama_log_callback, None)


def ends_of_llama_cpp(llama_cpp, file, texts, **named):
    """Texts at which llama.cpp ends, of a file with a byte-level vocabulary of ``texts`` and letters."""
    writer = gguf.GGUFWriter(file, "llama")
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    for name in sizes:
        writer.add_uint32(f"llama.{name}", 8)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*texts, *letters])
    writer.add_token_types([1] * (len(texts) + len(letters)))
    writer.add_token_merges(["a b"])
    for name, token_id in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    vocab = llama_cpp.llama_model_get_vocab(model)
    ends = {text for i, text in enumerate(texts) if llama_cpp.llama_vocab_is_eog(vocab, i)}
    llama_cpp.llama_model_free(model)
    return ends


@pytest.mark.parametrize("text", [*END_TEXTS, *NOT_ENDS])
def test_text_is_an_end_where_llama_cpp_ends(tmp_path, llama_cpp, text):
    texts = ["<first>", text]
    assert ends_of(texts, [0]) == ends_of_llama_cpp(llama_cpp, tmp_path / "v.gguf", texts, eos=0)


@pytest.mark.parametrize("first", ["<|return|>", "<|flush|>", "<|tool_response>"])
@pytest.mark.parametrize("second", ["<|call|>", "<|calls|>", "<|flush|>"])
def test_text_is_no_end_beside_others_where_llama_cpp_goes_on(tmp_path, llama_cpp, first, second):
    texts = list(dict.fromkeys(["<first>", "<|end|>", "</s>", first, second]))
    assert ends_of(texts, [0]) == ends_of_llama_cpp(llama_cpp, tmp_path / "v.gguf", texts, eos=0)


def test_named_ends_come_first_and_ids_outside_the_vocabulary_are_left_out():
    ids = {"</s>": 2, "<|im_end|>": 4}
    assert end_tokens([4, None, 1, 1, 9, -1], ids.get, 9) == (4, 1, 2)


@pytest.mark.parametrize("name", ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_gguf_file_ends_at_token_that_metadata_names(tmp_path, llama_cpp, name):
    assert ends_of_llama_cpp(llama_cpp, tmp_path / "v.gguf", ["<a>", "<b>"], eos=0, **{name: 1}) == {"<a>", "<b>"}
    metadata = {f"tokenizer.ggml.{name}_token_id": 5}
    write_gguf(tmp_path / "model.gguf", write_base(tmp_path / "hf"), metadata=metadata)
    assert open_checkpoint(tmp_path / "model.gguf").config.eos_token_ids == (2, 5)


def test_gguf_file_ends_at_texts_of_its_vocabulary(tmp_path):
    metadata = {"tokenizer.ggml.tokens": ["<|endoftext|>", *TEXTS[1:9], "<end_of_turn>", *TEXTS[10:]]}
    write_gguf(tmp_path / "model.gguf", write_base(tmp_path / "hf"), metadata=metadata)
    assert open_checkpoint(tmp_path / "model.gguf").config.eos_token_ids == (2, 0, 9)


def write_directory(folder, texts=("<a>", "<b>", "<c>"), eos_token_id=None, **files):
    """A model with a tokenizer of bytes, of which the first ones have other texts. files: their content by name."""
    write_base(folder, vocab_size=write_byte_tokenizer(folder))
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(zip(texts, range(len(texts)), strict=True))
    vocab |= {text: i for text, i in backend["model"]["vocab"].items() if i >= len(texts)}
    backend["model"]["vocab"] = vocab
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    (folder / "tokenizer_config.json").unlink()
    edit_json(eos_token_id=eos_token_id)(folder)
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


END = {"content": "<b>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    [
        {"eos_token_id": 1},
        {"eos_token_id": [1]},
        {"generation_config": {"eos_token_id": 1}},
        {"generation_config": {"eos_token_id": [1]}},
        {"tokenizer_config": {"eos_token": "<b>"}},
        {"tokenizer_config": {"eos_token": END | {"__type": "AddedToken"}}},
        {"tokenizer_config": {"eot_token": "<b>"}},
        {"special_tokens_map": {"eos_token": "<b>"}},
        {"special_tokens_map": {"eos_token": END}},
        {"special_tokens_map": {"eos_token": "<b>"}, "tokenizer_config": {"added_tokens_decoder": {}}},
        {"special_tokens_map": {"eos_token": None}, "tokenizer_config": {"eos_token": "<b>"}},
        {"texts": ["<a>", "<|im_end|>"]},
        {"texts": ["<a>", "<|eot_id|>"]},
    ],
)
def test_directory_ends_at_token_that_only_one_source_has(tmp_path, files):
    write_directory(tmp_path, **files)
    assert open_checkpoint(tmp_path).tokenizer.eos_token_ids == (1,)


def test_directory_ends_at_tokens_of_all_sources(tmp_path):
    write_directory(
        tmp_path,
        texts=["<a>", "<b>", "<c>", "<d>", "<e>", "</s>", "<|endoftext|>"],
        eos_token_id=[3, 1],
        generation_config={"eos_token_id": 2},
        tokenizer_config={"eos_token": "<a>"},
        special_tokens_map={"eos_token": "<e>"},
    )
    assert set(open_checkpoint(tmp_path).tokenizer.eos_token_ids) == set(range(7))


def test_end_outside_the_vocabulary_is_left_out(tmp_path):
    write_directory(tmp_path, eos_token_id=[1, 100000], tokenizer_config={"eos_token": "<none>"})
    assert open_checkpoint(tmp_path).tokenizer.eos_token_ids == (1,)


def test_directory_and_gguf_of_one_vocabulary_end_alike(tmp_path):
    texts = [*END_TEXTS, *NOT_ENDS]
    write_directory(tmp_path, texts=texts)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": None}
    directory = open_checkpoint(tmp_path)
    write_gguf(tmp_path / "model.gguf", directory, metadata=metadata)
    assert directory.tokenizer.eos_token_ids == open_checkpoint(tmp_path / "model.gguf").config.eos_token_ids
