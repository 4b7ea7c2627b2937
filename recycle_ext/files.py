"""Files that a command writes: whole or not at all, and never in the place of a file that it did not make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from recycle_ext.errors import RecycleError


class WriteError(RecycleError):
    """A file or directory cannot be written: a full disk, missing rights, a file in the way."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns a failure to write ``path`` into a WriteError with the reason."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        raise WriteError(f"{path}: cannot be written: {reason}") from None


def _reason(error: BaseException | None) -> str | None:
    """Why the system refused a write; None where it did not. torch raises its own error after the system's."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, SafetensorError) and (found := re.search(r"I/O error: (.*) \(os error", str(error))):
            return found[1]
        error = error.__context__
    return None


@contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """The path of a new file, which takes the place of ``file`` at the end of the context.

    A reader sees the old file or the whole new one. After an error the old file is as it was. A link is followed; a
    device or a pipe is written as it is. Raises WriteError where the system refuses.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file() and not target.is_dir():
        with writing(file):
            yield target
        return
    part = target.with_name(f".{target.name}.part")
    with writing(file):
        try:
            part.unlink(missing_ok=True)  # of an earlier process that was killed
            part.touch()
            mode = (target if target.is_file() else part).stat().st_mode
            yield part
            os.chmod(part, mode)  # safetensors makes files that only their owner can read.
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            part.replace(target)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_whole(file: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, as ``whole_file`` does."""
    with whole_file(file) as part:
        part.write_text(text, "utf-8")


def make_directory(path: str | Path) -> None:
    """Creates a directory where there is none. Raises WriteError where the system refuses."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def check_output(flag: str, file: str | Path, is_own: Callable[[bytes], bool]) -> None:
    """Raises RecycleError where an option's file cannot be written, or would replace a file of another kind.

    is_own: whether the content of an existing file shows that the same command made it.
    """
    file = Path(file)
    if not file.absolute().parent.is_dir():
        raise RecycleError(f"{flag} {file}: there is no directory {file.parent}")
    if file.is_dir():
        raise RecycleError(f"{flag} {file}: is a directory; give a file in it")
    if not file.is_file():
        return
    try:
        with file.open("rb") as stream:
            content = stream.read(1 << 26)  # A report is smaller; a model in its place may not fit memory.
    except OSError as error:
        raise RecycleError(f"{flag} {file}: is there already and cannot be read: {error.strerror}") from None
    if content.strip() and not is_own(content):
        raise RecycleError(f"{flag} {file}: is there already and was not made by this command; give another name")


def has_keys(content: bytes, keys: set[str]) -> bool:
    """Whether ``content`` is a JSON object with at least these keys."""
    try:
        value: Any = json.loads(content)
    except ValueError:
        return False
    return isinstance(value, dict) and keys <= value.keys()
