"""Special tokens that tokenizer_config.json and special_tokens_map.json name: ids, text and templates as in transformers."""

from __future__ import annotations

import json

import pytest
from models import write_base
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from recycle_ext.checkpoint.base_model import open_checkpoint

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
END = {"content": "<|im_end|>", **FLAGS}
LISTED = {"2": END | {"special": True}}
TEXT = "a<s> </s> b <|im_end|> c<new>"
TEMPLATE = "{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}{{ image_token }}"
MESSAGES = [{"role": "user", "content": "hi"}]


def write_directory(folder, config, special_tokens_map=None, added=()):
    """A model with a tokenizer of bytes; its first tokens are plain ones but for those in ``added``."""
    letters = ["<s>", "</s>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Backend(models.BPE({text: index for index, text in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    write_base(folder, vocab_size=len(letters) + 1)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))


@pytest.mark.parametrize(
    ("config", "special_tokens_map", "added"),
    [
        ({}, None, []),
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, []),
        ({"bos_token": None, "eos_token": END | {"__type": "AddedToken"}}, None, []),
        ({}, {"bos_token": "<s>", "eos_token": END}, []),
        ({"eos_token": "</s>"}, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, []),
        ({"eos_token": "</s>", "added_tokens_decoder": LISTED}, {"eos_token": "<s>"}, []),
        ({"added_tokens_decoder": LISTED | {"259": END | {"content": "<new>", "special": False}}}, None, []),
        ({"added_tokens_decoder": {"2": LISTED["2"] | {"lstrip": True, "rstrip": True}}}, None, ["<|im_end|>"]),
        ({"eos_token": "<|im_end|>"}, None, [AddedToken("<|im_end|>", lstrip=True, special=False, normalized=False)]),
        ({"eos_token": "<new>"}, None, []),
        ({"additional_special_tokens": ["<|im_end|>"]}, None, []),
        ({"extra_special_tokens": [END | {"__type": "AddedToken", "special": True}]}, None, []),
        ({"extra_special_tokens": {"image_token": "<|im_end|>"}}, None, []),
        ({"image_token": "<|im_end|>"}, {"additional_special_tokens": ["</s>"]}, []),
    ],
)
def test_special_tokens_are_those_of_transformers(tmp_path, config, special_tokens_map, added):
    write_directory(tmp_path, config, special_tokens_map, added)
    ours, theirs = open_checkpoint(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT, add_special_tokens=False).input_ids
    assert ours.encode(TEXT, add_bos=False) == ids
    assert ours.decode([*ids, 2, 1, 0]) == theirs.decode([*ids, 2, 1, 0], skip_special_tokens=True)
    assert ours.apply_chat_template(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize("values", [{"eos_token": 3}, {"eos_token": {}}, {"extra_special_tokens": [None]}])
def test_special_token_that_is_no_text_is_left_out(tmp_path, values):
    write_directory(tmp_path, values | {"added_tokens_decoder": {"x": 1, "1": {"content": 2}}}, values)
    assert open_checkpoint(tmp_path).tokenizer.encode("</s>") != [1]
