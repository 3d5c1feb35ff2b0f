"""registries.toml: which registries have mirrors, and which are blocked.

The format is that of containers-registries.conf(5), version 2, limited to mirrors::

    [[registry]]
    prefix = "docker.io/ai"            # or "registry.example", or "*.example"

    [[registry.mirror]]
    location = "mirror.lan:5000/hub"   # docker.io/ai/smol is mirror.lan:5000/hub/smol
    pull-from-mirror = "digest-only"   # or "tag-only"; default: "all"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

from modelpack.artifacts.reference import check_repository
from modelpack.errors import InvalidReferenceError, UsageError

Use = Literal["all", "digest-only", "tag-only"]
_USES: Final = ("all", "digest-only", "tag-only")
_MAX_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror of a repository; `plain_http` and `insecure` apply to this host only."""

    host: str
    repository: str
    use: Use = "all"
    plain_http: bool | None = None
    insecure: bool = False

    def serves(self, name: str) -> bool:
        """Return whether the manifest `name`, a tag or a digest, may be pulled from this mirror."""
        return self.use == "all" or (self.use == "digest-only") == (":" in name)


@dataclass(frozen=True, slots=True)
class _Rule:
    prefix: str
    blocked: bool
    insecure: bool
    mirrors: tuple[Mirror, ...]

    def rest_of(self, registry: str, repository: str) -> str | None:
        """Return the part of the name after the prefix, or None if the rule does not apply."""
        if self.prefix.startswith("*."):
            return repository if registry.endswith(self.prefix[1:]) else None
        name = f"{registry}/{repository}"
        if name != self.prefix and not name.startswith(f"{self.prefix}/"):
            return None
        return name[len(self.prefix) + 1 :]


@dataclass(frozen=True, slots=True)
class Place:
    """The mirrors of a repository, and whether its own host is `insecure`."""

    mirrors: tuple[Mirror, ...] = ()
    insecure: bool = False


class Mirrors:
    """The rules of one file."""

    def __init__(self, rules: Iterable[_Rule] = ()) -> None:
        self._rules = sorted(rules, key=lambda rule: len(rule.prefix), reverse=True)

    def place(self, registry: str, repository: str) -> Place:
        """Return the place of `registry/repository`; raise `UsageError` if it is blocked."""
        for rule in self._rules:
            rest = rule.rest_of(registry, repository)
            if rest is None:
                continue
            if rule.blocked:
                what = f"{registry}/{repository}"
                raise UsageError(f"{what} is blocked by the rule for {rule.prefix}")
            return Place(tuple(_joined(m, rest) for m in rule.mirrors), rule.insecure)
        return Place()


def read_mirrors(path: Path | None = None) -> Mirrors:
    """Return the rules in `path`, by default those in the user's file, which may be absent.

    The user's file is $MODELPACK_MIRRORS, or registries.toml in the user's configuration directory.
    Raises `UsageError` for a missing or invalid file.
    """
    chosen = path or os.environ.get("MODELPACK_MIRRORS")
    if chosen is None:
        from platformdirs import user_config_path

        path = user_config_path("modelpack") / "registries.toml"
    else:
        path = Path(chosen)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        if chosen is None:
            return Mirrors()
        raise UsageError(f"no such file: {path}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        value = tomllib.loads(raw.decode())
        return Mirrors([_rule(entry) for entry in _tables(value, "registry")])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from None


def _rule(entry: dict[str, Any]) -> _Rule:
    prefix = entry.get("prefix") or entry.get("location")
    if not isinstance(prefix, str) or not prefix:
        raise ValueError("a [[registry]] has no prefix")
    if entry.get("location", prefix) != prefix:
        raise ValueError(
            f"{prefix}: a location other than the prefix is not supported: write it as a mirror"
        )
    mirrors = tuple(_mirror(one, prefix) for one in _tables(entry, "mirror"))
    blocked, insecure = (_flag(entry, name, prefix) for name in ("blocked", "insecure"))
    return _Rule(prefix.strip("/"), blocked, insecure, mirrors)


def _mirror(entry: dict[str, Any], prefix: str) -> Mirror:
    location, use = entry.get("location"), entry.get("pull-from-mirror", "all")
    if not isinstance(location, str) or not location:
        raise ValueError(f"{prefix}: a [[registry.mirror]] has no location")
    if use not in _USES:
        raise ValueError(f"{prefix}: pull-from-mirror is {use!r}, expected one of {_USES}")
    plain_http = None
    for scheme, plain in (("http://", True), ("https://", False)):
        if location.startswith(scheme):
            location, plain_http = location.removeprefix(scheme), plain
    host, _, path = location.strip("/").partition("/")
    if not host or any(c in host for c in "@?#\\ "):
        raise ValueError(f"{prefix}: a mirror's location has no valid host")
    insecure = _flag(entry, "insecure", prefix)
    return Mirror(host, path, cast(Use, use), plain_http, insecure)


def _joined(mirror: Mirror, rest: str) -> Mirror:
    name = "/".join(filter(None, [mirror.repository, rest]))
    try:
        check_repository(name, name)
    except InvalidReferenceError as error:
        raise UsageError(f"the mirror {mirror.host}: {error}") from None
    return replace(mirror, repository=name)


def _tables(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = value.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{name!r} is not a list of tables")
    return found


def _flag(entry: dict[str, Any], name: str, prefix: str) -> bool:
    value = entry.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{prefix}: {name!r} must be true or false")
    return value
