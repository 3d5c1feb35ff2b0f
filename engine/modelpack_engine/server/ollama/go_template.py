"""Templates of requests: Jinja, or the simple ones of Go's that Ollama's documents show."""

from __future__ import annotations

import re

from modelpack_engine.errors import RequestError

# An action of Go's: a field of its data ({{ .Prompt }}), a variable of its, or a keyword.
_GO = re.compile(r"\{\{-?\s*(?:if |else if |range |with |end\b|else\b|\$|\.[A-Z])")


def as_jinja(template: str) -> str:
    """Return a template as Jinja; raises `RequestError` for what cannot be."""
    if _GO.search(template) is None:
        return template
    raise RequestError("the template is one of Go's", param="template", hint="write it in Jinja")
