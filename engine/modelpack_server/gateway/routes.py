"""Which routes need no key, which use a model, and which manage the server."""

from __future__ import annotations

import re
from enum import Enum, auto

_PREFIX = r"(?:/engines(?:/[A-Za-z0-9._-]+)?|/anthropic)?(?:/v1)?"
_INFERENCE = re.compile(
    _PREFIX + r"/(?:chat/completions|completions|embeddings|responses|messages"
    r"|messages/count_tokens|rerank|score|images/generations)"
    r"|/v2/rerank|/api/(?:generate|chat|embed|embeddings|show)"
)
_MODELS = re.compile(_PREFIX + r"/models/?|/api/(?:tags|ps)")
_LISTING = re.compile(
    _MODELS.pattern + r"|/api/version"
    r"|" + _PREFIX + r"/responses/[A-Za-z0-9_.-]+(?:/input_items)?"
)
_OWN = _PREFIX + r"/(?:responses|requests)/[A-Za-z0-9_.:-]+"
# Other things that are posted below these paths use models (`/v1/responses/compact`).
_ENDS_OWN = {"DELETE": re.compile(_OWN), "POST": re.compile(_OWN + "/cancel")}
_ONE_MODEL = re.compile(r"(?:/engines(?:/[A-Za-z0-9._-]+)?|/anthropic)?/v1/models/(?P<model>.+)")
_OPEN = frozenset(("/", "/health", "/v1/health", "/ping", "/version"))
# vLLM answers to whatever begins so, and some servers ignore case.
_METRICS = re.compile(r"/metrics.*", re.IGNORECASE | re.DOTALL)
_UPLOADS = re.compile(r"/models/load|/api/blobs/[^/]+")


class Route(Enum):
    """What a request is about."""

    OPEN = auto()  # no key needed
    INFERENCE = auto()  # uses the model that its JSON body names
    LISTING = auto()  # reads what is there, or a reply of its own
    ONE_MODEL = auto()  # reads about the model that its path names
    METRICS = auto()  # reads counters, which name all models and keys
    UPLOAD = auto()  # its body is a stream of files, of any size
    MANAGEMENT = auto()  # everything else


def route_of(method: str, path: str) -> Route:
    """Return what a request is about; whatever is not known counts as management.

    `path` is canonical: see `modelpack_server.gateway.paths`.
    """
    if _METRICS.fullmatch(path):
        return Route.METRICS
    if method in ("GET", "HEAD"):
        if path in _OPEN:
            return Route.OPEN
        if _LISTING.fullmatch(path):
            return Route.LISTING
        if _ONE_MODEL.fullmatch(path):
            return Route.ONE_MODEL
        return Route.MANAGEMENT
    if method == "POST" and _INFERENCE.fullmatch(path):
        return Route.INFERENCE
    if method in ("POST", "PUT") and _UPLOADS.fullmatch(path):
        return Route.UPLOAD
    if method in _ENDS_OWN and _ENDS_OWN[method].fullmatch(path):
        return Route.LISTING
    return Route.MANAGEMENT


def model_in(path: str) -> str:
    """Return the model that the path of a `Route.ONE_MODEL` names."""
    found = _ONE_MODEL.fullmatch(path)
    return found["model"] if found else ""


def lists_models(path: str) -> bool:
    """Return whether the reply to a `Route.LISTING` names models."""
    return _MODELS.fullmatch(path) is not None


def is_plain(path: str) -> bool:
    """Return whether a path can mean one thing only, wherever it goes: no `.` or `..` in it."""
    parts = re.split(r"[/\\]", path)
    return path.startswith("/") and not {".", ".."} & set(parts) and "\x00" not in path
