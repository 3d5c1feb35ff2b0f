"""Compose's provider protocol: what a `provider:` service says on its standard output.

Source: docker/compose v2.40.3, docs/extension.md and pkg/compose/plugins.go.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modelpack.deploy.local_server import LocalServer
from modelpack.errors import ConflictError, UsageError
from modelpack.registry.http_errors import shown

#: What `metadata` says: the options that Compose takes from the file, and hands to `up`.
METADATA: dict[str, Any] = {
    "description": "Models served by modelpack",
    "up": {
        "parameters": [
            {
                "name": "model",
                "description": "A model, as `modelpack pull` takes it. May be a list.",
                "required": True,
                "type": "string",
            },
            {
                "name": "context-size",
                "description": "Longest context, in tokens; -1 is the model's own",
                "required": False,
                "type": "integer",
                "default": "-1",
            },
            {
                "name": "runtime-flags",
                "description": "Flags as llama.cpp or vLLM have them: '--temp 0.7 --top-k 40'",
                "required": False,
                "type": "string",
            },
        ]
    },
    "down": {"parameters": []},
}
# Characters of a message, which Compose shows as it is.
_LONGEST = 2000


class ComposeMessages:
    """Writes messages to Compose: one JSON object a line, of the types that it knows."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def info(self, message: str) -> None:
        """Show a line in Compose's progress."""
        self._say("info", shown(message, _LONGEST))

    def setenv(self, name: str, value: str) -> None:
        """Set NAME, with the service's name before it, for the services that depend on it."""
        self._say("setenv", f"{name}={value}")

    def error(self, message: str) -> None:
        """Have Compose stop with this message."""
        self._say("error", shown(message, _LONGEST))

    def _say(self, kind: str, message: str) -> None:
        self._write(json.dumps({"type": kind, "message": message}))


def provide(
    server: LocalServer,
    models: Sequence[str],
    messages: ComposeMessages,
    *,
    context_size: int | None = None,
    runtime_flags: str = "",
) -> None:
    """Do what `up` has to: have the server hold and set up `models`; say where they are.

    Sets MODEL (their names, with commas between) and URL. `context_size` in tokens, None for each
    model's own. Raises `UsageError` for flags that are none.
    """
    try:
        flags = shlex.split(runtime_flags)
    except ValueError as error:
        raise UsageError(f"runtime-flags {runtime_flags!r}: {error}") from None
    present = {tag for model in server.client.models() for tag in model["tags"]}
    for model in models:
        if model not in present:
            messages.info(f"pulling {model}")
            server.client.pull(model, messages.info)
        if context_size is not None or flags:
            messages.info(f"configuring {model}")
            server.client.configure(model, context_size=context_size, runtime_flags=flags)
    messages.setenv("MODEL", ",".join(models))
    messages.setenv("URL", server.endpoint)


#: A plugin's name -> the function that runs it.
PLUGINS = {"docker-modelpack": "docker_modelpack", "docker-model": "docker_model"}
_MARK = "# Written by `modelpack compose install`."


def install_plugins(
    names: Sequence[str], directory: Path | None = None, *, force: bool = False
) -> list[Path]:
    """Write the plugins `names` and return their paths; None is Docker's directory for the user.

    Raises `ConflictError` for a file there that is not ours, unless `force` is given; then nothing
    is written.
    """
    directory = directory or _docker_config() / "cli-plugins"
    paths = [directory / name for name in names]
    for path in paths:
        if not force and path.exists() and _MARK not in path.read_bytes().decode(errors="ignore"):
            raise ConflictError(
                f"{path} exists and is not from modelpack",
                hint="give --force to replace it",
            )
    directory.mkdir(parents=True, exist_ok=True)
    for path in paths:
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(_script(PLUGINS[path.name]))
        scratch.chmod(0o755)
        scratch.replace(path)
    return paths


def _docker_config() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")


def _script(function: str) -> str:
    # The interpreter by its path: Docker starts plugins with whatever PATH it was given.
    code = f"from modelpack.cli.docker_plugins import {function}; {function}()"
    return f'#!/bin/sh\n{_MARK}\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n'
