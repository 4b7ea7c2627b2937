"""The parts of python -m recycle_ext.eval: each figure equals a plain computation of it."""

from __future__ import annotations

import math
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_model import NEW_TOKENS, likelihoods_of_transformers, write_model
from models import reference_base, reference_module

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.module import open_module
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.step import SequenceStep
from recycle_ext.eval import cloze, intervals, prompts
from recycle_ext.eval.__main__ import main
from recycle_ext.eval.decoding import Run, common_tokens, decode
from recycle_ext.eval.likelihood import load_base, read
from recycle_ext.eval.report import cloze_figures
from recycle_ext.reference.ops import ReferenceDecoder
from recycle_ext.weights.pack import pack_model

CATEGORIES = ["story", "chat", "code", "question", "summary", "list", "arithmetic"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "base")


# ---- Intervals ---------------------------------------------------------------------------------------


def test_interval_of_a_mean_equals_normal_theory():
    values = np.random.default_rng(3).normal(2.0, 5.0, 500)
    low, high = intervals.interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_interval_covers_the_truth_at_its_level(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    generator = np.random.default_rng(0)
    bounds = [intervals.interval(generator.exponential(1.0, 60)) for _ in range(200)]
    # A bit less than 95% for 60 examples of a skewed distribution; 200 draws have a standard error of 1.5%.
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in bounds]) <= 0.985


def test_columns_are_resampled_together():
    x = np.random.default_rng(1).exponential(1.0, 40)
    assert intervals.interval(3 * x, x, statistic=intervals.ratio) == pytest.approx((3, 3))
    shuffled = np.random.default_rng(2).permutation(3 * x)
    low, high = intervals.interval(shuffled, x, statistic=intervals.ratio)
    assert low < 2.5 < 3.5 < high


def test_same_values_give_the_same_interval():
    values = np.arange(10.0) ** 2
    assert intervals.interval(values) == intervals.interval(values)
    assert intervals.interval(values) != intervals.interval(values + 1)


def test_interval_of_too_few_examples_is_none():
    assert intervals.interval(np.array([1.0])) is None
    # Some resamples hold the first example alone: a share of nothing.
    shares = np.array([0.0, 1.0])
    assert intervals.interval(shares, shares, statistic=intervals.ratio) is None


# ---- Counting ----------------------------------------------------------------------------------------


def slow_decode(base, module, mode: str, drafts: int, prompt: list[int], ends: set[int]) -> Run:
    """The same figures from the decoder in plain PyTorch, counted from the definitions."""
    decoder = ReferenceDecoder(reference_base(base), reference_module(module), module.draft_vocab(), mode, drafts)
    text = [decoder.prefill(prompt)]
    steps = []  # place of the step's first token in the text, draft tokens, new tokens
    while len(text) < NEW_TOKENS and not ends & set(text):
        place, drafted = len(text), list(decoder.pending[1:])
        steps.append((place, drafted, decoder.step()))
        text += steps[-1][2]
    end_places = [index + 1 for index, token in enumerate(text) if token in ends]
    length = min([NEW_TOKENS, *end_places])
    offered, accepted = [0] * drafts, [0] * drafts
    for place, drafted, new in steps:
        for j in range(drafts):
            all_before_accepted = new[:j] == drafted[:j] and len(new) > j
            if all_before_accepted and place + j < length:
                offered[j] += 1
                accepted[j] += len(new) > j + 1
    return Run(
        token_ids=[token for token in text[:length] if token not in ends],
        steps=len(steps),
        step_tokens=length - 1,
        offered=offered,
        accepted=accepted,
    )


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
def test_run_counts_equal_those_of_a_slow_loop(model, mode, drafts):
    base = open_checkpoint(model)
    module = open_module(model.parent / "module", base)
    packed = pack_model(base, module, "f32")
    decoder = Decoder(packed, mode, drafts, capacity=100, cache_dtype=torch.float32)
    seen = {"accepted": 0, "rejected": 0, "ended": 0}
    for seed in range(3):
        prompt = [5 + seed, 70, 31 * seed, 9]
        endless = slow_decode(base, module, mode, drafts, prompt, set())
        # A token that the text has somewhere plays the end token.
        ends = {endless.token_ids[5 * seed + 3]}
        ended = slow_decode(base, module, mode, drafts, prompt, ends)
        for expected, end_tokens in ((endless, ()), (ended, ends)):
            run = decode(decoder, prompt, NEW_TOKENS, end_tokens)
            assert run.seconds > 0 or not run.steps
            run.seconds = 0.0
            assert run == expected
            seen["accepted"] += sum(run.accepted)
            seen["rejected"] += sum(run.offered) - sum(run.accepted)
            seen["ended"] += len(run.token_ids) < NEW_TOKENS
    assert seen["accepted"] > 0
    assert seen["ended"] > 0
    assert (seen["rejected"] > 0) == (mode == "verify")


@pytest.mark.parametrize(
    ("tokens", "left", "offered", "accepted", "counted"),
    [
        ([7], 9, [1, 0], [0, 0], 1),
        ([4, 7], 9, [1, 1], [1, 0], 2),
        ([4, 5, 7], 9, [1, 1], [1, 1], 3),
        ([2, 7], 9, [1, 0], [1, 0], 1),  # draft tokens behind the end token, 2, do not count
        ([4, 2, 7], 9, [1, 1], [1, 1], 2),
        ([2], 9, [1, 0], [0, 0], 1),
        ([4, 5, 7], 2, [1, 1], [1, 1], 2),  # draft tokens past the limit do not count
        ([4, 5, 7], 1, [1, 0], [1, 0], 1),
        ([4, 7], 1, [1, 0], [1, 0], 1),
        ([7], 1, [1, 0], [0, 0], 1),
    ],
)
def test_step_counts_draft_tokens_up_to_the_end(tokens, left, offered, accepted, counted):
    run = Run([9], offered=[0, 0], accepted=[0, 0])
    run.add(SequenceStep(tokens, 2, len(tokens) - 1, 0.5).cut(left, {2}))
    assert (run.steps, run.step_tokens, run.seconds) == (1, counted, 0.5)
    assert (run.offered, run.accepted) == (offered, accepted)
    assert run.token_ids == [9, *tokens[:counted]]


def test_common_tokens_end_at_the_first_difference():
    assert common_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2
    assert common_tokens([], [1]) == 0


# ---- Likelihood --------------------------------------------------------------------------------------


def test_likelihoods_equal_those_of_transformers(model):
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 9), (20, 1), (1, 30), (5, 5), (7, 2), (2, 17), (4, 4), (9, 9), (6, 12)]
    texts = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist() for n in pair) for pair in lengths]
    base = load_base(open_checkpoint(model), "f32", torch.device("cpu"))
    for (prompt, text), (given, argmax) in zip(texts, read(base, texts), strict=True):
        expected, expected_argmax = likelihoods_of_transformers(model, prompt, text)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
        assert argmax.tolist() == expected_argmax.tolist()


def test_empty_text_has_no_likelihoods(model):
    base = load_base(open_checkpoint(model), "bf16", torch.device("cpu"))
    (empty, _), (one, _) = read(base, [([5, 6], []), ([5], [7])])
    assert (len(empty), len(one)) == (0, 1)


# ---- Prompts -----------------------------------------------------------------------------------------


def test_shipped_prompts_are_eight_per_category():
    shipped = prompts.read_prompts(prompts.SHIPPED)
    assert prompts.categories(shipped) == CATEGORIES
    for category in CATEGORIES:
        texts = {prompt.text for prompt in shipped if prompt.category == category}
        assert len(texts) == 8
    assert 20 < sum(prompt.chat for prompt in shipped) < len(shipped)


def test_shipped_prompts_are_not_training_prompts():
    """No six words in a row."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    trained = runs(resources.files("recycle_ext.train").joinpath("prompts.txt").read_text("utf-8"))
    for prompt in prompts.read_prompts(prompts.SHIPPED):
        assert not runs(prompt.text) & trained, prompt.text


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one\n\n  two \n")
    found = prompts.read_prompts(file, chat=True)
    assert [(p.text, p.chat, p.where) for p in found] == [("one", True, f"{file}:1"), ("  two ", True, f"{file}:3")]


def test_request_is_put_in_the_chat_template(default_model):
    tokenizer = open_checkpoint(default_model).tokenizer
    ids = prompts.Prompt("What is a fjord?", chat=True).encode(tokenizer)
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text.endswith("user\nWhat is a fjord?<|im_end|>\n<|im_start|>assistant\n")
    assert prompts.Prompt("What is a fjord?").encode(tokenizer) == tokenizer.encode("What is a fjord?")


# ---- Cloze -------------------------------------------------------------------------------------------


def prose(sentences: int) -> str:
    """A paragraph of twelve words a sentence, some with an apostrophe, none twice."""

    def word(number: int) -> str:
        letters = "".join("etaoinshrd"[int(digit)] for digit in str(number))
        return letters if number % 5 else f"{letters}'s"

    starts = range(1000, 1000 + 12 * sentences, 12)
    return " ".join(" ".join(word(start + i) for i in range(12)) + "." for start in starts)


PROSE = prose(40)


def test_cloze_items_of_a_text_do_not_overlap():
    text = f"Too short.\n\n{PROSE}\n\n{prose(9)}\n"
    items = cloze.make_cloze(text)
    rest = " ".join(text.split())
    for context, continuation in items:
        assert len(context.split()) >= cloze.CONTEXT_WORDS
        words = continuation.split()
        assert len(words) == cloze.NEXT_WORDS
        assert all(word.isalpha() for word in words)
        # In the text, one after the other, without overlap, each from the start of a sentence.
        before, found, rest = rest.partition(context + continuation)
        assert found
        assert before.endswith((". ", "end. "))
    assert len(items) > 8


def test_cloze_items_are_limited_and_evenly_spread(monkeypatch):
    everything = cloze.make_cloze(f"{PROSE}\n\n" * 20)
    monkeypatch.setattr(cloze, "MAX_ITEMS", 10)
    some = cloze.make_cloze(f"{PROSE}\n\n" * 20)
    assert some == [everything[i * len(everything) // 10] for i in range(10)]


def test_make_cloze_file_is_readable(tmp_path, capsys):
    text, file = tmp_path / "book.txt", tmp_path / "book.jsonl"
    text.write_text(PROSE)
    assert main(["--make-cloze", str(text), str(file)]) == 0
    made = cloze.read_cloze(file)
    assert made == cloze.Cloze("book.txt", cloze.make_cloze(PROSE))
    assert capsys.readouterr().out == f"{len(made.items)} items\n"


def test_shipped_cloze_items_suit_the_default_model(default_model):
    assert cloze.SHIPPED.stat().st_size < 200_000
    shipped = cloze.read_cloze(cloze.SHIPPED)
    assert "Moby-Dick" in shipped.source
    encoded = cloze.encode(shipped, open_checkpoint(default_model).tokenizer)
    assert len(encoded) == len(shipped.items) == len(set(shipped.items)) == 640
    assert all(len(following) >= 2 for _, following in encoded)


@pytest.mark.parametrize("mode", ["standard", "alternate"])
def test_right_tokens_equal_those_of_the_reference(model, mode):
    base = open_checkpoint(model)
    module = open_module(model.parent / "module", base)
    decoder = Decoder(pack_model(base, module, "f32"), mode, capacity=50, cache_dtype=torch.float32)
    items, expected = [], []
    for seed in range(8):
        context = [3 + seed, 90, 4]
        reference = ReferenceDecoder(reference_base(base), reference_module(module), None, mode, 1)
        written = [reference.prefill(context)]
        while len(written) < 4:
            written += reference.step()
        wrong = seed % 5  # this token is changed; 4: none
        items.append((context, [t ^ (i == wrong) for i, t in enumerate(written[:4])]))
        expected.append([i != wrong for i in range(4)])
    assert list(cloze.right_tokens(decoder, items)) == expected


def test_cloze_figures_equal_hand_counts():
    standard = [[1, 1], [1, 1], [1, 0, 1], [0, 1], [0, 0]]
    alternate = [[1, 1], [1, 0], [1, 0, 1], [0, 0], [0, 1]]
    first, second, whole = cloze_figures(standard, alternate)
    assert (first["standard_accuracy"], first["alternate_accuracy"]) == (0.6, 0.6)
    assert first["difference_points_interval"] == (0, 0)
    assert second["items"] == 3
    assert second["standard_accuracy"] == pytest.approx(2 / 3)
    assert second["relative_drop"] == pytest.approx(1 / 2)
    assert (whole["standard_accuracy"], whole["alternate_accuracy"]) == (0.4, 0.2)
    assert whole["difference_points"] == pytest.approx(-20)
    low, high = whole["difference_points_interval"]
    assert -100 <= low < -20 < high <= 0


def test_interval_of_the_relative_drop_encloses_the_drop():
    *_, whole = cloze_figures([[1, 1]] * 8, [[1, 1], [1, 0]] * 4)
    low, high = whole["relative_drop_interval"]
    assert 0 <= low < whole["relative_drop"] == 0.5 < high <= 1
