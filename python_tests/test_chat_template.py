"""Chat templates render as in transformers; a template that takes parts gets parts; a failing template is an error."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from recycle_ext.errors import RecycleError
from recycle_ext.text.chat_template import render

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>2 + 2?</b> é 'x'"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Why?"},
]
EACH = "{% for m in messages %}"
# Helpers and settings that transformers gives to a template.
TEMPLATES = {
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "generation in a condition": EACH
    + "{% if m.role == 'assistant' %}\n  {%- generation %}\n  {{ m.content }}\n  {%- endgeneration -%}\n{% endif %}{% endfor %}",
    "names set in generation": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "tojson": EACH + "{{ m | tojson }}{{ m | tojson(indent=2, ensure_ascii=True, sort_keys=True) }}{% endfor %}",
    "separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "date": "{{ strftime_now('%Y') }}{{ strftime_now is defined }}",
    "loop controls": EACH + "{% if loop.index > 2 %}{% break %}{% endif %}{% continue %}{% endfor %}end",
    "blocks": "\n  {% if true %}\n  a\n  {% endif %}\n{# note #}\n{{ messages[0].content }}\n",
    "no tools": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token }}{{ nothing }}",
    "namespace": "{% set n = namespace(x=0) %}" + EACH + "{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "strings or parts": EACH
    + "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endif %}{% endfor %}",
    "changed text": EACH + "{{ m.content | trim | upper | replace('?', '!') }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_template_renders_as_in_transformers(template):
    (expected,), _ = render_jinja_template([CHAT], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    assert render(template, CHAT, {"bos_token": "<s>"}) == expected


def test_template_sees_no_key_whose_value_is_none():
    template = EACH + "{{ m.tool_calls is defined }}{{ m.content }}{% endfor %}"
    assert render(template, [{"role": "user", "content": "hi", "tool_calls": None}], {}) == "Falsehi"


PART = "{% if c.type == 'text' %}{{ c.text }}{% endif %}"
PARTS = {
    "loop": EACH + "<{{ m.role }}>{% for c in m.content %}" + PART + "{% endfor %}{% endfor %}",
    "name": EACH + "<{{ m.role }}>{% set cs = m['content'] %}{% for c in cs %}" + PART + "{% endfor %}{% endfor %}",
    "index": EACH + "<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}",
    "filter": EACH
    + "<{{ m.role }}>{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"
    "{% endfor %}",
    "system as a string": "<system>{{ messages[0].content }}{% for m in messages[1:] %}<{{ m.role }}>"
    "{% for c in m.content %}" + PART + "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", PARTS.values(), ids=PARTS)
def test_template_that_takes_parts_loses_no_text(template):
    text = "".join(f"<{message['role']}>{message['content']}" for message in CHAT)
    assert render(template, CHAT, {}) == text


def test_message_that_a_template_leaves_out_stays_a_string():
    template = "{{ messages[0].content is string }}{{ messages[-1].content }}"
    assert render(template, CHAT, {}) == "TrueWhy?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ messages[0]['content'].encode('nothing') }}", "LookupError: unknown encoding"),
        ("{{ messages | tojson(indent='a', nothing=1) }}", "TypeError: "),
        ("{{ strftime_now(1) }}", "TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ nothing.nothing }}", "'nothing' is undefined"),
        ("{{ messages.append(1) }}", "append"),
        ("{% if %}", "Expected an expression"),
        ("{% generation %}", "endgeneration"),
    ],
)
def test_template_that_fails_is_an_error(template, message):
    with pytest.raises(RecycleError, match="the model's chat template refuses these messages: ") as caught:
        render(template, CHAT, {})
    assert message in str(caught.value)
