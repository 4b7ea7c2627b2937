"""Files of one JSON object per line, possibly written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from recycle_ext.checkpoint.json_file import read_text
from recycle_ext.errors import RecycleError


def read_objects(file: Path, kinds: dict[str, type]) -> Iterator[tuple[str, dict]]:
    """The objects of a file, each with its place ("file:line"); empty lines are skipped.

    kinds: the allowed keys, and the type of each value. Raises RecycleError for anything else.
    """
    # Not splitlines(): that also splits at characters that JSON allows within a string.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise RecycleError(f"{where}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise RecycleError(f"{where}: not a JSON object")
        for name, value in values.items():
            if name not in kinds:
                raise RecycleError(f"{where}: {name!r} is not one of {', '.join(kinds)}")
            if not isinstance(value, kinds[name]):
                wanted = {str: "text", bool: "true or false"}[kinds[name]]
                raise RecycleError(f"{where}: {name} is {value!r}; it must be {wanted}")
        yield where, values
