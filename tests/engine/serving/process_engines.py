"""What makes engines in processes of their own; imports MLX only where an engine is made."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from modelpack_engine.errors import OutOfMemoryError
from modelpack_engine.models.load_progress import begin

if TYPE_CHECKING:
    from modelpack_engine.engine import Engine


def refuses() -> Engine:
    raise OutOfMemoryError("the weights do not fit", hint="free memory")


def breaks() -> Engine:
    raise RuntimeError("no such weights")


def dies() -> Engine:
    os._exit(3)


def hangs() -> Engine:
    signal.pause()
    raise AssertionError


def logs() -> Engine:
    from tests.engine.serving.tiny import tiny_engine

    begin([Path(__file__)])
    logging.getLogger("modelpack_engine.test").warning("loading %s", "slowly")
    logging.getLogger("modelpack_engine.test").debug("not wanted")
    return tiny_engine()
