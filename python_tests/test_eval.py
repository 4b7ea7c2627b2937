"""python -m recycle_ext.eval as a command: its figures, its files, and the user's mistakes."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_model import NEW_TOKENS, PROMPTS, likelihoods_of_transformers, options_for, write_model

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.eval import intervals, measure
from recycle_ext.eval.__main__ import main
from recycle_ext.eval.decoding import decode


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("eval") / "base")


@pytest.fixture(scope="module")
def whole_run(model) -> tuple[str, dict, dict]:
    """The printed text of the second run, and the JSON of both."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 300)
        for name in ("one.json", "two.json"):
            printed = []
            patch.setattr("builtins.print", lambda *a, printed=printed, **_: printed.append(a[0]))
            file = model.parent / name
            assert main([*options_for(model), "--drafts", "1,2", "--json", str(file)]) == 0
            written.append(json.loads(file.read_text()))
    return "\n".join(printed), *written


def test_json_of_a_run_has_every_figure(whole_run):
    _, report, _ = whole_run
    assert set(report) == {"machine", "settings", "summaries", "cloze", "prompts"}
    assert report["settings"]["drafts"] == [1, 2]
    assert report["settings"]["reference_dtype"] == "f32"
    assert report["machine"]["torch"] == torch.__version__
    assert [(s["drafts"], s["category"], s["prompts"]) for s in report["summaries"]] == [
        (k, category, count) for k in (1, 2) for category, count in (("sea", 2), ("land", 2), ("all", 4))
    ]
    assert [row["prompt"] for row in report["prompts"]] == [p["prompt"] for p in PROMPTS]
    assert [row["prompt_tokens"] for row in report["prompts"]] == [11, 9, 20, 1]
    for row in report["prompts"]:
        assert list(row["runs"]) == ["standard", "verify-1", "alternate-1", "verify-2", "alternate-2"]
        for run in row["runs"].values():
            assert run["decode_seconds"] > 0
            assert 0 < len(run["token_ids"]) <= NEW_TOKENS


def test_summaries_equal_sums_over_the_prompts(whole_run):
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


def test_quality_figures_equal_those_of_transformers(model, whole_run):
    _, report, _ = whole_run
    tokenizer = open_checkpoint(model).tokenizer
    for k in (1, 2):
        differences, agreeing, drafts = [], 0, 0
        for row in report["prompts"]:
            prompt, means = tokenizer.encode(row["prompt"]), []
            for name in ("standard", f"alternate-{k}"):
                text = row["runs"][name]["token_ids"]
                log_likelihoods, argmax = likelihoods_of_transformers(model, prompt, text)
                means.append(float(log_likelihoods.mean()))
            for index, token in enumerate(text):  # alternate's
                if index % (k + 1):
                    drafts += 1
                    agreeing += token == argmax[index]
                else:
                    assert token == argmax[index]
            differences.append(means[1] - means[0])
        (total,) = (s for s in report["summaries"] if (s["category"], s["drafts"]) == ("all", k))
        assert total["log_likelihood_difference_nats_per_token"] == pytest.approx(np.mean(differences), abs=1e-4)
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


def test_two_runs_differ_in_times_alone(whole_run):
    _, first, second = whole_run
    assert without_times(first) == without_times(second)
    assert "acceptance_by_position" in without_times(first)["summaries"][0]


def test_tables_of_a_run_are_markdown(whole_run):
    out, report, _ = whole_run
    assert len(re.findall(r"^\|[ |:-]+\|$", out, re.M)) == 3 * 2  # speed, quality and cloze, twice
    assert "identical: 4 of 4" in out
    assert "the next words of 2 passages (a test)" in out
    assert f"{report['summaries'][2]['mean_accepted_length']:.2f}" in out


def test_plot_of_a_run_shows_every_figure(whole_run, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `eval` brings it")
    from recycle_ext.eval.plot import draw, plot

    _, report, _ = whole_run
    chosen = [s for s in report["summaries"] if s["drafts"] == 2]
    left, right = draw(report, "title").axes
    for axes, series in (
        (left, [[100 * s["acceptance_by_position"][j] for s in chosen] for j in range(2)]),
        (right, [[s[f"{mode}_speedup"] for s in chosen] for mode in ("verify", "alternate")]),
    ):
        assert [[bar.get_height() for bar in bars] for bars in axes.containers] == series
        assert [t.get_text() for t in axes.get_xticklabels()] == ["sea", "land", "all"]
    plot(report, "title", str(tmp_path / "bars.png"))
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_options_leave_parts_out(model, capsys, tmp_path):
    out = tmp_path / "out.json"
    options = ["--only", "land", "--limit", "1", "--no-cloze", "--no-quality", "--json", str(out)]
    assert main([*options_for(model), *options]) == 0
    report = json.loads(out.read_text())
    assert [row["prompt"] for row in report["prompts"]] == ["a request"]
    assert report["cloze"] is None
    assert "draft_agreement" not in report["summaries"][0]
    assert "1 requests run as plain text" in capsys.readouterr().err


def test_text_of_verify_that_differs_is_a_failure(model, capsys, monkeypatch):
    def wrong_decode(decoder, *arguments):
        run = decode(decoder, *arguments)
        if decoder.mode == "verify" and run.token_ids:
            run.token_ids[-1] ^= 1
        return run

    monkeypatch.setattr(measure, "decode", wrong_decode)
    assert main([*options_for(model), "--no-cloze", "--no-quality"]) == 1
    out, error = capsys.readouterr()
    assert "identical: 0 of 4" in out
    assert "error: 4 texts of verify differ from standard's; the first: verify-1 on 'the sea was'" in error


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
        (["--max-new-tokens", "505"], "prompts.jsonl:1: the prompt has 11 tokens, and 505 are to follow"),
        (["--device", "abacus"], "abacus"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: there is no directory nowhere"),
        (["--plot", "bars.jpeg2"], "--plot is bars.jpeg2; it must end in .png"),
        ([""], "PROMPT: the prompt is empty"),
        (["word " * 200], "PROMPT: the prompt has 1000 tokens"),
    ],
)
def test_mistake_of_the_user_is_one_line(model, capsys, arguments, message):
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
        ("p.jsonl", '{"prompt": "a", "kind": "b"}', "p.jsonl:1: 'kind' is not one of prompt, category"),
        ("p.jsonl", "", "p.jsonl: holds no prompts"),
        ("p.txt", "\n \n", "p.txt: holds no prompts"),
        ("p.txt", b"\xff\xfe", "p.txt: not UTF-8"),
        ("c.jsonl", '{"context": "a"}\n', "c.jsonl:1: there is no continuation"),
        ("c.jsonl", '{"source": "a"}\n', "c.jsonl: holds no items"),
        ("c.jsonl", '{"context": "a", "continuation": "b"}\n', "makes two tokens of no continuation"),
        ("c.jsonl", json.dumps({"context": "a" * 600, "continuation": " b"}), "602 tokens; this model's"),
    ],
)
def test_damaged_file_is_one_line(model, capsys, tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    flag = "--cloze" if name == "c.jsonl" else "--prompts"
    error = mistake([*options_for(model), "--no-quality", "--limit", "1", flag, file], capsys)
    assert message in error


def test_text_without_cloze_items_is_one_line(capsys, tmp_path):
    (tmp_path / "short.txt").write_text("Nothing much.")
    error = mistake(["--make-cloze", tmp_path / "short.txt", tmp_path / "x.jsonl"], capsys)
    assert "short.txt: gives no items; it needs paragraphs of more than 40 words" in error


@pytest.mark.parametrize(
    ("package", "feature"),
    [("matplotlib", "--plot"), ("scipy", "python -m recycle_ext.eval"), ("tabulate", "python -m recycle_ext.eval")],
)
def test_missing_library_is_one_line(model, monkeypatch, capsys, package, feature):
    monkeypatch.setitem(sys.modules, package, None)
    error = mistake([*options_for(model), "--plot", "bars.png"], capsys)
    assert error == f"error: {feature} needs {package}: `pip install {package}`"
