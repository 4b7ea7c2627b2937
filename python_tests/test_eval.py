"""python -m recycle_ext.eval: each figure against a plain computation of it, and what a user may get wrong."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from models import reference_base, reference_module, write_base, write_byte_tokenizer, write_module

from recycle_ext.checkpoint import open_checkpoint
from recycle_ext.decoder import Decoder
from recycle_ext.eval import bootstrap, cloze, measure, prompts
from recycle_ext.eval.__main__ import main
from recycle_ext.eval.decoding import Run, common_tokens, count_step, decode
from recycle_ext.eval.likelihood import load_base, read
from recycle_ext.eval.report import cloze_figures
from recycle_ext.module_checkpoint import open_module
from recycle_ext.packing import pack_model
from recycle_ext.reference_ops import ReferenceDecoder

CATEGORIES = ["story", "chat", "code", "question", "summary", "list", "arithmetic"]
PROMPTS = [
    {"prompt": "the sea was", "category": "sea"},
    {"prompt": "a request", "category": "land", "chat": True},
    {"prompt": "waves and more waves", "category": "sea"},
    {"prompt": "x", "category": "land"},
]
CLOZE = [
    {"source": "a test"},
    {"context": "over the hills", "continuation": " and"},
    {"context": "one", "continuation": "  two"},
    {"context": "this one is left out, its continuation being one token", "continuation": "!"},
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny base with a tokenizer of single bytes; beside it ``module``, a prompt file and a cloze file."""
    folder = tmp_path_factory.mktemp("eval") / "base"
    base = write_base(folder, vocab_size=write_byte_tokenizer(folder), n_layers=1)
    write_module(folder.parent / "module", base, like_base=True)
    for name, lines in (("prompts.jsonl", PROMPTS), ("cloze.jsonl", CLOZE)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder.parent / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _torch_keeps_its_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options_for(model: Path) -> list[str]:
    folder = model.parent
    options = [
        "--model",
        model,
        "--module",
        folder / "module",
        "--prompts",
        folder / "prompts.jsonl",
    ]
    options += ["--cloze", folder / "cloze.jsonl", "--max-new-tokens", NEW_TOKENS, "--threads", 1]
    return [*map(str, options), "--dtype", "f32"]


# ---- Intervals ---------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(3).normal(2.0, 5.0, 500)
    low, high = bootstrap.interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_an_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    generator = np.random.default_rng(0)
    bounds = [bootstrap.interval(generator.exponential(1.0, 60)) for _ in range(200)]
    # 95%, less a little for 60 examples of a lopsided kind; 200 draws have a standard error of 1.5%.
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in bounds]) <= 0.985


def test_pairs_are_drawn_as_pairs():
    x = np.random.default_rng(1).exponential(1.0, 40)
    assert bootstrap.interval(np.stack([3 * x, x], 1), bootstrap.ratio) == pytest.approx((3, 3))
    shuffled = np.random.default_rng(2).permutation(3 * x)
    low, high = bootstrap.interval(np.stack([shuffled, x], 1), bootstrap.ratio)
    assert low < 2.5 < 3.5 < high


def test_the_same_values_have_the_same_interval():
    values = np.arange(10.0) ** 2
    assert bootstrap.interval(values) == bootstrap.interval(values)
    assert bootstrap.interval(values) != bootstrap.interval(values + 1)


def test_there_may_be_no_interval():
    assert bootstrap.interval(np.array([1.0])) is None
    # Some resamples have no second example, and so a share of nothing.
    assert bootstrap.interval(np.array([[0.0, 0.0], [1.0, 1.0]]), bootstrap.ratio) is None


# ---- Counting ----------------------------------------------------------------------------------------


def slow_decode(base, module, mode: str, drafts: int, prompt: list[int], ends: set[int]) -> Run:
    """The same figures from the decoder in plain PyTorch, counted from the definitions."""
    decoder = ReferenceDecoder(
        reference_base(base), reference_module(module), module.draft_vocab(), mode, drafts
    )
    text = [decoder.prefill(prompt)]
    steps = []  # what was drafted, and what came of it
    while len(text) < NEW_TOKENS and not ends & set(text):
        drafted = list(decoder.pending[1:])
        steps.append((drafted, decoder.step()))
        text += steps[-1][1]

    def upto_end(tokens: list[int]) -> list[int]:
        found = [index for index, token in enumerate(tokens) if token in ends]
        return tokens[: found[0] + 1] if found else tokens

    offered, accepted = [0] * drafts, [0] * drafts
    for drafted, came in steps:
        for j in range(drafts):
            all_before = came[:j] == drafted[:j] and len(came) > j
            ended_before = bool(ends & set(drafted[:j]))
            if all_before and not ended_before:
                offered[j] += 1
                accepted[j] += len(came) > j + 1
    whole = upto_end(text)
    return Run(
        token_ids=[token for token in whole if token not in ends][:NEW_TOKENS],
        steps=len(steps),
        step_tokens=len(whole) - 1,
        offered=offered,
        accepted=accepted,
    )


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
def test_a_run_is_counted_as_a_slow_loop_counts_it(model, mode, drafts):
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
    ("tokens", "offered", "accepted", "counted"),
    [
        ([7], [1, 0], [0, 0], 1),
        ([4, 7], [1, 1], [1, 0], 2),
        ([4, 5, 7], [1, 1], [1, 1], 3),
        ([2, 7], [1, 0], [1, 0], 1),  # 2 is the end token: what follows was not asked for
        ([4, 2, 7], [1, 1], [1, 1], 2),
        ([2], [1, 0], [0, 0], 1),
    ],
)
def test_a_step_is_counted(tokens, offered, accepted, counted):
    run = Run([9], offered=[0, 0], accepted=[0, 0])
    count_step(run, tokens, {2})
    assert (run.steps, run.step_tokens) == (1, counted)
    assert (run.offered, run.accepted) == (offered, accepted)
    assert run.token_ids == [9, *tokens[:counted]]


def test_tokens_in_common():
    assert common_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert common_tokens([1, 2], [1, 2, 4]) == 2
    assert common_tokens([], [1]) == 0


# ---- Likelihood --------------------------------------------------------------------------------------


@functools.cache
def model_of_transformers(model: Path):
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    return transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def likelihoods_of_transformers(model: Path, prompt: list[int], text: list[int]):
    """Log-likelihoods and picks, from another reader of the same weights."""
    logits = model_of_transformers(model)(torch.tensor([[*prompt, *text]])).logits[
        0, len(prompt) - 1 : -1
    ]
    rows = torch.arange(len(text))
    return logits.log_softmax(-1)[rows, torch.tensor(text)], logits.argmax(-1)


def test_likelihoods_are_those_of_transformers(model):
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 9), (20, 1), (1, 30), (5, 5), (7, 2), (2, 17), (4, 4), (9, 9), (6, 12)]
    texts = [
        tuple(torch.randint(0, 250, (n,), generator=generator).tolist() for n in pair)
        for pair in lengths
    ]
    base = load_base(open_checkpoint(model), "f32", torch.device("cpu"))
    for (prompt, text), (given, picks) in zip(texts, read(base, texts), strict=True):
        expected, expected_picks = likelihoods_of_transformers(model, prompt, text)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
        assert picks.tolist() == expected_picks.tolist()


def test_an_empty_text_has_no_likelihoods(model):
    base = load_base(open_checkpoint(model), "bf16", torch.device("cpu"))
    (empty, _), (one, _) = read(base, [([5, 6], []), ([5], [7])])
    assert (len(empty), len(one)) == (0, 1)


# ---- The whole command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(model) -> tuple[str, dict, dict]:
    """What it printed, and the JSON of two runs."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "RESAMPLES", 300)
        for name in ("one.json", "two.json"):
            printed = []
            patch.setattr("builtins.print", lambda *a, printed=printed, **_: printed.append(a[0]))
            file = model.parent / name
            assert main([*options_for(model), "--drafts", "1,2", "--json", str(file)]) == 0
            written.append(json.loads(file.read_text()))
    return "\n".join(printed), *written


def test_the_json_has_everything(whole_run):
    _, report, _ = whole_run
    assert set(report) == {"machine", "settings", "summaries", "cloze", "prompts"}
    assert report["settings"]["drafts"] == [1, 2]
    assert report["settings"]["reference_dtype"] == "f32"
    assert report["machine"]["torch"] == torch.__version__
    assert [(s["drafts"], s["category"], s["prompts"]) for s in report["summaries"]] == [
        (k, category, count)
        for k in (1, 2)
        for category, count in (("sea", 2), ("land", 2), ("all", 4))
    ]
    assert [row["prompt"] for row in report["prompts"]] == [p["prompt"] for p in PROMPTS]
    assert [row["prompt_tokens"] for row in report["prompts"]] == [11, 9, 20, 1]
    for row in report["prompts"]:
        assert list(row["runs"]) == [
            "standard",
            "verify-1",
            "alternate-1",
            "verify-2",
            "alternate-2",
        ]
        for run in row["runs"].values():
            assert run["decode_seconds"] > 0
            assert 0 < len(run["token_ids"]) <= NEW_TOKENS


def test_figures_are_those_of_the_prompts(whole_run):
    _, report, _ = whole_run
    for summary in report["summaries"]:
        k, category = summary["drafts"], summary["category"]
        runs = [r["runs"] for r in report["prompts"] if category in (r["category"], "all")]
        verify = [run[f"verify-{k}"] for run in runs]
        assert summary["identical"] == len(runs)
        for j in range(k):
            accepted = sum(run["accepted"][j] for run in verify)
            offered = sum(run["offered"][j] for run in verify)
            assert summary["acceptance_by_position"][j] == accepted / offered
        tokens = sum(run["step_tokens"] for run in verify)
        assert summary["mean_accepted_length"] == tokens / sum(run["steps"] for run in verify)
        assert summary["verify_tokens_per_second"] == pytest.approx(
            tokens / sum(run["decode_seconds"] for run in verify)
        )
        assert summary["alternate_speedup"] == pytest.approx(
            summary["alternate_tokens_per_second"] / summary["standard_tokens_per_second"]
        )


def test_quality_is_that_of_transformers(model, whole_run):
    _, report, _ = whole_run
    tokenizer = open_checkpoint(model).tokenizer
    for k in (1, 2):
        differences, agreeing, drafts = [], 0, 0
        for row in report["prompts"]:
            prompt, means = tokenizer.encode(row["prompt"]), []
            for name in ("standard", f"alternate-{k}"):
                text = row["runs"][name]["token_ids"]
                log_likelihoods, picks = likelihoods_of_transformers(model, prompt, text)
                means.append(float(log_likelihoods.mean()))
            for index, token in enumerate(text):  # alternate's
                if index % (k + 1):
                    drafts += 1
                    agreeing += token == picks[index]
                else:
                    assert token == picks[index]
            differences.append(means[1] - means[0])
        (total,) = (s for s in report["summaries"] if (s["category"], s["drafts"]) == ("all", k))
        assert total["log_likelihood_difference_nats_per_token"] == pytest.approx(
            np.mean(differences), abs=1e-4
        )
        assert total["perplexity_ratio"] == pytest.approx(math.exp(-np.mean(differences)), rel=1e-3)
        assert total["draft_agreement"] == agreeing / drafts < 1
        assert total["base_agreement"] == 1
        low, high = total["log_likelihood_difference_interval"]
        assert low < total["log_likelihood_difference_nats_per_token"] < high


def without_times(value):
    if isinstance(value, dict):
        timed = ("second", "speedup", "date")
        return {k: without_times(v) for k, v in value.items() if not any(t in k for t in timed)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_only_times_differ_between_runs(whole_run):
    _, first, second = whole_run
    assert without_times(first) == without_times(second)
    assert "acceptance_by_position" in without_times(first)["summaries"][0]


def test_the_tables_are_markdown(whole_run):
    out, report, _ = whole_run
    assert len(re.findall(r"^\|[ |:-]+\|$", out, re.M)) == 3 * 2  # speed, quality and cloze, twice
    assert "identical: 4 of 4" in out
    assert "the next words of 2 passages (a test)" in out
    assert f"{report['summaries'][2]['mean_accepted_length']:.2f}" in out


def test_a_plot_is_drawn(whole_run, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    from recycle_ext.eval.plot import plot

    _, report, _ = whole_run
    plot(report, "title", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_parts_can_be_left_out(model, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = ["--only", "land", "--limit", "1", "--no-cloze", "--no-quality", "--json", str(out)]
    assert main([*options_for(model), *options]) == 0
    report = json.loads(out.read_text())
    assert [row["prompt"] for row in report["prompts"]] == ["a request"]
    assert report["cloze"] is None
    assert "draft_agreement" not in report["summaries"][0]
    assert "1 requests are given as plain text" in capsys.readouterr().err


def test_a_text_of_verify_that_differs_is_a_failure(model, capsys, monkeypatch):
    def careless(decoder, *arguments):
        run = decode(decoder, *arguments)
        if decoder.mode == "verify" and run.token_ids:
            run.token_ids[-1] ^= 1
        return run

    monkeypatch.setattr(measure, "decode", careless)
    assert main([*options_for(model), "--no-cloze", "--no-quality"]) == 1
    out, error = capsys.readouterr()
    assert "identical: 0 of 4" in out
    assert (
        "error: 4 texts of verify are not standard's; the first: verify-1 on 'the sea was'" in error
    )


# ---- Prompts -----------------------------------------------------------------------------------------


def test_the_shipped_prompts_are_eight_of_each_category():
    shipped = prompts.read_prompts(prompts.SHIPPED)
    assert prompts.categories(shipped) == CATEGORIES
    for category in CATEGORIES:
        texts = {prompt.text for prompt in shipped if prompt.category == category}
        assert len(texts) == 8
    assert 20 < sum(prompt.chat for prompt in shipped) < len(shipped)


def test_the_shipped_prompts_are_not_those_of_training():
    """No six words in a row."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    trained = runs(resources.files("recycle_ext.train").joinpath("prompts.txt").read_text("utf-8"))
    for prompt in prompts.read_prompts(prompts.SHIPPED):
        assert not runs(prompt.text) & trained, prompt.text


def test_prompts_of_a_text_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one\n\n  two \n")
    found = prompts.read_prompts(file, chat=True)
    assert [(p.text, p.chat, p.where) for p in found] == [
        ("one", True, f"{file}:1"),
        ("  two ", True, f"{file}:3"),
    ]


def test_a_request_is_put_in_the_chat_template(default_model):
    tokenizer = open_checkpoint(default_model).tokenizer
    ids = prompts.Prompt("What is a fjord?", chat=True).encode(tokenizer)
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text.endswith("user\nWhat is a fjord?<|im_end|>\n<|im_start|>assistant\n")
    assert prompts.Prompt("What is a fjord?").encode(tokenizer) == tokenizer.encode(
        "What is a fjord?"
    )


# ---- Cloze -------------------------------------------------------------------------------------------


def prose(sentences: int) -> str:
    """A paragraph of twelve words a sentence, some with an apostrophe, none twice."""

    def word(number: int) -> str:
        letters = "".join("etaoinshrd"[int(digit)] for digit in str(number))
        return letters if number % 5 else f"{letters}'s"

    starts = range(1000, 1000 + 12 * sentences, 12)
    return " ".join(" ".join(word(start + i) for i in range(12)) + "." for start in starts)


PROSE = prose(40)


def test_items_are_made_of_a_text():
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


def test_at_most_so_many_items_and_from_everywhere(monkeypatch):
    everything = cloze.make_cloze(f"{PROSE}\n\n" * 20)
    monkeypatch.setattr(cloze, "MOST_ITEMS", 10)
    some = cloze.make_cloze(f"{PROSE}\n\n" * 20)
    assert some == [everything[i * len(everything) // 10] for i in range(10)]


def test_make_cloze_writes_what_cloze_reads(tmp_path, capsys):
    text, file = tmp_path / "book.txt", tmp_path / "book.jsonl"
    text.write_text(PROSE)
    assert main(["--make-cloze", str(text), str(file)]) == 0
    made = cloze.read_cloze(file)
    assert made == cloze.Cloze("book.txt", cloze.make_cloze(PROSE))
    assert capsys.readouterr().out == f"{len(made.items)} items\n"


def test_the_shipped_items(default_model):
    assert cloze.SHIPPED.stat().st_size < 200_000
    shipped = cloze.read_cloze(cloze.SHIPPED)
    assert "Moby-Dick" in shipped.source
    encoded = cloze.encode(shipped, open_checkpoint(default_model).tokenizer)
    assert len(encoded) == len(shipped.items) == len(set(shipped.items)) == 640
    assert all(len(following) >= 2 for _, following in encoded)


@pytest.mark.parametrize("mode", ["standard", "alternate"])
def test_right_tokens_are_those_that_decoding_writes(model, mode):
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


def test_accuracies():
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


# ---- The user's mistakes -----------------------------------------------------------------------------


def mistake(arguments, capsys) -> str:
    assert main(list(map(str, arguments))) == 2
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in error
    assert out == ""
    return last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
        (["--cloze", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--make-cloze", "nowhere.txt", "x.jsonl"], "nowhere.txt: cannot be read"),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--module", "nowhere"], "nowhere: no such directory"),
        (["--module", "none"], "no module is loaded for base; --module DIR names one"),
        (["--only", "poems"], "--only has 'poems'; it must be of sea, land"),
        (["--only", ","], "--only is empty"),
        (["--drafts", "5"], "--drafts has 5; it must be 1 to 4"),
        (["--drafts", "one"], "--drafts is 'one'"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (
            ["--max-new-tokens", "505"],
            "prompts.jsonl:1: the prompt has 11 tokens, and 505 are to follow",
        ),
        (["--device", "abacus"], "abacus"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: there is no directory nowhere"),
        (["--plot", "bars.jpeg2"], "--plot is bars.jpeg2; it must end in .png"),
        ([""], "PROMPT: the prompt is empty"),
        (["word " * 200], "PROMPT: the prompt has 1000 tokens"),
    ],
)
def test_a_users_mistake_is_one_line(model, capsys, arguments, message):
    assert message in mistake([*options_for(model), *arguments], capsys)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["b"]\n', "p.jsonl:3: not a JSON object"),
        ("p.jsonl", '{"category": "a"}\n', "p.jsonl:1: there is no prompt"),
        ("p.jsonl", '{"prompt": " "}\n', "p.jsonl:1: the prompt is empty"),
        ("p.jsonl", '{"prompt": 7}\n', "p.jsonl:1: prompt is 7; it must be text"),
        ("p.jsonl", '{"prompt": "a", "chat": 1}', "p.jsonl:1: chat is 1; it must be true or false"),
        (
            "p.jsonl",
            '{"prompt": "a", "kind": "b"}',
            "p.jsonl:1: 'kind' is not one of prompt, category",
        ),
        ("p.jsonl", "", "p.jsonl: holds no prompts"),
        ("p.txt", "\n \n", "p.txt: holds no prompts"),
        ("p.txt", b"\xff\xfe", "p.txt: not UTF-8"),
        ("c.jsonl", '{"context": "a"}\n', "c.jsonl:1: there is no continuation"),
        ("c.jsonl", '{"source": "a"}\n', "c.jsonl: holds no items"),
        (
            "c.jsonl",
            '{"context": "a", "continuation": "b"}\n',
            "makes two tokens of no continuation",
        ),
        (
            "c.jsonl",
            json.dumps({"context": "a" * 600, "continuation": " b"}),
            "602 tokens; this model's",
        ),
    ],
)
def test_a_damaged_file_is_one_line(model, capsys, tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    flag = "--cloze" if name == "c.jsonl" else "--prompts"
    error = mistake([*options_for(model), "--no-quality", "--limit", "1", flag, file], capsys)
    assert message in error


def test_a_text_without_items_is_one_line(capsys, tmp_path):
    (tmp_path / "short.txt").write_text("Nothing much.")
    error = mistake(["--make-cloze", tmp_path / "short.txt", tmp_path / "x.jsonl"], capsys)
    assert "short.txt: gives no items; it needs paragraphs of more than 40 words" in error


def test_a_missing_matplotlib_is_one_line(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = mistake([*options_for(model), "--plot", "bars.png"], capsys)
    assert error == "error: --plot needs matplotlib: `pip install matplotlib`"
