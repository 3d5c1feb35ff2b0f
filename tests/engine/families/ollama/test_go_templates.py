"""Go templates render the same text after conversion to Jinja."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import ChatTemplate, as_jinja

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
HEADERS = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>
{{- end }}<|start_header_id|>assistant<|end_header_id|>

"""
LAST = """{{- if .System }}[{{ .System }}] {{ end }}
{{- range $i, $m := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if eq .Role "user" }}U{{ $i }}:{{ $m.Content }}
{{- else if eq $m.Role "assistant" }}A:{{ .Content }}{{ range .ToolCalls }}<{{ .Function.Name }} \
{{ .Function.Arguments }}>{{ end }}
{{- end }}
{{- if and (ne .Role "assistant") $last }} A:{{ end }}
{{- end }}"""
USER = {"role": "user", "content": "hi"}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be \"brief\""},
    USER,
    {"role": "assistant", "content": "yo {{ x }}"},
    {"role": "user", "content": "bye"},
]  # fmt: skip
CALLING = {"role": "assistant", "content": "", "tool_calls": [
    {"function": {"name": "f", "arguments": {"a": 1}}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, [USER], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML,
            TURNS,
            '<|im_start|>system\nbe "brief"<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n'
            "<|im_start|>assistant\nyo {{ x }}<|im_end|>\n"
            "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            HEADERS,
            TURNS[:2],
            '<|start_header_id|>system<|end_header_id|>\n\nbe "brief"<|eot_id|>'
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (LAST, TURNS, '[be "brief"] U1:hiA:yo {{ x }}U3:bye A:'),
        (LAST, [USER, CALLING, USER], 'U0:hiA:<f {"a": 1}>U2:hi A:'),
        ("{{ .System }} USER: {{ .Prompt }} BOT: ", [USER], " USER: hi BOT: "),
        ("{{ .Prompt }}", [USER], "hi"),
        ("{{/* a comment */}}{{ .Prompt }}€😀\\n", [USER], "hi€😀\\n"),
        ("{{ if not .System }}none{{ else }}some{{ end }} {{ .Prompt }}", [USER], "none hi"),
        (
            '{{ range .Messages }}{{ if eq .Role "" "user" }}{{ json .Content }}{{ end }}{{ end }}',
            [USER],
            '"hi"',
        ),
        ("{{ range .Tools }}{{ . }}{{ else }}no tools{{ end }}{{ .Prompt }}", [USER], "no toolshi"),
    ],
)
def test_what_it_says(template: str, messages: list[dict[str, Any]], expected: str) -> None:
    made = ChatTemplate(as_jinja(template))
    variables = {"messages": messages, "tools": None, "add_generation_prompt": True}
    assert made.render(variables) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ if .System }}x", r"\{\{ end \}\} is missing"),
        ("{{ .Prompt }}{{ end }}", r"\{\{ end \}\} without \{\{ if \}\} or \{\{ range \}\}"),
        ("{{ .Nothing }}", "Nothing"),
        ("{{ range .Messages }}{{ .Colour }}{{ end }}", "Colour"),
        ("{{ with .System }}{{ . }}{{ end }}", "with"),
        ("{{ $x }}{{ .Prompt }}", r"\$x"),
        ('{{ if (eq .System "a" }}{{ end }}', "parenthesis"),
        ("{{ .Prompt ; }}", "cannot read"),
        ("{{ if shout .Prompt }}{{ end }}", "shout"),
        ("{{ .Prompt .System }}", "System"),
        ("{{ else }}{{ .Prompt }}", "else"),
        ('{{ if eq .Prompt "\x01" }}{{ end }}', "cannot be read"),
        ("{{ $x := 1 }}{{ $x = 2 }}{{ .Prompt }}", "not supported"),
    ],
)
def test_what_cannot_be_read(template: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        as_jinja(template)
    assert caught.value.param == "template"


def test_jinja_stays_as_it_is() -> None:
    for text in (
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "",
    ):
        assert as_jinja(text) == text
