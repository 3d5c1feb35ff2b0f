"""Random numbers that can be had again: MODELPACK_FAULT_SEED sets what a failure has printed."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def seeded() -> Iterator[random.Random]:
    """Yield random numbers; an error inside tells their seed."""
    seed = int(os.environ.get("MODELPACK_FAULT_SEED") or secrets.randbelow(2**32))
    print(f"MODELPACK_FAULT_SEED={seed}")
    try:
        yield random.Random(seed)
    except BaseException as error:
        error.add_note(f"the same again: MODELPACK_FAULT_SEED={seed}")
        raise


def kills() -> int:
    """Return how many times a long test kills: MODELPACK_FAULT_KILLS, or 40."""
    return int(os.environ.get("MODELPACK_FAULT_KILLS") or 40)
