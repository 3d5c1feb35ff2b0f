"""The files that make plugins of Docker's command line of this program.

Source: docker/cli, cli-plugins/manager and docs (plugins are executables named docker-NAME).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from modelpack.errors import ConflictError

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
                f"{path} is there already, and not from modelpack",
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
