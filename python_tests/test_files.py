"""Files that commands write: whole or not at all, and in the place of nothing that the command did not make."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recycle_ext.bench import __main__ as bench
from recycle_ext.bench import page
from recycle_ext.bench.gpu_report import check_folder
from recycle_ext.checkpoint.module import save_module
from recycle_ext.errors import RecycleError
from recycle_ext.eval import __main__ as evaluation
from recycle_ext.files import WriteError, check_output, whole_file, write_whole
from recycle_ext.measuring.plots import check_outputs, new_figure, save_figure

TENSORS = {"a": torch.zeros(20_000)}


def save_state(part: Path) -> None:
    with part.open("wb") as stream:
        torch.save(TENSORS, stream)


@pytest.fixture
def full_disk():
    """A limit of 20,000 bytes on the size of files stands for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [lambda part: part.write_text("x" * 30_000), lambda part: save_file(TENSORS, part), save_state],
    ids=["text", "safetensors", "torch"],
)
def test_file_that_does_not_fit_the_disk_leaves_the_old_one(tmp_path, full_disk, write: Callable[[Path], None]):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(WriteError, match=rf"^{file}: cannot be written: File too large$"), whole_file(file) as part:
        write(part)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_error_of_the_writer_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="no disk's fault"), whole_file(tmp_path / "file") as part:
        part.write_text("half")
        raise RuntimeError("no disk's fault")
    assert not list(tmp_path.iterdir())


def test_new_file_has_the_rights_of_the_old_one(tmp_path):
    file = tmp_path / "file"
    file.touch(0o640)
    file.chmod(0o640)
    with whole_file(file) as part:
        save_file(TENSORS, part)
    assert file.stat().st_mode & 0o777 == 0o640


def test_new_file_may_be_read_as_the_umask_allows(tmp_path):
    former = os.umask(0o022)
    try:
        with whole_file(tmp_path / "file") as part:
            save_file(TENSORS, part)
    finally:
        os.umask(former)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_pipe_is_written_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(WriteError, match="no/file: cannot be written: No such file or directory"):
        write_whole(tmp_path / "no" / "file", "text")


@pytest.mark.parametrize(
    ("content", "is_free"),
    [("", True), ('{"machine": {}, "settings": {}, "results": []}', True), ('{"model_type": "llama"}', False)]
    + [("# Notes", False), ("[1]", False), ('{"machine": {}, "settings": {}, "summaries": []}', False)],
)
def test_json_file_replaces_only_a_report(tmp_path, content, is_free):
    file = tmp_path / "x.json"
    file.write_text(content)
    if is_free:
        check_outputs(str(file), None, {"machine", "settings", "results"})
        return
    with pytest.raises(RecycleError, match=r"--json .*x\.json: is there already and was not made by this command"):
        check_outputs(str(file), None, {"machine", "settings", "results"})


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_replaces_only_a_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    file = str(tmp_path / f"x{suffix}")
    for _ in range(2):
        check_outputs(None, file, set())
        figure, _ = new_figure(1, 2, 2)
        save_figure(figure, file)
    Path(file).write_bytes(b"a picture of mine")
    with pytest.raises(RecycleError, match=r"--plot .*: is there already and was not made by this command"):
        check_outputs(None, file, set())


def test_json_and_plot_of_one_name_are_refused(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    with pytest.raises(RecycleError, match="--json and --plot are both"):
        check_outputs(str(tmp_path / "x.svg"), str(tmp_path / "x.svg"), set())


def test_directory_in_the_place_of_an_output_is_refused(tmp_path):
    with pytest.raises(RecycleError, match=r"--json .*: is a directory; give a file in it"):
        check_output("--json", tmp_path, lambda content: True)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (bench.main, ["--json", "{}"]),
        (evaluation.main, ["--json", "{}"]),
        (evaluation.main, ["--make-cloze", "{}", "{}"]),
        (page.main, [".", "--output", "{}"]),
    ],
    ids=["bench", "eval", "cloze", "page"],
)
def test_command_keeps_a_file_that_it_did_not_make(tmp_path, capsys, monkeypatch, command, arguments):
    """Refused before a model is opened: there is none."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.json"
    text = json.dumps({"machine": 1, "settings": 2, "text": "Some words and others. " * 80})
    file.write_text(text)
    assert command([argument.format(file) for argument in arguments]) == 2
    assert f"{file}: is there already and was not made by this command" in capsys.readouterr().err
    assert file.read_text() == text


def test_gpu_report_replaces_only_a_report(tmp_path):
    check_folder(tmp_path / "new")
    (tmp_path / "gpu.md").touch()
    with pytest.raises(RecycleError, match=r"gpu\.md is there already, without a gpu\.json"):
        check_folder(tmp_path)
    (tmp_path / "gpu.json").write_text('{"machine": {}, "checks": {}, "results": []}')
    check_folder(tmp_path)
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(RecycleError, match=r"gpu\.json: is there already and was not made by this command"):
        check_folder(tmp_path)


def test_module_is_not_saved_over_a_model(tmp_path):
    from models import write_base, write_module

    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base)
    before = (tmp_path / "base" / "config.json").read_bytes()
    with pytest.raises(
        RecycleError, match=r"base: has the config\.json of another model \(llama, not recycle_module\)"
    ):
        save_module(tmp_path / "base", module.config, module.state_dict())
    assert (tmp_path / "base" / "config.json").read_bytes() == before
    save_module(tmp_path / "module", module.config, module.state_dict())
