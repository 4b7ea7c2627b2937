"""What a run was begun with, and its saved state: training.pt."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle_ext.errors import RecycleError

_KEYS = {"arguments", "trained", "average", "optimizer", "schedule", "step"}

# These options change nothing in what is trained. What --base, --joint and --text name is recorded in their place.
_NOT_RECORDED = {"output", "resume", "device", "shard_base", "evaluate_every", "save_seconds"}
_RECORDED_BY_CONTENT = {"base", "joint", "text", "text_field"}
_FLAGS = {"start": "--from"}  # where the flag is not the name of the option


class Record:
    """The arguments of a run by flag, held against those of the run that ``state`` is of; None: a new run."""

    def __init__(self, file: Path, state: dict[str, Any] | None) -> None:
        self.file = file
        self.state = state
        self.arguments: dict[str, Any] = {}

    def add(self, flag: str, value: Any) -> None:
        """Records an argument. Raises RecycleError where the resumed run was begun with another value."""
        self.arguments[flag] = value
        if self.state is None:
            return
        begun_with = self.state["arguments"].get(flag)
        if value != begun_with:
            raise RecycleError(f"--resume: {flag} is {value}, and {self.file} was begun with {begun_with}")

    def add_options(self, options: argparse.Namespace) -> None:
        """Records the options whose values say all; files are recorded by their content (``add``, ``add_text``)."""
        self.add("kind of run", "--joint" if options.joint else "frozen base")
        for name, value in vars(options).items():
            if name in _NOT_RECORDED | _RECORDED_BY_CONTENT:
                continue
            if name == "start" and value is not None:
                value = str(Path(value).resolve())
            if name == "self_generate" and options.text:
                value = None
            self.add(_FLAGS.get(name, "--" + name.replace("_", "-")), value)

    def add_text(self, parts: Iterable[Tensor]) -> None:
        """Records the text: its sequences, [n, T] integers each, as their number and sha256."""
        digest, count = hashlib.sha256(), 0
        for tokens in parts:
            digest.update(tokens.to(torch.int32).contiguous().numpy())
            count += len(tokens)
        self.add("the text", f"{count} sequences with sha256 {digest.hexdigest()[:16]}")


def read_state(file: Path) -> dict[str, Any]:
    """The state in a training.pt; nothing in the file is run. Raises RecycleError for any other file."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise RecycleError(f"--resume: {file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # The unpickler raises whatever the bytes of a damaged file lead to.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecycleError(f"--resume: {file} is damaged, or no state of a training run ({reason})") from None
    if not isinstance(state, dict) or not {"step", "optimizer"} <= state.keys():
        raise RecycleError(f"--resume: {file} is no state of a training run")
    if not state.keys() >= _KEYS:
        raise RecycleError(
            f"--resume: {file} was written by an earlier version of recycle_ext; begin again with another --output "
            "(text and states, self-* and read-*.safetensors, may be moved there)"
        )
    if not all(isinstance(state[name], dict) for name in ("arguments", "trained")):
        raise RecycleError(f"--resume: {file} is no state of a training run")
    return state


def check_folder(folder: Path, joint: bool) -> None:
    """Raises RecycleError where a new run would replace a file of ``folder``, or be read together with one."""
    models = ("base", "module") if joint else ("config.json", "module.safetensors")
    for path in (folder / name for name in (*models, "log.jsonl", "log.png")):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RecycleError(
                f"--output {folder}: {path.name} is there already, and is not of this run: give another directory"
            )
