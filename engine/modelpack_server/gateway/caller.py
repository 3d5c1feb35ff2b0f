"""The caller of a request: its API key and the models that the key may use.

`Checks` puts the caller into the scope of each request that it accepts. Applications read it with
`caller_of` and check the names of the model that they found, not the name in the request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from starlette.types import ASGIApp, Scope

from modelpack.artifacts.digest import ALGORITHMS

_SCOPE_KEY = "modelpack.caller"
_KEY_NAME = "modelpack.key"
_BACKGROUND = "modelpack.background"
_ENTRY = "modelpack.entry"

# Texts that a server may interpret as a model id or the beginning of one.
_ID = re.compile(
    rf"\s*(?:(?:{'|'.join(ALGORITHMS)}):.*|[0-9a-f]{{4,128}})\s*", re.IGNORECASE | re.DOTALL
)


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


@dataclass(frozen=True, slots=True)
class Background:
    """Marks a request that the server makes itself, for the owner of a batch, at low priority.

    `key` is the name of the API key that created the batch, None on a server without keys: `Checks`
    applies its limits and models as they are now, and refuses the request if the key was removed.
    """

    key: str | None


def put_background(scope: Scope, background: Background) -> None:
    """Mark the request with this `scope`; clients cannot, since headers do not set it."""
    scope[_BACKGROUND] = background


def background_of(scope: Scope) -> Background | None:
    """Return the mark of a request that the server makes itself, or None."""
    background = scope.get(_BACKGROUND)
    return background if isinstance(background, Background) else None


def put_entry(scope: Scope, app: ASGIApp) -> None:
    """Tell the application that gets the `scope` of the lifespan that `app` protects it."""
    scope[_ENTRY] = app


def entry_of(scope: Scope) -> ASGIApp | None:
    """Return the protected application, for requests that the server makes itself, or None."""
    entry: ASGIApp | None = scope.get(_ENTRY)
    return entry


def put_caller(scope: Scope, caller: Caller, key: str | None = None) -> None:
    """Set the sender of the request with this `scope`, and the name of the API key that it sent."""
    scope[_SCOPE_KEY] = caller
    scope[_KEY_NAME] = key


def key_name_of(scope: Scope) -> str | None:
    """Return the name of the API key that a request sent, or None.

    It differs from the caller's owner if a gateway names its own caller.
    """
    name = scope.get(_KEY_NAME)
    return name if isinstance(name, str) else None


def caller_of(scope: Scope) -> Caller:
    """Return the sender of a request, or `ANYONE` if no middleware checked its key."""
    caller = scope.get(_SCOPE_KEY)
    return caller if isinstance(caller, Caller) else ANYONE
