"""JSON files that a user may have damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recycle_ext.errors import RecycleError


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecycleError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecycleError(f"{file}: holds no JSON object")
    return content
