"""ChatTemplate: the Jinja text with which a model writes conversations as prompts.

It comes from whoever made the model, so it runs in `template_sandbox`. What templates expect is
what transformers gives them (`apply_chat_template` there): the names, the filters, the settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2

from modelpack_engine.errors import RequestError
from modelpack_engine.loaders.template_sandbox import TemplateEnvironment, bounded, rendering

#: Characters of a template; the longest of known models have some 20,000.
MAX_TEMPLATE = 512 * 1024

# What a template, or Python for it, raises where messages and template do not fit.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A template, and perhaps another one for requests with tools.

    One that does not compile fails requests, not the loading: completions work without it.
    """

    def __init__(self, source: str, *, tool_use: str | None = None) -> None:
        self.source = source
        self.tool_use = tool_use
        self._compiled: dict[str, jinja2.Template] = {}

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the prompt. Raises `RequestError` if the template fails, loops or misbehaves."""
        source = self.tool_use if self.tool_use and variables.get("tools") else self.source
        try:
            with rendering():
                template = self._compiled.get(source)
                if template is None:
                    template = self._compiled[source] = _compile(source)
                return template.render(**variables)
        except _FAILURES as error:
            raise RequestError(
                f"the model's chat template failed: {_described(error)}", param="messages"
            ) from error


def _compile(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"it has {len(source)} characters, the limit is {MAX_TEMPLATE}")
    environment = TemplateEnvironment()
    environment.filters["tojson"] = bounded(_tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _described(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    text = str(error)[:500]
    return (
        text
        if isinstance(error, (jinja2.TemplateError, ValueError)) and text
        else (f"{type(error).__name__}: {text}")
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML characters, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
