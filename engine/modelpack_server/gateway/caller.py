"""The caller of a request: its API key and the models that the key may use.

`Checks` puts the caller into the scope of every request that it lets pass; applications read it
with `caller_of`, and decide by the names of the model that they found, not by the name in the
request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.types import Scope

_SCOPE_KEY = "modelpack.caller"

# What a server may read as an id of a model, or the beginning of one.
_ID = re.compile(r"\s*(?:sha(?:256|512):.*|[0-9a-f]{4,128})\s*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    `owner` is the name of its API key, None where the server asks for no keys. `models` are the
    glob patterns of the key; None allows every model, and managing them.
    """

    owner: str | None = None
    models: tuple[str, ...] | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether the caller may only use some models, and manage none."""
        return self.models is not None

    def allows(self, names: Iterable[str]) -> bool:
        """Return whether the caller may use the model that has these names."""
        if self.models is None:
            return True
        return any(fnmatchcase(name, glob) for name in names for glob in self.models)

    def allows_unresolved(self, name: str) -> bool:
        """Return whether the caller may use a model of which only the name in a request is known.

        A digest or an id may stand for any model: it has to be listed itself, without wildcards.
        """
        if self.models is None or name in self.models:
            return True
        return not ("@" in name or _ID.fullmatch(name)) and self.allows((name,))


#: The caller of a server without keys: it may do everything.
ANYONE = Caller()


def put_caller(scope: Scope, caller: Caller) -> None:
    """Make `caller` the sender of the request that `scope` is about."""
    scope[_SCOPE_KEY] = caller


def caller_of(scope: Scope) -> Caller:
    """Return the sender of a request; `ANYONE` where nothing checked its key."""
    caller = scope.get(_SCOPE_KEY)
    return caller if isinstance(caller, Caller) else ANYONE
