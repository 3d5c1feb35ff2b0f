"""What servers in the foreground write to stderr: a line for each request, and what is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from modelpack.cli.options import Settings

_LOGGERS = ("modelpack", "modelpack_engine")


@contextmanager
def request_log(settings: Settings) -> Iterator[None]:
    """Write traces and warnings to stderr in the block; with --quiet only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING if settings.quiet else logging.INFO)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # who else listens hears everything: GET /logs
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
