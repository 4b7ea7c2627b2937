"""Arguments of the public calls that are nearly right: the result is right, or a RecycleError names the argument."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_base, write_byte_tokenizer, write_module

import recycle_ext
from recycle_ext import Decoder, RecycleError, generate
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.module import open_module
from recycle_ext.weights.pack import pack_model

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base", vocab_size=write_byte_tokenizer(folder / "base"))
    write_module(folder / "module", base)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return recycle_ext.load(folder / "base", folder / "module", dtype="f32")


def tokens(model, prompt=PROMPT, **arguments):
    generation = generate(model, prompt, **{"max_new_tokens": 6, "temperature": 0.7, "seed": 1} | arguments)
    "".join(generation)
    return generation.token_ids


@pytest.mark.parametrize(
    ("name", "given", "plain"),
    [
        ("prompt", torch.tensor(PROMPT), PROMPT),
        ("prompt", torch.tensor([PROMPT]), PROMPT),
        ("prompt", torch.tensor([PROMPT], dtype=torch.int32), PROMPT),
        ("prompt", np.array(PROMPT), PROMPT),
        ("prompt", np.array([PROMPT], np.uint8), PROMPT),
        ("prompt", [PROMPT], PROMPT),
        ("prompt", list(map(np.int64, PROMPT)), PROMPT),
        ("prompt", tuple(PROMPT), PROMPT),
        ("prompt", range(5, 9), PROMPT),
        ("prompt", np.str_("hello"), "hello"),
        ("seed", np.int64(7), 7),
        ("seed", np.uint64(7), 7),
        ("seed", torch.tensor(7), 7),
        ("seed", 2**64 + 7, 7),
        ("seed", -1, 2**63 - 1),
        ("max_new_tokens", np.int32(5), 5),
        ("max_new_tokens", 10**30, 10**6),
        ("drafts", np.int64(2), 2),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", torch.tensor(1), 1.0),
        ("top_k", np.int16(20), 20),
        ("top_p", np.float64(0.5), 0.5),
        ("chat", np.False_, False),
        ("mode", None, "verify"),
    ],
)
def test_argument_of_another_type_means_what_it_says(model, name, given, plain):
    assert tokens(model, **{name: given}) == tokens(model, **{name: plain})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("prompt", b"hello", "the prompt is bytes; decode it to text, or give token ids"),
        ("prompt", None, "the prompt is None; it must be token ids"),
        ("prompt", ["hello"], "the prompt: item 0 is 'hello'; there must be token ids"),
        ("prompt", [PROMPT, PROMPT], r"the prompt: item 0 is \[5, 6, 7, 8\]; there must be token ids"),
        ("prompt", [5, 6.0], "the prompt: item 1 is 6.0"),
        ("prompt", [True], "the prompt: item 0 is True"),
        ("prompt", [5, 2**70], "the prompt: item 1 is 1180591620717411303424; token ids are 0 to 257"),
        ("prompt", [5, -1], "the prompt: item 1 is -1; token ids are 0 to 257"),
        ("prompt", torch.zeros(2, 0), r"the prompt: item 0 is \[\]"),
        ("prompt", torch.zeros(1, 0), "the prompt is empty"),
        ("prompt", {5: 6}, "the prompt is {5: 6}"),
        ("max_new_tokens", 8.0, "max_new_tokens is 8.0; it must be at least 1"),
        ("max_new_tokens", True, "max_new_tokens is True"),
        ("max_new_tokens", "8", "max_new_tokens is '8'"),
        ("max_new_tokens", None, "max_new_tokens is None"),
        ("drafts", True, "drafts is True; it must be 1 to 4, or auto"),
        ("drafts", None, "drafts is None; it must be 1 to 4, or auto"),
        ("mode", ["verify"], r"mode is \['verify'\]; it must be one of standard, verify, alternate"),
        ("mode", "", "mode is ''; it must be one of"),
        ("temperature", None, r"temperature is None; it must be 0 \(greedy\) or a positive number"),
        ("temperature", 10**400, "temperature is 1000"),
        ("temperature", "1", "temperature is '1'"),
        ("temperature", torch.ones(2), "temperature is tensor"),
        ("top_k", 2**63, "top_k is 9223372036854775808"),
        ("top_k", 20.0, "top_k is 20.0"),
        ("top_p", None, "top_p is None"),
        ("seed", "7", "seed is '7'; it must be an integer"),
        ("seed", 7.0, "seed is 7.0"),
        ("seed", [7], r"seed is \[7\]"),
        ("chat", "no", "chat is 'no'; it must be True or False"),
        ("chat", True, "chat is True, which needs the prompt as text"),
        ("cache_dtype", torch.float32, "cache_dtype is torch.float32; it must be one of f32, bf16, q8"),
        ("cache_dtype", ["f32"], r"cache_dtype is \['f32'\]"),
    ],
)
def test_wrong_argument_of_generate_is_named(model, name, given, message):
    with pytest.raises(RecycleError, match=message):
        tokens(model, **{name: given})


def test_without_a_seed_every_sample_is_another(model):
    generations = [generate(model, PROMPT, max_new_tokens=16, temperature=1.0) for _ in range(5)]
    texts = ["".join(generation) for generation in generations]
    assert len(set(texts)) == 5
    again = generate(model, PROMPT, max_new_tokens=16, temperature=1.0, seed=generations[0].statistics.seed)
    assert "".join(again) == texts[0]


def test_statistics_of_a_greedy_text_have_no_seed(model):
    assert generate(model, PROMPT, max_new_tokens=2).statistics.seed is None
    assert generate(model, PROMPT, max_new_tokens=2, temperature=1.0, seed=5).statistics.seed == 5


def test_decoder_without_seeds_draws_one_for_each_sequence(model):
    one, other = (Decoder(model.packed, batch=2, capacity=20, temperature=1.0).seeds for _ in range(2))
    assert len({*one, *other}) == 4


LETTERS = st.text("abcdefghijklmnop\0\n é\udc80", max_size=5)
INTEGERS = st.integers() | st.integers(-3, 9) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**400, 10**5000])
SCALARS = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.floats()
    | st.sampled_from([0.0, 1.0, 2.0, 0.5])
    | st.complex_numbers()
    | LETTERS
    | st.binary(max_size=4)
    | st.builds(np.int64, st.integers(-3, 9))
    | st.builds(np.float32, st.integers(-3, 9))
    | st.builds(np.bool_, st.booleans())
    | st.builds(torch.tensor, st.integers(-3, 9) | st.floats(-3, 9) | st.booleans())
    | st.sampled_from([Path("none"), torch.float32, torch.bfloat16, torch.device("meta"), object(), int, print, ...])
)
LISTS = st.lists(SCALARS, max_size=3)
VALUES = (
    SCALARS
    | LISTS
    | LISTS.map(tuple)
    | st.lists(LISTS, max_size=2)
    | st.lists(st.integers(-3, 300), max_size=4).map(lambda ids: torch.tensor(ids, dtype=torch.int64))
    | st.lists(st.integers(-3, 300), min_size=1, max_size=4).map(lambda ids: np.array([ids]))
    | st.lists(st.floats(), max_size=3).map(np.array)
    | st.builds(torch.zeros, st.sampled_from([(0,), (1, 0), (1, 2), (2, 2), (1, 1, 1)]), dtype=st.just(torch.int64))
    | st.just(torch.zeros(2, device="meta"))
    | st.dictionaries(st.integers(0, 3), st.integers(0, 3), max_size=2)
    | st.frozensets(st.integers(0, 3), max_size=2)
    | st.builds(iter, LISTS)
)


def public_calls(folder, model):
    """Each call with arguments that are right; the results are used."""
    base, module = folder / "base", folder / "module"
    checkpoint = open_checkpoint(base)

    def method(name):
        def call(**arguments):
            decoder = Decoder(model.packed, "verify", 2, batch=1, capacity=20)
            result = getattr(decoder, name)(**arguments)
            return list(result) if name == "decode" else result

        return call

    return {
        "load": (recycle_ext.load, {"model": base, "module": module, "dtype": "f32", "threads": 1, "device": "cpu",
                                    "module_dtype": None}),
        "generate": (lambda **arguments: list(generate(**arguments)),
                     {"model": model, "prompt": PROMPT, "max_new_tokens": 3}
                     | dict.fromkeys(inspect.signature(generate).parameters.keys()
                                     - {"model", "prompt", "max_new_tokens"}, ...)),
        "Decoder": (Decoder, {"model": model.packed, "batch": 1, "seeds": None}
                    | dict.fromkeys(inspect.signature(Decoder).parameters.keys() - {"model", "batch", "seeds"}, ...)),
        "prefill": (method("prefill"), {"prompt": PROMPT, "sequence": 0}),
        "set_num_draft_tokens": (method("set_num_draft_tokens"), {"count": 1}),
        "room": (method("room"), {"sequence": 0}),
        "release": (method("release"), {"sequence": 0}),
        "decode": (method("decode"), {"prompt": PROMPT, "max_new_tokens": 3, "end_tokens": ()}),
        "pack_model": (pack_model, {"base": checkpoint, "module": open_module(module, checkpoint), "dtype": "f32",
                                    "module_dtype": None}),
        "open_checkpoint": (open_checkpoint, {"model": base}),
        "open_module": (open_module, {"path": module, "base": checkpoint}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def calls(folder, model):
    return public_calls(folder, model)


@settings(max_examples=600)
@given(data=st.data())
def test_any_value_of_any_argument_is_right_or_refused_by_name(calls, data):
    name = data.draw(st.sampled_from(sorted(calls)))
    function, good = calls[name]
    argument = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(VALUES)
    if argument == "model" and value is None:
        return  # the default model, which is fetched
    # ... stands for the argument's default value.
    arguments = {key: each for key, each in good.items() if each is not ...} | {argument: value}
    try:
        function(**arguments)
    except RecycleError as error:
        said = str(error)
        assert {"path": "module"}.get(argument, argument) in said or (isinstance(value, str) and value in said)
        assert len(said) < 300
