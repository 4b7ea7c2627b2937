"""Text and JSON files that a user may have damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recycle_ext.errors import RecycleError


def read_text(file: Path) -> str:
    """The UTF-8 text of a file. Raises RecycleError for a file that cannot be read or is not UTF-8."""
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecycleError(f"{file}: not UTF-8: {error.reason}, byte {error.start}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``. Raises RecycleError for a file that cannot be read or holds something else."""
    try:
        # A byte order mark, which some editors write, is no part of JSON.
        content = json.loads(file.read_text("utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()  # half of a character, as "\ud83d", is no text
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecycleError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecycleError(f"{file}: holds no JSON object")
    return content


def as_float(number: float) -> float:
    """A number of a JSON file as a float; an integer that no float holds is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


class Fields:
    """The fields of a Hugging Face config.json, their types checked when they are read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of a key; ``default`` where the key is null or absent. Raises RecycleError for another type."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise RecycleError(f'{self.file}: "{key}" is {"null" if key in self.values else "missing"}')
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = as_float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecycleError(f'{self.file}: "{key}" is {value!r}, not {kind.__name__}')
        return value

    def refuse(self, key: str, value: Any, supported: str) -> None:
        """Raises the RecycleError that names a key, its value and the supported values."""
        raise RecycleError(f'{self.file}: "{key}" is {value!r}, which is not supported; {supported} is')
