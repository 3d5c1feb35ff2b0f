"""Continuation tokens: opaque text that clients store and send back unread.

Anthropic's thinking blocks (`signature`) and OpenAI's reasoning items (`encrypted_content`) both
have a field for such text. The text is encoded, not encrypted: it holds no secrets.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

_MARK = "modelpack1."


def carry(text: str) -> str:
    """Return the continuation token for a text."""
    return _MARK + base64.b64encode(text.encode(errors="replace")).decode()


def carried(value: object) -> str | None:
    """Return the text of a token made by `carry`, or None for any other value."""
    if not isinstance(value, str) or not value.startswith(_MARK):
        return None
    try:
        return base64.b64decode(value[len(_MARK) :], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def fingerprint(text: str) -> str:
    """Return a short signature of a text that the client stores itself."""
    return base64.b64encode(hashlib.sha256(text.encode(errors="replace")).digest()).decode()
