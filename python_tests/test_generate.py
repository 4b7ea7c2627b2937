"""python -m recycle_ext.generate, run as a user runs it, on the default model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from models import write_base

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.module import default_module

PROMPT = "Once upon a time, in a small village by the sea,"
JSON_KEYS = [
    "text",
    "token_ids",
    "prompt_tokens",
    "new_tokens",
    "mode",
    "drafts",
    "seed",
    "steps",
    "acceptance_rate",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "weight_bytes",
    "gigabytes_per_second",
]


def command(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "recycle_ext.generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def as_json(*arguments, **options) -> dict:
    done = command(*arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def _model_is_there(default_model):
    """Fetches the default model before the commands run, so that their time limits do not include a download."""


def test_generate_prints_the_text():
    done = command(PROMPT, "--max-new-tokens", 20)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.split()) > 8


def test_generate_json_is_one_object_with_all_figures():
    out = as_json(PROMPT, "--max-new-tokens", 20)
    assert list(out) == JSON_KEYS
    assert out["mode"] == "verify"
    assert out["drafts"] == 1
    assert out["new_tokens"] == len(out["token_ids"]) == 20
    assert out["prompt_tokens"] == 13
    assert 0 <= out["acceptance_rate"] <= 1
    assert out["weight_bytes"] > 90e6
    assert out["tokens_per_second"] > 0
    assert out["steps"] <= 19


def test_generate_in_every_mode_counts_its_steps():
    standard, verify, alternate = (
        as_json(PROMPT, "--mode", mode, "--max-new-tokens", 60) for mode in ("standard", "verify", "alternate")
    )
    assert standard["steps"] == 59
    assert standard["acceptance_rate"] is None
    assert verify["token_ids"] == standard["token_ids"]
    assert verify["steps"] < 59
    assert alternate["steps"] == 30
    assert alternate["acceptance_rate"] == 1


def test_generate_with_auto_drafts_equals_standard():
    auto, standard = (
        as_json(PROMPT, *options, "--max-new-tokens", 60) for options in (("--drafts", "auto"), ("--mode", "standard"))
    )
    assert auto["drafts"] == "auto"
    assert auto["mode"] == "verify"
    assert auto["token_ids"] == standard["token_ids"]
    assert auto["steps"] <= standard["steps"] == 59
    assert 0 <= auto["acceptance_rate"] <= 1
    assert auto["gigabytes_per_second"] > 0


def test_generate_stats_go_to_standard_error():
    done = command(PROMPT, "--max-new-tokens", 10, "--stats")
    for word in ("prefill", "decode", "acceptance", "base steps", "GB/s", "tokens/s"):
        assert word in done.stderr
    assert "tokens/s" not in done.stdout


def test_generate_reads_the_prompt_from_standard_input():
    given = as_json("-", "--max-new-tokens", 8, input=PROMPT)
    assert given["token_ids"] == as_json(PROMPT, "--max-new-tokens", 8)["token_ids"]


def test_generate_with_the_same_seed_repeats_the_sample():
    options = ("--temperature", 1, "--top-k", 50, "--top-p", 0.95, "--max-new-tokens", 24)
    first, again, other = (as_json(PROMPT, *options, "--seed", seed) for seed in (5, 5, 6))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


def test_generate_chat_uses_the_chat_template():
    out = as_json("What is two plus two?", "--chat", "--max-new-tokens", 12)
    assert out["prompt_tokens"] > 25
    assert "<|im_" not in out["text"]


def test_generate_after_ctrl_c_ends_its_line_and_leaves_with_130():
    process = subprocess.Popen(
        [sys.executable, "-m", "recycle_ext.generate", PROMPT, "--max-new-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.read(20)
    os.kill(process.pid, signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 20
    assert rest.endswith("\n")
    assert "Traceback" not in error


def test_generate_into_a_closed_pipe_ends_without_a_traceback():
    line = f'"{sys.executable}" -m recycle_ext.generate "{PROMPT}" --max-new-tokens 200 | head -c 5'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert len(done.stdout) == 5
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["x", "--module", "nowhere"], "nowhere: no such directory"),
        (["x", "--drafts", "9"], "drafts is 9; it must be 1 to 4, or auto"),
        (["x", "--drafts", "auto", "--mode", "alternate"], "'auto', which mode 'alternate' can't"),
        (["x", "--threads", "0"], "threads is 0; it must be 1 to 256"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["x", "--temperature", "-1"], "temperature is -1"),
        (["x", "--top-p", "2"], "top_p is 2"),
        (["", "--max-new-tokens", "4"], "the prompt is empty"),
        (["x", "--module", "none", "--mode", "verify"], "needs a module"),
        (["word " * 9000], "9001 tokens; this model's context is 8192"),
    ],
)
def test_generate_with_a_users_mistake_prints_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_generate_with_undecodable_standard_input_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "recycle_ext.generate", "-"], input=b"\xff\xfe\xfa", capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"standard input is not UTF-8" in done.stderr


def test_generate_with_a_module_of_another_base_is_refused(tmp_path, default_model):
    base = write_base(tmp_path)
    # The shipped module was trained for the default model, not for this one.
    module = default_module(open_checkpoint(default_model))
    done = command("x", "--model", base.path, "--module", module)
    assert done.returncode == 2
    assert "was trained for" in done.stderr
