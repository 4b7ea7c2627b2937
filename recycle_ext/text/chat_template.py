"""Chat templates: the Jinja source that a model brings, and the prompt rendered from it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from recycle_ext.errors import RecycleError


def template_in(tokenizer_config: dict[str, Any]) -> str | None:
    """The template in a parsed tokenizer_config.json; of several, the one named "default"."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template


def render(template: str, messages: Iterable[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """The prompt, up to where the answer starts, as transformers renders it (utils/chat_template_utils.py).

    special_tokens: texts that the template may refer to, by name (bos_token, eos_token, ...). Raises RecycleError
    where the template refuses the messages.
    """
    # Imported here: only chats need jinja2.
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except jinja2.TemplateError as error:
        raise RecycleError(f"the model's chat template refuses these messages: {error}") from None
