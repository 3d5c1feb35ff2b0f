"""Names of models as Ollama's clients write and read them: a tag is always shown."""

from __future__ import annotations

from modelpack.errors import NotFoundError
from modelpack_server.pool.catalogue import StoredModel
from modelpack_server.pool.pool import ModelPool


def shown(name: str) -> str:
    """Return a name with its tag."""
    has_tag = "@" in name or ":" in name.rpartition("/")[2]
    return name if has_tag else f"{name}:latest"


def missing(name: str) -> NotFoundError:
    """Return the error for a model that is not there, in the words that clients look for."""
    return NotFoundError(f"model '{name}' not found", hint="pull it first")


async def find(pool: ModelPool, name: str) -> StoredModel:
    """Return the stored model that a user calls so; raise `NotFoundError`."""
    try:
        return await pool.find(name)
    except NotFoundError:
        raise missing(name) from None
