"""A server of ours in a process of its own, so that who measures does not compute beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from modelpack.errors import ModelpackError

# How long it may take to end.
_END = 20.0
# Keys for the server's clients: ours listens on loopback, for this process only.
_NOT_FOR_IT = ("MODELPACK_KEYS",)


@contextmanager
def served(model: str, options: Sequence[str]) -> Iterator[str]:
    """Serve `model` with `modelpack serve`'s `options`; yield the address.

    The model may still be loading: a request waits for it. Raises `ModelpackError` with what the
    server says if it does not start.
    """
    command = [sys.executable, "-m", "modelpack", "serve", "--port", "0", "-q", *options, model]
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_IT}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                process.wait()
                errors.seek(0)
                raise _failure(model, errors.read())
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()


def _failure(model: str, said: str) -> ModelpackError:
    """Return the error that the server's last words are."""
    lines = said.strip().splitlines()
    found = {kind: text for kind, _, text in (line.partition(": ") for line in lines)}
    reason = found.get("error", found.get("Error", lines[-1] if lines else "no reason was given"))
    return ModelpackError(f"{model} cannot be served: {reason}", hint=found.get("hint"))
