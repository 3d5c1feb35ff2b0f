"""Renderer: compiles chat templates, keeps the last ones, and renders them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2

from modelpack_engine.templates.budget import Budget
from modelpack_engine.templates.environment import TemplateEnvironment

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


class TemplateFailedError(Exception):
    """A template failed; the text says why."""


class Renderer:
    """Renders one template at a time; for a single thread."""

    def __init__(self) -> None:
        self._environment = TemplateEnvironment()
        self._compiled = lru_cache(maxsize=32)(self._compile)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return the prompt; raises `TemplateFailedError`."""
        self._environment.budget = Budget()
        try:
            return self._compiled(source).render(variables)
        except _FAILURES as error:
            raise TemplateFailedError(_described(error)) from error
        finally:
            self._environment.budget = Budget()  # drops the values that it has measured

    def check(self, source: str) -> None:
        """Raise `TemplateFailedError` for a template that does not compile."""
        try:
            self._compiled(source)
        except _FAILURES as error:
            raise TemplateFailedError(_described(error)) from error

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(source)} characters, the limit is {MAX_TEMPLATE}")
        return self._environment.from_string(source)


def _described(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    text = str(error)[:500]
    return (
        text
        if isinstance(error, (jinja2.TemplateError, ValueError)) and text
        else f"{type(error).__name__}: {text}"
    )
