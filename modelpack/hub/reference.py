"""HubReference: a model of the Hugging Face Hub, as a user names it.

hf.co/ORG/NAME[:QUANT][@REVISION]

`huggingface.co/`, `hf://` and the address of the model's page mean the same. ORG and NAME keep
their upper case, which the hub's URLs need. `docker model pull` accepts the same names without a
revision.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import DEFAULT_TAG, Reference, check_tag
from modelpack.errors import InvalidDigestError, InvalidReferenceError

#: The registry in the names of stored models of the hub, as in Docker Model Runner.
HUB_REGISTRY: Final = "huggingface.co"
DEFAULT_REVISION: Final = "main"

_PREFIXES: Final = ("hf.co/", "huggingface.co/", "hf://", "huggingface://")
_PAGES: Final = ("https://huggingface.co/", "https://hf.co/")
# As huggingface_hub's validate_repo_id, in ASCII: `--` and `..` have a meaning in its cache.
_PART: Final = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z")
_REVISION: Final = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][A-Za-z0-9_./+-]{0,249}\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_NO_TAG: Final = re.compile(r"[^A-Za-z0-9_.-]")
# Tags that select no quantisation: Docker's default tag, and the default branch.
_ANY: Final = frozenset({"", DEFAULT_TAG, DEFAULT_REVISION})


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the hub, a quantisation and a revision.

    If `quantization` is None, the files in the repository decide; `revision` is a branch, a tag or
    a commit.
    """

    organisation: str
    name: str
    quantization: str | None = None
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return the model that `text` names on the hub; None if it names another place.

        A name with a digest names a stored model. Raises `InvalidReferenceError` for a name on the
        hub that breaks the grammar.
        """
        rest = _without_prefix(text.strip())
        if rest is None:
            return None
        rest, at, revision = rest.partition("@")
        with suppress(InvalidDigestError):
            Digest.parse(revision)
            return None
        name, colon, tag = rest.partition(":")
        parts = name.split("/")
        if len(parts) != 2:
            raise _invalid(text, f"expected ORG/NAME, got {name!r}")
        for part in parts:
            if not _PART.match(part):
                raise _invalid(text, f"{part!r} is not a valid name on the hub")
        if at and not _REVISION.match(revision):
            raise _invalid(text, f"{revision!r} is not a valid branch, tag or commit")
        if colon and tag:
            check_tag(tag, text)
        quantization = None if tag.lower() in _ANY else tag
        return cls(parts[0], parts[1], quantization, revision or DEFAULT_REVISION)

    @property
    def repository(self) -> str:
        """`ORG/NAME`, which the hub calls a repository id."""
        return f"{self.organisation}/{self.name}"

    @property
    def example(self) -> str:
        """How to name one of the quantisations."""
        return f"hf.co/{self.repository}:QUANT"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.match(self.revision))

    @property
    def local(self) -> Reference:
        """The default name in the store: Docker Model Runner's, with a revision in the tag."""
        parts = [self.quantization] if self.quantization else []
        if self.revision != DEFAULT_REVISION:
            parts.append(_NO_TAG.sub("-", self.revision))
        tag = "-".join(parts)[:128] or DEFAULT_TAG
        return Reference.parse(f"{HUB_REGISTRY}/{self.repository.lower()}:{tag}")

    def at(self, revision: str) -> HubReference:
        """Return the same model at another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        tag = f":{self.quantization}" if self.quantization else ""
        at = f"@{self.revision}" if self.revision != DEFAULT_REVISION else ""
        return f"hf.co/{self.repository}{tag}{at}"


def local_name(text: str) -> str:
    """Return the name in a store: for a model of the hub its local reference, else `text`."""
    found = HubReference.parse(text)
    return text if found is None else str(found.local)


def _without_prefix(text: str) -> str | None:
    if prefix := next(filter(text.startswith, _PREFIXES), ""):
        return text.removeprefix(prefix)
    if page := next(filter(text.startswith, _PAGES), ""):
        name, tree, revision = text.removeprefix(page).strip("/").partition("/tree/")
        return f"{name}@{revision}" if tree else name
    return None


def _invalid(text: str, problem: str) -> InvalidReferenceError:
    return InvalidReferenceError(
        f"invalid reference {text[:300]!r}: {problem}",
        reference=text,
        hint="write hf.co/ORG/NAME[:QUANT][@REVISION]",
    )


def origin_annotations(reference: HubReference) -> dict[str, str]:
    """Return image-spec's annotations: the page, on the hub even for a mirror, and the commit."""
    return {
        media_types.SOURCE: f"{_PAGES[0]}{reference.repository}",
        media_types.REVISION: reference.revision,
    }


def hub_origin(manifest: Manifest) -> HubReference | None:
    """Return the model of the hub, at its commit, that a manifest was made from, or None."""
    page = manifest.annotations.get(media_types.SOURCE, "")
    commit = manifest.annotations.get(media_types.REVISION, "")
    if not page.startswith(_PAGES[0]):
        return None
    try:
        found = HubReference.parse(f"hf.co/{page.removeprefix(_PAGES[0])}@{commit}")
    except InvalidReferenceError:  # another tool wrote these
        return None
    return found if found is not None and found.is_commit else None
