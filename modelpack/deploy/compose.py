"""The provider protocol of Docker Compose: messages of a `provider:` service on stdout.

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
from modelpack.errors import ConflictError, UnsupportedError, UsageError
from modelpack.registry.http_errors import shown

#: The output of `metadata`: the options of a service that Compose passes to `up`.
METADATA: dict[str, Any] = {
    "description": "Models served by modelpack",
    "up": {
        "parameters": [
            {
                "name": "model",
                "description": "A model, in any form that `modelpack pull` accepts. May be a list.",
                "required": True,
                "type": "string",
            },
            {
                "name": "context-size",
                "description": "Maximum context length in tokens; -1: the model's own",
                "required": False,
                "type": "integer",
                "default": "-1",
            },
            {
                "name": "runtime-flags",
                "description": "Flags of llama.cpp or vLLM: '--temp 0.7 --top-k 40'",
                "required": False,
                "type": "string",
            },
        ]
    },
    "down": {"parameters": []},
}
# The maximum length of a message in characters; Compose shows it unchanged.
_MAX_LENGTH = 2000


class ComposeMessages:
    """Writes messages to Compose, one JSON object per line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def info(self, message: str) -> None:
        """Show a message in the progress of Compose."""
        self._send("info", shown(message, _MAX_LENGTH))

    def setenv(self, name: str, value: str) -> None:
        """Set a variable for dependent services; Compose adds the service's name as a prefix."""
        self._send("setenv", f"{name}={value}")

    def error(self, message: str) -> None:
        """Make Compose stop with this message."""
        self._send("error", shown(message, _MAX_LENGTH))

    def _send(self, kind: str, message: str) -> None:
        self._write(json.dumps({"type": kind, "message": message}))


def provide(
    server: LocalServer,
    models: Sequence[str],
    messages: ComposeMessages,
    *,
    context_size: int | None = None,
    runtime_flags: str = "",
) -> None:
    """Pull and configure `models` in the server, and send Compose the variables of `up`.

    These are MODEL, the names separated by commas, and URL. `context_size` is in tokens (None: the
    model's own). Raises `UsageError` for flags that cannot be parsed.
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


#: Plugin name -> the function that runs the plugin.
PLUGINS = {"docker-modelpack": "docker_modelpack", "docker-model": "docker_model"}
_MARK = "# Written by `modelpack compose install`."


def install_plugins(
    names: Sequence[str], directory: Path | None = None, *, force: bool = False
) -> list[Path]:
    """Write the plugins `names` to `directory` and return their paths.

    The default directory is Docker's plugin directory of the user. If it contains a plugin of the
    same name from another vendor, raises `ConflictError` and writes nothing, unless `force` is set.
    The plugins need a Python interpreter: raises `UnsupportedError` in the single binary.
    """
    if getattr(sys, "frozen", False):
        raise UnsupportedError(
            "the binary cannot install plugins: they run with Python",
            hint="install modelpack with pip, and run modelpack compose install",
        )
    config = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    directory = directory or Path(config, "cli-plugins")
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


def _script(function: str) -> str:
    # Use the full path of the interpreter, since the PATH of Docker may lack it.
    code = f"from modelpack.cli.docker_plugins import {function}; {function}()"
    return f'#!/bin/sh\n{_MARK}\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n'
