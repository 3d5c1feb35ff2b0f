"""Scopes: what a bearer token allows, as Docker's token specification spells it.

`repository:team/model:pull,push` is the set of two pairs, so that "is this token enough" is a
subset test and several requirements are a union.
"""

from __future__ import annotations

from collections import defaultdict
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
