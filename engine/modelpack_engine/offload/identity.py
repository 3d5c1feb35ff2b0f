"""Identity of an offload: what keys and values depend on besides their tokens and their salt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

IDENTITY_SIZE = 16  # bytes
#: Goes up when the bytes of a block mean something else than before.
VERSION = 1


def cache_identity(model_id: str, block_size: int, parts: Iterable[str]) -> bytes:
    """Return what two engines have in common that may use each other's blocks.

    `model_id` names the weights. `parts` say the rest in words: types and shapes of what each layer
    keeps, in order, where it is computed, and by what versions of what.
    """
    text = "\0".join([f"kv {VERSION}", model_id, str(block_size), *parts])
    return hashlib.blake2b(text.encode(), digest_size=IDENTITY_SIZE, person=b"kv offload").digest()
