"""The caller of a request: its API key and the models that the key may use.

`Checks` puts the caller into the scope of each request that it accepts. Applications read it with
`caller_of` and check the names of the model that they found, not the name in the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.types import Scope

_SCOPE_KEY = "modelpack.caller"

# Texts that a server may interpret as a model id or the beginning of one.
_ID = re.compile(r"\s*(?:sha(?:256|512):.*|[0-9a-f]{4,128})\s*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    `owner` is the name of its API key, None on a server without keys. `models` are the glob
    patterns of the key; None allows all models, and managing them.
    """

    owner: str | None = None
    models: tuple[str, ...] | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether the caller may use only some models and may not manage models."""
        return self.models is not None

    def allows(self, names: Iterable[str]) -> bool:
        """Return whether the caller may use the model with these names."""
        if self.models is None:
            return True
        return any(fnmatchcase(name, glob) for name in names for glob in self.models)

    def allows_unresolved(self, name: str) -> bool:
        """Return whether the caller may use the model that a request names, without looking it up.

        A digest or an id may refer to any model, so a pattern must contain it without wildcards.
        """
        if self.models is None or name in self.models:
            return True
        return not ("@" in name or _ID.fullmatch(name)) and self.allows((name,))


#: The caller on a server without keys, which may do everything.
ANYONE = Caller()


def put_caller(scope: Scope, caller: Caller) -> None:
    """Set the sender of the request with this `scope`."""
    scope[_SCOPE_KEY] = caller


def caller_of(scope: Scope) -> Caller:
    """Return the sender of a request, or `ANYONE` if no middleware checked its key."""
    caller = scope.get(_SCOPE_KEY)
    return caller if isinstance(caller, Caller) else ANYONE
