"""What a run of python -m recycle_ext.train keeps: refused runs change nothing, stopped ones go on with the same bits."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from train_model import SMALL, TINY_LLAMA, train_joint

from recycle_ext.train import __main__ as command
from recycle_ext.train.interruption import Interruption
from recycle_ext.train.record import read_state
from recycle_ext.train.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text, its joint run in out/, and in attached/ a run for the base of that; two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_joint(folder, folder / "out", "--steps", "2") == 0
    assert attach(folder, folder / "attached") == 0
    return folder


def attach(folder: Path, output: Path, *more: str, text: str = "text.txt") -> int:
    """A run for the base of the joint run."""
    arguments = ["--base", str(folder / "out" / "base"), "--text", str(folder / text), "--output", str(output)]
    return command.main([*arguments, *SMALL, "--online", "--steps", "2", "--draft-vocab", "0", *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(capsys, status: int) -> str:
    """The one line of a refused command."""
    error = capsys.readouterr().err
    assert status == 2
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "hard"], "--targets is hard, and {} was begun with kl"),
        (["--regression", "5"], "--regression is 5.0, and {} was begun with 0.0"),
        (["--chain", "2"], "--chain is 2, and {} was begun with 1"),
        (["--chain-from", "0.5"], "--chain-from is 0.5, and {} was begun with 0.0"),
        (["--held-out", "0.4"], "--held-out is 0.4, and {} was begun with 0.1"),
        (["--length", "16"], "--length is 16, and {} was begun with 24"),
        (["--module-dtype", "f32"], "--module-dtype is f32, and {} was begun with q4"),
        (["--shape", "eagle"], "--shape is eagle, and {} was begun with recycle"),
        (["--layers", "2"], "--layers is 2, and {} was begun with 1"),
        (["--draft-vocab", "20"], "--draft-vocab is 20, and {} was begun with 0"),
        (["--steps", "3"], "--steps is 3, and {} was begun with 2"),
        (["--batch-sequences", "4"], "--batch-sequences is 4, and {} was begun with 8"),
        (["--accumulate", "2"], "--accumulate is 2, and {} was begun with 1"),
        (["--lr", "1"], "--lr is 1.0, and {} was begun with 0.002"),
        (["--warmup", "1"], "--warmup is 1, and {} was begun with 5"),
        (["--weight-decay", "1"], "--weight-decay is 1.0, and {} was begun with 0.01"),
        (["--clip", "2"], "--clip is 2.0, and {} was begun with 1.0"),
        (["--ema", "0"], "--ema is 0.0, and {} was begun with 0.99"),
        (["--seed", "1"], "--seed is 1, and {} was begun with 0"),
        (["--from", "/module"], "--from is /module, and {} was begun with None"),
    ],
)
def test_resumed_run_with_another_argument_is_refused(folder, capsys, arguments, message):
    output = folder / "attached"
    before = contents(output)
    error = refused(capsys, attach(folder, output, "--resume", *arguments))
    assert f"error: --resume: {message.format(output / 'training.pt')}\n" in error
    assert contents(output) == before


def test_resumed_run_with_another_text_is_refused(folder, capsys):
    (folder / "other.txt").write_text("the red dog sat by the door " * 1000)
    output = folder / "attached"
    before = contents(output)
    error = refused(capsys, attach(folder, output, "--resume", text="other.txt"))
    assert "--resume: the text is " in error
    assert " sequences with sha256 " in error.split("was begun with")[1]
    assert contents(output) == before


def test_resumed_run_with_another_base_is_refused(folder, tmp_path, capsys):
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "1", "--seed", "1") == 0
    error = refused(capsys, attach(tmp_path, folder / "attached", "--resume"))
    assert "--resume: the base's fingerprint is " in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "8"], "--steps is 8, and {} was begun with 2"),
        (["--text", "{other}"], "the text is "),
        (["--joint", "{config}"], "rms_norm_eps of --joint is 0.1, and {} was begun with 1e-05"),
    ],
)
def test_refused_joint_run_leaves_its_base_as_it_is(folder, tmp_path, capsys, arguments, message):
    words = (folder / "text.txt").read_text().split()
    (tmp_path / "other.txt").write_text(" ".join(reversed(words)))
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"rms_norm_eps": 0.1}))
    names = {"other": tmp_path / "other.txt", "config": tmp_path / "config.json"}
    output = folder / "out"
    before = contents(output)
    given = [argument.format(**names) for argument in arguments]
    error = refused(capsys, train_joint(folder, output, "--steps", "2", "--resume", *given))
    assert message.format(output / "training.pt") in error
    assert contents(output) == before


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "--resume: there is no {}"),
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), "{} is damaged, or no state of a training run ("),
        (lambda file: file.write_bytes(b""), "{} is damaged, or no state"),
        (lambda file: file.write_bytes(b"not a state"), "{} is damaged, or no state"),
        (lambda file: torch.save({"weight": torch.ones(2)}, file), "{} is no state of a training run"),
        (lambda file: torch.save([1], file), "{} is no state of a training run"),
        (lambda file: torch.save(read_state(file) | {"arguments": []}, file), "{} is no state of a training run"),
        (lambda file: torch.save(Touch(file.parent / "made"), file), "{} is damaged, or no state"),
        (
            lambda file: torch.save({"trained": {}, "optimizer": {}, "step": 3, "options": {}}, file),
            "{} was written by an earlier version of recycle_ext; begin again with another --output",
        ),
    ],
    ids=["missing", "cut", "empty", "text", "weights", "list", "arguments", "code", "earlier version"],
)
def test_damaged_or_foreign_state_is_refused(folder, tmp_path, capsys, change, message):
    output = tmp_path / "out"
    shutil.copytree(folder / "attached", output)
    change(output / "training.pt")
    before = contents(output)
    error = refused(capsys, attach(folder, output, "--resume"))
    assert message.format(output / "training.pt") in error
    assert contents(output) == before
    assert not (output / "made").exists()


def test_new_run_in_the_folder_of_another_is_refused(folder, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(folder / "out", output)
    before = contents(output)
    error = refused(capsys, train_joint(folder, output, "--steps", "2"))
    assert "training.pt is of an earlier run: give --resume" in error
    (output / "training.pt").unlink()
    del before["training.pt"]
    error = refused(capsys, train_joint(folder, output, "--steps", "2"))
    assert f"--output {output}: base is there already, and is not of this run" in error
    assert contents(output) == before


@pytest.mark.parametrize("name", ["config.json", "module.safetensors", "log.jsonl", "log.png"])
def test_new_run_that_would_replace_a_file_is_refused(folder, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    error = refused(capsys, attach(folder, tmp_path))
    assert f"{name} is there already, and is not of this run: give another directory" in error
    assert contents(tmp_path) == {name: b"{}"}


def test_output_in_the_bases_directory_is_refused(folder, capsys):
    base = folder / "out" / "base"
    before = contents(base)
    assert "config.json is there already" in refused(capsys, attach(folder, base))
    assert contents(base) == before


def test_new_run_keeps_other_files_of_its_folder(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert attach(folder, tmp_path, "--steps", "1") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "module.safetensors").stat().st_mode & 0o777 == (tmp_path / "notes.txt").stat().st_mode & 0o777


def test_stored_states_are_used_again_but_not_replaced(folder, tmp_path, capsys):
    (folder / "small.txt").write_text("the red dog sat by the door " * 100)
    stored = ["--base", str(folder / "out" / "base"), *SMALL, "--draft-vocab", "0", "--output", str(tmp_path)]
    assert command.main([*stored, "--steps", "1", "--text", str(folder / "small.txt")]) == 0
    states = (tmp_path / "read-000.safetensors").read_bytes()
    for file in tmp_path.iterdir():
        if file.name != "read-000.safetensors":
            file.unlink()
    other = [*stored, "--steps", "1", "--text", str(folder / "text.txt")]
    error = refused(capsys, command.main(other))
    assert "read-000.safetensors: states of another text; give another --output" in error
    assert contents(tmp_path) == {"read-000.safetensors": states}
    written = (tmp_path / "read-000.safetensors").stat().st_mtime_ns
    assert command.main([*stored, "--steps", "1", "--text", str(folder / "small.txt")]) == 0
    assert (tmp_path / "read-000.safetensors").stat().st_mtime_ns == written


def test_states_of_another_base_are_refused(folder, tmp_path, capsys):
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "1", "--seed", "1") == 0
    for base, output, status in ((folder, "a", 0), (tmp_path, "b", 2)):
        if status:
            (tmp_path / "b").mkdir()
            for file in (tmp_path / "a").glob("self-*"):
                file.rename(tmp_path / "b" / file.name)
        arguments = ["--base", str(base / "out" / "base"), "--output", str(tmp_path / output), *SMALL]
        assert command.main([*arguments, "--self-generate", "500", "--steps", "1", "--draft-vocab", "0"]) == status
    assert "text of another base model" in capsys.readouterr().err


def test_wrong_module_to_start_from_is_refused_before_states_are_stored(folder, tmp_path, capsys):
    arguments = ["--base", str(folder / "out" / "base"), "--text", str(folder / "text.txt"), *SMALL]
    arguments += ["--from", str(folder / "out" / "module"), "--shape", "eagle", "--draft-vocab", "0"]
    arguments += ["--output", str(tmp_path / "new")]
    assert "embed_norm.weight" in refused(capsys, command.main(arguments))
    assert not (tmp_path / "new").exists()


def test_finished_run_resumed_saves_the_same_module(folder, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(folder / "out", output)
    before = contents(output)
    assert train_joint(folder, output, "--steps", "2", "--resume") == 0
    assert contents(output) == before


def send(monkeypatch, number: signal.Signals, step: int, times: int = 1) -> None:
    """A signal while the step after ``step`` computes."""
    train_step = Trainer.train_step

    def interrupted(trainer, *stop):
        if trainer.step == step:
            for _ in range(times):
                signal.raise_signal(number)
        return train_step(trainer, *stop)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_resumed_equals_a_whole_run(folder, tmp_path, capsys, monkeypatch, number, status):
    """A signal before anything was saved: its exit status, the remedy in one line, and the same module in the end."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ["--steps", "6"]
    assert attach(folder, whole, *steps) == 0
    with monkeypatch.context() as patch:
        send(patch, number, step=2)
        assert attach(folder, cut, *steps) == status
    error = capsys.readouterr().err
    assert "stopping after this step; Ctrl-C again stops at once" in error
    assert error.splitlines()[-1] == f"stopped; go on with --resume --output {cut}"
    assert set(contents(cut)) == {"training.pt"}
    assert read_state(cut / "training.pt")["step"] == 3
    assert attach(folder, cut, *steps, "--resume") == 0
    assert (cut / "module.safetensors").read_bytes() == (whole / "module.safetensors").read_bytes()


def test_second_interrupt_stops_at_once_and_promises_nothing(folder, tmp_path, capsys, monkeypatch):
    send(monkeypatch, signal.SIGINT, step=0, times=2)
    assert attach(folder, tmp_path / "out") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped before a step was saved; the same command begins anew")
    assert not (tmp_path / "out" / "training.pt").exists()


def test_interruption_leaves_an_ignored_signal_ignored():
    """As in a shell's background job."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption(lambda: None) as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.is_requested()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_full_disk_is_one_line_that_says_what_is_kept(folder, tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands for the full disk; it comes after the state of step 2 is saved."""
    train_step, limits = Trainer.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(trainer, *stop):
        if trainer.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return train_step(trainer, *stop)

    monkeypatch.setattr(Trainer, "train_step", then_full)
    output = tmp_path / "out"
    try:
        status = attach(folder, output, "--steps", "6", "--save-seconds", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file = output / "training.pt"
    error = refused(capsys, status)
    assert error.splitlines()[-1] == (
        f"error: {file}: cannot be written: File too large; {file} has the state after step 2"
    )
    assert set(contents(output)) == {"training.pt"}
    assert read_state(file)["step"] == 2
    monkeypatch.undo()
    assert attach(folder, output, "--steps", "6", "--save-seconds", "0", "--resume") == 0
