"""Run the command line in this process and capture its output."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpack.cli.main import run


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code and output of one command."""

    code: int
    stdout: bytes
    err: str

    @property
    def out(self) -> str:
        """The stdout as text, without the last newline."""
        return self.stdout.decode().rstrip("\n")

    @property
    def json(self) -> Any:
        """The stdout as JSON."""
        return json.loads(self.stdout)


def modelpack(*arguments: str | Path) -> Result:
    """Run `modelpack` with these arguments."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    buffer = out.buffer
    assert isinstance(buffer, io.BytesIO)
    return Result(code, buffer.getvalue(), err.getvalue())


def succeed(*arguments: str | Path) -> Result:
    """Run `modelpack` and require success."""
    result = modelpack(*arguments)
    assert result.code == 0, f"exit code {result.code}\n{result.err}"
    return result
