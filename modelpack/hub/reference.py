"""HubReference: a model of the Hugging Face Hub, as a user names it.

    hf.co/ORG/NAME[:QUANT][@REVISION]

`huggingface.co/`, `hf://` and the address of the model's page mean the same. Upper and lower case
of ORG and NAME are kept: the hub's own files are asked for by them. Docker's `docker model pull`
knows the same names without a revision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import DEFAULT_TAG, Reference, check_tag
from modelpack.errors import InvalidDigestError, InvalidReferenceError

#: The registry that the models are kept under in a store, as Docker Model Runner does.
HUB_REGISTRY: Final = "huggingface.co"
DEFAULT_REVISION: Final = "main"

_PREFIXES: Final = ("hf.co/", "huggingface.co/", "hf://", "huggingface://")
_PAGES: Final = ("https://huggingface.co/", "https://hf.co/")
# huggingface_hub's validate_repo_id: no `--` and `..`, which mean something in its cache.
_PART: Final = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z")
_REVISION: Final = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][A-Za-z0-9_./+-]{0,249}\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_NO_TAG: Final = re.compile(r"[^A-Za-z0-9_.-]")
# Words that stand for "no quantisation in particular": Docker's, and the branch's own name.
_ANY: Final = frozenset({"", DEFAULT_TAG, DEFAULT_REVISION})


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the hub, which of its quantisations, and at which revision.

    `quantization` None leaves the choice to the files that are there; `revision` is a branch, a
    tag or a commit.
    """

    organisation: str
    name: str
    quantization: str | None = None
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return the model that `text` names on the hub; None if it names another place.

        A name with a digest is one of a stored model, and none of the hub's. Raises
        `InvalidReferenceError` for a name of the hub's that breaks the grammar.
        """
        rest = _without_prefix(text.strip())
        if rest is None:
            return None
        rest, at, revision = rest.partition("@")
        if at and _is_digest(revision):
            return None
        name, colon, tag = rest.partition(":")
        parts = name.split("/")
        if len(parts) != 2:
            raise _invalid(text, f"expected ORG/NAME, got {name!r}")
        for part in parts:
            if not _PART.match(part):
                raise _invalid(text, f"{part!r} is no name of the hub's")
        if at and not _REVISION.match(revision):
            raise _invalid(text, f"{revision!r} is no branch, tag or commit")
        if colon and tag:
            check_tag(tag, text)
        quantization = None if tag.lower() in _ANY else tag
        return cls(parts[0], parts[1], quantization, revision or DEFAULT_REVISION)

    @property
    def repository(self) -> str:
        """`ORG/NAME`, which the hub calls a repository id."""
        return f"{self.organisation}/{self.name}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision can mean one thing only."""
        return bool(_COMMIT.match(self.revision))

    @property
    def local(self) -> Reference:
        """The reference that the model is stored under if the user names no other.

        It is Docker Model Runner's, with the revision in the tag if it is not the default one: two
        revisions are two models.
        """
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
    """Return the name in a store of what `text` names: that of a hub's model, else `text`."""
    found = HubReference.parse(text)
    return text if found is None else str(found.local)


def _without_prefix(text: str) -> str | None:
    for prefix in _PREFIXES:
        if text.startswith(prefix):
            return text.removeprefix(prefix)
    for page in _PAGES:
        if text.startswith(page):
            rest = text.removeprefix(page).strip("/")
            name, tree, revision = rest.partition("/tree/")
            return f"{name}@{revision}" if tree else rest
    return None


def _is_digest(text: str) -> bool:
    try:
        Digest.parse(text)
    except InvalidDigestError:
        return False
    return True


def _invalid(text: str, problem: str) -> InvalidReferenceError:
    return InvalidReferenceError(
        f"invalid reference {text[:300]!r}: {problem}",
        reference=text,
        hint="a model of the hub is hf.co/ORG/NAME[:QUANT][@REVISION]",
    )


_HUB: Final = "https://huggingface.co/"


def origin_annotations(reference: HubReference) -> dict[str, str]:
    """Return the page and the commit of a model, as image-spec's annotations.

    The page is the hub's own, whatever mirror was asked: the same commit is the same model.
    """
    return {
        media_types.SOURCE: f"{_HUB}{reference.repository}",
        media_types.REVISION: reference.revision,
    }


def hub_origin(manifest: Manifest) -> HubReference | None:
    """Return where on the hub a model is from, at its commit; None if it is not."""
    page = manifest.annotations.get(media_types.SOURCE, "")
    commit = manifest.annotations.get(media_types.REVISION, "")
    if not page.startswith(_HUB):
        return None
    try:
        found = HubReference.parse(f"hf.co/{page.removeprefix(_HUB)}@{commit}")
    except InvalidReferenceError:  # somebody else wrote these
        return None
    return found if found is not None and found.is_commit else None
