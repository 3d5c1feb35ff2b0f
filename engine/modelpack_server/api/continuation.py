"""Continuation tokens: opaque text that clients keep for the server and send back unread.

Both Anthropic's thinking blocks (`signature`) and OpenAI's reasoning items (`encrypted_content`)
have a field that is opaque to clients. Nothing here is secret: whoever reads it may.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_MARK = "modelpack1."


def carry(text: str) -> str:
    """Return text in a form that clients carry."""
    return _MARK + base64.b64encode(text.encode(errors="replace")).decode()


def carried(value: object) -> str | None:
    """Return the text that `carry` was given; None for what it did not make."""
    if not isinstance(value, str) or not value.startswith(_MARK):
        return None
    try:
        return base64.b64decode(value[len(_MARK) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def fingerprint(text: str) -> str:
    """Return a short signature of a text that clients hold themselves."""
    return base64.b64encode(hashlib.sha256(text.encode(errors="replace")).digest()).decode()
