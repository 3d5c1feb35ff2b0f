"""Challenges and scopes: the parsers of `WWW-Authenticate` (RFC 9110) and of token scopes.

`repository:team/model:pull,push` becomes a set of two (resource, action) pairs. Whether a token
covers a request is then a subset test, and combined requirements are a union.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

#: A resource (`repository:team/model`) and one action on it (`pull`).
Scope: TypeAlias = tuple[str, str]
Scopes: TypeAlias = frozenset[Scope]

NOTHING: Scopes = frozenset()


def repository_scopes(name: str, *actions: str) -> Scopes:
    """Return the scopes for `actions` (pull, push, delete) on the repository `name`."""
    return frozenset((f"repository:{name}", action) for action in actions)


def parse_scopes(text: str) -> Scopes:
    """Return the scopes in the `scope` parameter of a challenge: separated by spaces."""
    found: set[Scope] = set()
    for scope in text.split():
        resource, colon, actions = scope.rpartition(":")
        if colon:
            found.update((resource, action) for action in actions.split(",") if action)
    return frozenset(found)


def spelled(scopes: Scopes) -> list[str]:
    """Return one `resource:action,action` for each resource, sorted."""
    actions = defaultdict(set)
    for resource, action in scopes:
        actions[resource].add(action)
    return [f"{resource}:{','.join(sorted(actions[resource]))}" for resource in sorted(actions)]


_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 - a grammar, no secret
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|\Z)")
_PARAM = re.compile(rf'[\s,]*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN})(?=[\s,]|\Z))')
_TOKEN68 = re.compile(r"[ \t]+([A-Za-z0-9._~+/-]+=*)[ \t]*(?=,|\Z)")
_MAX_LENGTH = 16 * 1024


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate; `scheme` and the names of `parameters` are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    token68: str | None = None


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges in the order of the header, up to the first that does not parse."""
    header = header[:_MAX_LENGTH]
    challenges: list[Challenge] = []
    position = 0
    while match := _SCHEME.match(header, position):
        scheme, position = match[1].lower(), match.end()
        token68 = _TOKEN68.match(header, position)
        if token68 and not _PARAM.match(header, position):
            # `Negotiate abc` - but `Basic Bearer` would be two schemes without their comma.
            challenges.append(Challenge(scheme, {}, token68[1]))
            position = token68.end()
            continue
        parameters: dict[str, str] = {}
        while match := _PARAM.match(header, position):
            value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
            parameters.setdefault(match[1].lower(), value)
            position = match.end()
        challenges.append(Challenge(scheme, parameters))
    return challenges
