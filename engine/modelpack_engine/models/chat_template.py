"""ChatTemplate: the Jinja template that renders a conversation as a prompt.

Templates are untrusted, so a worker process renders them (`modelpack_engine.worker`) within the
budget of `modelpack_engine.templates`. They get the names, filters and settings of transformers'
`apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_engine.worker.workers import JobFailedError, shared_workers

#: Seconds for one rendering, including the compilation of the template.
MAX_SECONDS = 5.0


class ChatTemplate:
    """A template, and optionally another one for requests with tools.

    A template that does not compile fails requests, not the load: completions work without it.
    """

    def __init__(self, source: str, *, tool_use: str | None = None) -> None:
        self.source = source
        self.tool_use = tool_use

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the prompt.

        Raises `RequestError` if the template fails, loops or misbehaves, and `QueueFullError` if
        too many requests wait for a rendering.
        """
        source = self.tool_use if self.tool_use and variables.get("tools") else self.source
        job = {"kind": "render", "source": source, "variables": dict(variables)}
        # One key for both templates: a model keeps at most one worker busy.
        return str(_run(self.source, job, "the model's chat template failed", "messages"))


def check_template(source: str) -> None:
    """Raise `RequestError` for a template that does not compile."""
    _run(source, {"kind": "check", "source": source}, "the template is not valid", "template")


def as_jinja(template: str) -> str:
    """Return a template as Jinja; Go templates, which Ollama uses, are translated.

    Raises `RequestError` for one that cannot be translated.
    """
    job = {"kind": "from_go", "source": template}
    return str(_run(template, job, "the Go template cannot be translated", "template"))


def _run(key: str, job: dict[str, Any], what: str, param: str) -> Any:
    try:
        return shared_workers().run(key, job, MAX_SECONDS)
    # The last three are of variables that JSON cannot express.
    except (JobFailedError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what}: {error}", param=param) from error
