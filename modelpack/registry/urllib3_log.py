"""urllib3's own log, without what a query may hold: a signature, or the state of an upload."""

from __future__ import annotations

import logging
from collections.abc import Callable


class WithoutQueries(logging.Filter):
    """Cuts the queries of URLs out of records, of the requests that are `ours` only."""

    def __init__(self, ours: Callable[[], bool]) -> None:
        super().__init__()
        self._ours = ours

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record where it has to be; every record passes."""
        if isinstance(record.args, tuple) and self._ours():
            record.args = tuple(
                value.partition("?")[0] if isinstance(value, str) else value
                for value in record.args
            )
        return True
