"""What commands that run a server share: TLS options and the request log."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from modelpack.cli.options import Settings

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def tls_options(command: F) -> F:
    """Add the TLS options; the command gets the certificate and key files as `tls`."""

    @click.option(
        "--tls-cert", type=_FILE, metavar="FILE", help="Serve https with this certificate."
    )
    @click.option(
        "--tls-key",
        type=_FILE,
        metavar="FILE",
        help="The key of --tls-cert, if it is in another file.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, tls_cert: Path | None, tls_key: Path | None, **arguments: Any) -> Any:
        if tls_key and not tls_cert:
            raise click.UsageError("--tls-key requires --tls-cert")
        tls = (tls_cert, tls_key or tls_cert) if tls_cert else None
        return command(*args, tls=tls, **arguments)

    return wrapped  # type: ignore[return-value]


@contextmanager
def request_log(settings: Settings) -> Iterator[None]:
    """Write request logs and warnings to stderr in the block; with --quiet, only warnings."""
    from modelpack.http.listener import LOGGERS

    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING if settings.quiet else logging.INFO)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # GET /logs has its own handler and needs all records
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
