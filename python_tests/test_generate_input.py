"""python -m recycle_ext.generate reads a prompt from standard input, without what a shell adds to the prompt."""

from __future__ import annotations

import io
import json
import warnings
from types import SimpleNamespace

import pytest
from model_files import write_gguf
from models import write_base
from vocabularies import KEY, byte_level

from recycle_ext.command_line import exit_status
from recycle_ext.errors import RecycleWarning
from recycle_ext.generate.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, keys = tmp_path_factory.mktemp("model"), byte_level()
    base = write_base(folder / "hf", vocab_size=len(keys["tokens"]))
    write_gguf(folder / "model.gguf", base, metadata={KEY + key: value for key, value in keys.items()})
    return str(folder / "model.gguf")


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"xy", "xy"),
        (b"xy\n", "xy"),
        (b"xy\r\n", "xy"),
        (b"\xef\xbb\xbfxy\r\n", "xy"),
        (b"xy\n\n", "xy\n"),
        (b"\r\nx y\r", "\r\nx y\r"),
        ("\ufeffx\ufeffy".encode(), "x\ufeffy"),
    ],
)
def test_standard_input_is_the_prompt_without_what_a_shell_adds(model, monkeypatch, capsys, data, prompt):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert main(["-", "--model", model, "--max-new-tokens", "1", "--json"]) == 0
    # A token for each byte, and the first token.
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1 + len(prompt.encode())


def test_warning_of_a_command_is_one_line_without_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored after the test
    exit_status(lambda: 0)
    ours = warnings.formatwarning(RecycleWarning("model.gguf: odd"), RecycleWarning, "code.py", 3)
    assert ours == "warning: model.gguf: odd\n"
    other = warnings.formatwarning(UserWarning("odd"), UserWarning, "code.py", 3)
    assert other.startswith("code.py:3: UserWarning: odd\n")
