"""Reference: the name of a model, with its registry, repository, tag and digest.

Grammar (distribution/reference)::

    reference ::= name [ ":" tag ] [ "@" digest ]
    name      ::= [ registry "/" ] path
    registry  ::= host [ ":" port ]
    path      ::= component ( "/" component )*               at most 255 characters
    component ::= [a-z0-9]+ ( ( "." | "_" | "__" | "-"+ ) [a-z0-9]+ )*
    tag       ::= [A-Za-z0-9_] [A-Za-z0-9_.-]{0,127}

The first part is a registry if it is `localhost` or contains a `.`, a `:` or an upper-case letter.
Docker Model Runner's defaults apply: without a registry it is docker.io, without an organisation
there it is `ai`, without a tag it is `latest`, `hf.co` is `huggingface.co`, and names are converted
to lower case.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import IPv6Address

from modelpack.artifacts.digest import ALGORITHMS, SHORT_ID_LENGTH, Digest
from modelpack.errors import InvalidDigestError, InvalidReferenceError

DEFAULT_REGISTRY = "docker.io"
DEFAULT_ORGANISATION = "ai"
DEFAULT_TAG = "latest"
MAX_PATH_LENGTH = 255

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_HOST_PART = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_REGISTRY = re.compile(
    rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[(?P<v6>[0-9A-Fa-f:]+)\])(?::(?P<port>[0-9]{{1,5}}))?\Z"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_HEX = re.compile(r"[0-9a-f]+\Z")
_IN_FULL = re.compile(
    # A host has a dot or a port; otherwise the first part is not a host.
    r"(?P<registry>[a-z0-9]+(?:-+[a-z0-9]+)*"
    r"(?:(?:\.[a-z0-9]+(?:-+[a-z0-9]+)*)+(?::[0-9]{1,4})?|:[0-9]{1,4}))"
    rf"/(?P<path>{_COMPONENT}(?:/{_COMPONENT})*):(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})\Z"
)
_REWRITTEN = frozenset({"index.docker.io", "registry-1.docker.io", "hf.co"})
_HUB_ALIASES = {"index.docker.io": DEFAULT_REGISTRY, "registry-1.docker.io": DEFAULT_REGISTRY}


@dataclass(frozen=True, slots=True)
class Reference:
    """The registry and repository of a model, and its tag, digest or both."""

    registry: str
    repository: str
    tag: str | None = DEFAULT_TAG
    digest: Digest | None = None

    @classmethod
    def parse(
        cls, text: str, *, default_registry: str | None = None, strict: bool = False
    ) -> Reference:
        """Return the reference in `text`; raise `InvalidReferenceError` if it is invalid.

        Accepts surrounding white space, an empty tag and upper case in the name, as Docker's daemon
        does; `strict` rejects them, as its command line does. `default_registry` is used if `text`
        has no registry; it defaults to $DEFAULT_REGISTRY, then docker.io.
        """
        if default_registry is None:
            default_registry = os.environ.get("DEFAULT_REGISTRY") or DEFAULT_REGISTRY
        rest = text if strict else normalized(text)
        _check_not_bare_digest(rest, text)
        rest, digest = _split_digest(rest, text)
        name, tag = _split_tag(rest)
        written, path = _split_registry(name)
        registry = _HUB_ALIASES.get(written, written) if written else default_registry
        if "/" not in path and (written is None or registry == DEFAULT_REGISTRY):
            path = f"{DEFAULT_ORGANISATION}/{path}"
        if not _is_registry(registry):
            raise InvalidReferenceError(
                f"{_shown(text)}: {registry!r} is not a registry host[:port]",
                reference=text,
                hint=_hint(text),
            )
        check_repository(path, text)
        if tag is not None:
            check_tag(tag, text)
        elif digest is None:
            tag = DEFAULT_TAG
        return cls(registry, path, tag, digest)

    @property
    def name(self) -> str:
        """`registry/repository`, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """The digest if there is one, otherwise the tag: the reference in a registry's URLs."""
        return str(self.digest) if self.digest else self.tag or DEFAULT_TAG

    @property
    def familiar(self) -> str:
        """The shortest text that parses to this reference, as in `docker model list`."""
        name = self.name
        if self.registry == DEFAULT_REGISTRY and not _is_host(self.repository.partition("/")[0]):
            organisation, _, model = self.repository.partition("/")
            short = organisation == DEFAULT_ORGANISATION and "/" not in model
            name = model if short else self.repository
        tag = f":{self.tag}" if self.tag and (self.tag != DEFAULT_TAG or self.digest) else ""
        return name + tag + (f"@{self.digest}" if self.digest else "")

    def with_tag(self, tag: str) -> Reference:
        """Return the same repository at `tag`."""
        return Reference(self.registry, self.repository, check_tag(tag, tag))

    def with_digest(self, digest: Digest) -> Reference:
        """Return the same repository at `digest`, with no tag."""
        return Reference(self.registry, self.repository, None, digest)

    def without_digest(self) -> Reference:
        """Return the same repository and tag (`latest` if there is only a digest)."""
        return Reference(self.registry, self.repository, self.tag or DEFAULT_TAG)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return self.name + tag + (f"@{self.digest}" if self.digest else "")


def _hint(text: str) -> str | None:
    if text.startswith(("./", "../", "/", "~/")):
        return "this is a path; `modelpack package PATH REFERENCE` makes a model of files"
    scheme, separator, _ = text.partition("://")
    if not separator:
        return None
    if scheme.lower() in ("http", "https", "docker", "oci"):
        return "leave out the scheme"
    return "run modelpack import, or modelpack package --from, for objects in a bucket"


def parse_full(text: str) -> Reference | None:
    """Return `Reference.parse(text)` for a full `registry/path:tag` in lower case, else None.

    This is much faster than `parse`. `parse` may accept a text for which this returns None.
    """
    match = _IN_FULL.match(text)
    if match is None or len(match["path"]) > MAX_PATH_LENGTH:
        return None
    registry, path, tag = match.groups()
    if registry in _REWRITTEN or (registry == DEFAULT_REGISTRY and "/" not in path):
        return None
    return Reference(registry, path, tag)


def is_full_or_invalid(text: str) -> bool:
    """Return whether `text` is either a full reference or invalid, without parsing it.

    If it is, no other text names the same model.
    """
    host, _, rest = text.partition("/")
    return (
        ("." in host or ":" in host)
        and ":" in rest
        and text[-1] != ":"
        and "@" not in text
        and text == text.lower()
        and text == text.strip()
        and host not in _REWRITTEN
        and (host != DEFAULT_REGISTRY or "/" in rest)
    )


def normalized(text: str) -> str:
    """Return `text` as Docker's daemon rewrites it before parsing; ids stay unchanged."""
    rest = text.strip()
    if rest.startswith("hf.co/"):
        rest = "huggingface.co/" + rest.removeprefix("hf.co/")
    if is_model_id(rest) and len(rest) != len(rest.removeprefix("sha256:")) + 1:
        return rest
    rest, at, digest = rest.partition("@")
    name, tag = _split_tag(rest)
    if "/" not in name:
        name = f"{DEFAULT_ORGANISATION}/{name}"
    if not tag and not at:
        tag = DEFAULT_TAG
    return name.lower() + (f":{tag}" if tag else "") + at + digest


def is_model_id(text: str) -> bool:
    """Return whether `text` has the form of a model id: 12 or 64 hex digits, or a digest."""
    if ":" not in text:
        return len(text) in (SHORT_ID_LENGTH, 64) and _HEX.match(text) is not None
    try:
        Digest.parse(text)
    except InvalidDigestError:
        return False
    return True


def begins_id(text: str) -> bool:
    """Return whether `text` has the form of a model id or of a prefix of one."""
    algorithm, _, encoded = text.strip().rpartition(":")
    return algorithm in ("", *ALGORITHMS) and _HEX.match(encoded) is not None


def check_repository(path: str, text: str) -> str:
    """Return `path` if it is a valid repository name; `text` is the user's input, for errors."""
    if len(path) > MAX_PATH_LENGTH:
        raise InvalidReferenceError(
            f"{_shown(text)}: the name has {len(path)} characters, "
            f"more than the limit of {MAX_PATH_LENGTH}",
            reference=text,
        )
    if _PATH.match(path):
        return path
    if path != path.lower() and _PATH.match(path.lower()):
        problem, hint = f"the name {path!r} must be lower case", f"use {path.lower()!r}"
    else:
        bad = next((part for part in path.split("/") if not _PATH.match(part)), path)
        problem = f"{bad!r} is not a name component" if bad else "a name component is empty"
        hint = "use lower-case letters and digits, with single '.', '_', '__' or '-' between them"
    raise InvalidReferenceError(f"{_shown(text)}: {problem}", reference=text, hint=hint)


def check_tag(tag: str, text: str) -> str:
    """Return `tag` if it is a valid tag; `text` is the user's input, for errors."""
    if not _TAG.match(tag):
        raise InvalidReferenceError(
            f"{_shown(text)}: {tag[:140]!r} is not a tag",
            reference=text,
            hint="use 1 to 128 letters, digits, '_', '.' or '-', not starting with '.' or '-'",
        )
    return tag


def _split_digest(rest: str, text: str) -> tuple[str, Digest | None]:
    rest, at, encoded = rest.partition("@")
    if not at:
        return rest, None
    try:
        return rest, Digest.parse(encoded)
    except InvalidDigestError as error:
        raise InvalidReferenceError(f"{_shown(text)}: {error}", reference=text) from None


def _split_tag(rest: str) -> tuple[str, str | None]:
    name, colon, tag = rest.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (rest, None)


def _split_registry(name: str) -> tuple[str | None, str]:
    first, slash, path = name.partition("/")
    return (first, path) if slash and _is_host(first) else (None, name)


def _is_host(first: str) -> bool:
    return first == "localhost" or any(c in ".:" or c.isupper() for c in first)


def _is_registry(text: str) -> bool:
    found = _REGISTRY.match(text)
    if found is None or int(found["port"] or 0) > 65535:
        return False
    try:
        return not found["v6"] or bool(IPv6Address(found["v6"]))
    except ValueError:
        return False


def _check_not_bare_digest(rest: str, text: str) -> None:
    if len(rest) == 64 and _HEX.match(rest):
        raise InvalidReferenceError(
            f"{_shown(text)}: 64 hexadecimal digits are a model id, not a name",
            reference=text,
            hint=f"write NAME@sha256:{rest} for a model in a registry",
        )


def _shown(text: str) -> str:
    return f"invalid reference {text[:300]!r}"
