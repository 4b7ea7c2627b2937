"""How commands end where the system fails them: closed streams, full disks, encodings, memory, no home, broken pipes.

One line on standard error, the right exit status, and no traceback, in every command.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
from models import write_base, write_byte_tokenizer

COMMANDS = ["generate", "train", "eval", "bench", "convert", "info", "train.draft_vocab", "bench.page"]

# Runs each of the commands it is given, as `python -m` does, with these standard streams, and prints
# {name: [exit status, standard output, standard error]}. Forked, because importing torch takes seconds.
DRIVER = """
import importlib, io, json, os, resource, sys, tempfile, traceback
COMMANDS = ["generate", "train", "eval", "bench", "convert", "info", "train.draft_vocab", "bench.page"]
MAINS = {
    name: importlib.import_module(f"recycle_ext.{name}" if "." in name else f"recycle_ext.{name}.__main__").main
    for name in COMMANDS
}

def stream(number, place, encoding, errors, captured):
    if place == "closed":
        os.close(number)
        return None
    if place == "broken":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = captured.fileno() if place == "captured" else os.open(place, os.O_RDWR)
    os.dup2(writer, number)
    if number == 0:
        return os.fdopen(0, "r")
    return io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), encoding, errors, line_buffering=number == 2)

def end(case, captured):
    if case["no_home"]:
        import pwd
        def nobody(uid): raise KeyError(uid)
        pwd.getpwuid = nobody
        for name in ("HOME", "RECYCLE_CACHE", "XDG_CACHE_HOME"): os.environ.pop(name, None)
    os.environ.update(case["environment"])
    sys.stderr = stream(2, case["stderr"], "utf-8", "backslashreplace", captured[1])
    sys.stdout = stream(1, case["stdout"], case["encoding"], "strict", captured[0])
    sys.stdin = stream(0, case["stdin"], "utf-8", "strict", None)
    if case["memory"] is not None:
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + case["memory"],) * 2)
    try:
        status = MAINS[case["command"]](case["arguments"])
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        if sys.stdout is not None: sys.stdout.flush()
    except OSError:
        status = 120  # as Python, which complains at its end
    os._exit(status)

def run(case):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        child = os.fork()
        if child == 0:
            end(case, (out, error))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        error.seek(0)
        return status, out.read().decode("latin-1"), error.read().decode()

print(json.dumps([run(case) for case in json.load(sys.stdin)]))
"""


class End(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    error: str


def case(command, *arguments, stdin="/dev/null", stdout="captured", stderr="captured", encoding="utf-8", **others):
    defaults = {"environment": {}, "no_home": False, "memory": None}
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "encoding": encoding}
    return {"command": command, "arguments": [str(each) for each in arguments]} | streams | defaults | others


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose text is not ASCII."""
    folder = tmp_path_factory.mktemp("model")
    write_base(folder, vocab_size=write_byte_tokenizer(folder))
    return folder


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A model of 36 MB."""
    folder = tmp_path_factory.mktemp("large")
    size = write_byte_tokenizer(folder)
    write_base(folder, vocab_size=size, hidden_size=512, intermediate_size=5504, n_layers=1, n_heads=8, n_kv_heads=8)
    return folder


@pytest.fixture(scope="module")
def ends(model, large_model):
    """Every case of this file, run; by name."""
    say = ["generate", "hi", "--max-new-tokens", 30, "--no-stats", "--model"]
    load = ["generate", "hi", "--max-new-tokens", 2, "--dtype", "f32", "--model", large_model]
    info = ["info", "--no-bandwidth"]
    cases = {
        "text": case(*say, model),
        "ascii": case(*say, model, encoding="ascii"),
        "latin-1": case(*say, model, encoding="latin-1"),
        "all closed": case(*say, model, stdin="closed", stdout="closed", stderr="closed"),
        "stdin closed": case(*say[:1], "-", *say[2:], model, stdin="closed"),
        "a mistake, stderr full": case(*say, "nowhere", stderr="/dev/full"),
        "a mistake, stderr closed": case(*say, "nowhere", stderr="closed"),
        "no home": case(*say[:-1], no_home=True),
        "info without a home": case(*info, no_home=True),
        "home not a folder": case(*say[:-1], no_home=True, environment={"RECYCLE_CACHE": "/dev/null/x"}),
        "a long name": case(*say, "x" * 5000),
        "a prompt that is an option": case(*say[:1], "-foo", *say[2:], model),
        "a prompt after --": case(*say[:1], *say[2:], model, "--", "-foo"),
    }
    for megabytes in (5, 20, 40, 60):
        cases[f"{megabytes} MB"] = case(*load, memory=megabytes << 20)
    for stdout in ("closed", "/dev/full", "broken"):
        cases[f"generate {stdout}"] = case(*say, model, stdout=stdout)
        cases[f"info {stdout}"] = case(*info, stdout=stdout)
        for command in COMMANDS:
            cases[f"{command} --help {stdout}"] = case(command, "--help", stdout=stdout)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, (End(*each) for each in json.loads(done.stdout)), strict=True))


def test_no_command_ends_with_a_traceback(ends):
    assert [name for name, end in ends.items() if "Traceback" in end.error] == []


def test_text_that_the_encoding_lacks_is_escaped(ends):
    text = ends["text"].out.encode("latin-1").decode()
    assert not text.isascii()
    assert ends["ascii"] == End(0, text.encode("ascii", "backslashreplace").decode(), "")
    assert ends["latin-1"] == End(0, text.encode("latin-1", "backslashreplace").decode("latin-1"), "")


@pytest.mark.parametrize("name", ["generate", "info", *(f"{command} --help" for command in COMMANDS)])
@pytest.mark.parametrize(
    ("stdout", "status", "message"),
    [
        ("closed", 1, "error: standard output cannot be written: Bad file descriptor\n"),
        ("/dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        ("broken", 141, ""),
    ],
)
def test_output_that_cannot_be_written_is_told_in_one_line(ends, name, stdout, status, message):
    end = ends[f"{name} {stdout}"]
    assert end == End(status, "", message)


def test_closed_standard_streams_leave_an_exit_status(ends):
    assert ends["all closed"] == End(1, "", "")
    assert ends["a mistake, stderr closed"] == End(2, "", "")
    assert ends["a mistake, stderr full"] == End(2, "", "")


def test_standard_input_that_cannot_be_read_is_refused(ends):
    assert ends["stdin closed"] == End(2, "", "error: standard input cannot be read: Bad file descriptor\n")


@pytest.mark.parametrize("megabytes", [5, 20, 40, 60])
def test_too_little_memory_is_told_in_one_line(ends, megabytes):
    end = ends[f"{megabytes} MB"]
    assert (end.status, end.out) == (2, "")
    assert end.error.startswith("error: ")
    assert "memory" in end.error
    assert end.error.count("\n") == 1


def test_user_without_a_home_is_told_the_way_out(ends):
    no_home = "there is no home directory to store the default model in; set RECYCLE_CACHE"
    assert ends["no home"].status == ends["home not a folder"].status == 2
    assert ends["no home"].error.startswith(f"error: {no_home}")
    assert "/dev/null/x: the default model cannot be stored: Not a directory" in ends["home not a folder"].error
    assert ends["info without a home"].status == 0
    assert no_home in ends["info without a home"].out


def test_name_that_the_system_refuses_is_told_in_one_line(ends):
    assert ends["a long name"].status == 2
    assert ends["a long name"].error.endswith("cannot be read: File name too long\n")
    assert len(ends["a long name"].error) < 200


def test_prompt_that_begins_with_a_dash_comes_after_two(ends):
    assert ends["a prompt that is an option"].status == 2
    assert "[--] PROMPT" in ends["a prompt that is an option"].error
    assert ends["a prompt after --"].status == 0
