"""Chat templates: the Jinja source that a model brings, and the prompt rendered from it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from recycle_ext.errors import RecycleError

if TYPE_CHECKING:
    import jinja2


def template_in(tokenizer_config: dict[str, Any]) -> str | None:
    """The template in a parsed tokenizer_config.json; of several, the one named "default"."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template


def render(template: str, messages: Iterable[dict[str, Any]], special_tokens: dict[str, str]) -> str:
    """The prompt, up to where the answer starts, as transformers renders it (utils/chat_template_utils.py).

    A message whose text the template takes only from a list of parts, as those of models with images do, is given as such
    a list. special_tokens: texts that the template may refer to, by name (bos_token, eos_token, ...). Raises RecycleError
    where the template refuses the messages or fails.
    """
    try:
        compiled = _compiled(template)
        # Templates test whether a key is there.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return _rendered(compiled, _in_wanted_form(compiled, messages, special_tokens), special_tokens)
    except Exception as error:  # a template may fail as any program may
        kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
        raise RecycleError(f"the model's chat template refuses these messages: {kind}{error}") from None


def _rendered(compiled: jinja2.Template, messages: list[dict[str, Any]], special_tokens: dict[str, str]) -> str:
    return compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens)


def _in_wanted_form(
    compiled: jinja2.Template, messages: list[dict[str, Any]], special_tokens: dict[str, str]
) -> list[dict[str, Any]]:
    """The messages, each text that the template loses as a string and shows as a part in a list of one part.

    The template is tried with other texts in the messages' places, as llama.cpp does it: what it does with a message may
    depend on the message's role and place, and on no more.
    """
    marks = [f"message{index}text" if isinstance(m.get("content"), str) else None for index, m in enumerate(messages)]

    def lost(as_parts: set[int]) -> set[int]:
        trial = [
            message if mark is None else message | {"content": _part(mark) if index in as_parts else mark}
            for index, (message, mark) in enumerate(zip(messages, marks, strict=True))
        ]
        try:
            text = _rendered(compiled, trial, special_tokens)
        except Exception:  # what is wrong shows when the messages are rendered
            text = ""
        return {index for index, mark in enumerate(marks) if mark is not None and mark not in text}

    as_parts = lost(set())
    if as_parts:
        as_parts -= lost(as_parts)
    return [m | {"content": _part(m["content"])} if i in as_parts else m for i, m in enumerate(messages)]


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    # Imported here: only chats need jinja2.
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks an answer for training: the text in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads a plain attribute)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block of its own, so that names set in it end with it.
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: jinja2.runtime.Macro) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)
