"""Repository names in URLs, and the repositories of the store that they stand for.

A name is read like a reference that somebody types: `ai/smol` and `smol` are docker.io/ai/smol, and
`ghcr.io/org/x` is that repository, not one below docker.io. So what is pushed here is what
`modelpack` resolves in the same root. Each repository has one canonical name; the aliases (`smol`,
`docker.io/ai/smol`) are understood too.

Not every repository of a store has a name here: a URL cannot spell a registry with a port or with
upper-case letters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modelpack.artifacts.reference import (
    DEFAULT_ORGANISATION,
    DEFAULT_REGISTRY,
    Reference,
    check_repository,
)
from modelpack.errors import InvalidReferenceError

# A first component that is a host; the path grammar leaves no ports and no upper case.
_HOST = re.compile(r"localhost\Z|.*\.")


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of the store."""

    registry: str
    path: str

    @classmethod
    def parse(cls, name: str) -> Repository:
        """Return the repository that the `name` in a URL stands for.

        Raises `InvalidReferenceError`. The environment's default registry plays no part.
        """
        check_repository(name, name)
        # A bare name of 12 or 64 hex digits would be read as the id of a model.
        text = name if "/" in name else f"{DEFAULT_ORGANISATION}/{name}"
        reference = Reference.parse(text, default_registry=DEFAULT_REGISTRY)
        return cls(reference.registry, reference.repository)

    @classmethod
    def of(cls, reference: Reference) -> Repository:
        """Return the repository of `reference`."""
        return cls(reference.registry, reference.repository)

    @property
    def name(self) -> str | None:
        """The canonical name in URLs, None where there is none."""
        name = f"{self.registry}/{self.path}"
        if self.registry == DEFAULT_REGISTRY and not _HOST.match(self.path.partition("/")[0]):
            name = self.path
        try:
            return name if Repository.parse(name) == self else None
        except InvalidReferenceError:
            return None

    def tagged(self, tag: str) -> Reference:
        """Return the reference of `tag`; raise `InvalidReferenceError` if it is no tag."""
        return Reference(self.registry, self.path).with_tag(tag)

    def __str__(self) -> str:
        return f"{self.registry}/{self.path}"
