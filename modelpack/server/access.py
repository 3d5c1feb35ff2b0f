"""What a request to the registry needs to be allowed: scopes, as tokens name them."""

from __future__ import annotations

from starlette.requests import Request

from modelpack.errors import InvalidReferenceError
from modelpack.server.names import Repository

#: A resource (`repository:ai/smol`) and an action on it (`pull`).
Needs = frozenset[tuple[str, str]]


def needs_of(request: Request, route: str) -> Needs:
    """Return what a request needs that `route` (a path with parameters) was found for.

    Nothing but a valid token where it names no repository. One counts under its canonical name, so
    that none of its aliases is a way around.
    """
    if route == "/v2/_catalog":
        return frozenset({("registry:catalog", "*")})
    if "name" not in request.path_params:
        return frozenset()
    resource = f"repository:{_canonical(request.path_params['name'])}"
    if "/uploads" not in route:
        if request.method in ("GET", "HEAD"):
            return frozenset({(resource, "pull")})
        if request.method == "DELETE":
            return frozenset({(resource, "delete")})
    needs = {(resource, "pull"), (resource, "push")}
    for other in request.query_params.getlist("from"):
        needs.add((f"repository:{_canonical(other)}", "pull"))
    return frozenset(needs)


def spelled(needs: Needs) -> str:
    """Return the `scope` of a challenge: `repository:a/b:pull,push repository:c/d:pull`."""
    actions: dict[str, set[str]] = {}
    for resource, action in needs:
        actions.setdefault(resource, set()).add(action)
    return " ".join(f"{name}:{','.join(sorted(actions[name]))}" for name in sorted(actions))


def _canonical(name: str) -> str:
    try:
        return Repository.parse(name).name or name
    except InvalidReferenceError:
        return name  # it will be refused for that
