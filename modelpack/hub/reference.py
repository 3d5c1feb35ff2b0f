"""HubReference: a model of the Hugging Face Hub or of ModelScope, as a user names it.

    hf.co/ORG/NAME[:QUANT][@REVISION]    modelscope.cn/ORG/NAME[:QUANT][@REVISION]

`huggingface.co/`, `hf://`, `modelscope://` and the address of the model's page mean the same. ORG
and NAME keep their upper case, which the hubs' URLs need. `docker model pull` accepts the same
names of the Hugging Face Hub without a revision.
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


@dataclass(frozen=True, slots=True)
class Site:
    """A hub: its names, the addresses of its pages, and the variables of its users.

    `registry` is the registry in the names of stored models, for the Hugging Face Hub as in Docker
    Model Runner. The first of `prefixes` and of `pages` is the usual one.
    """

    title: str
    registry: str
    prefixes: tuple[str, ...]
    pages: tuple[str, ...]
    default_revision: str
    endpoint: str
    endpoint_variable: str
    token_variable: str
    log_in: str


HUGGING_FACE: Final = Site(
    "the Hugging Face Hub",
    "huggingface.co",
    ("hf.co/", "huggingface.co/", "hf://", "huggingface://"),
    ("https://huggingface.co/", "https://hf.co/"),
    "main",
    "https://huggingface.co",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "log in with `hf auth login`, or set HF_TOKEN; a name that does not exist may look the same",
)
# modelscope_hub 0.5.1 (Apache-2.0), constants.py and config.py.
MODELSCOPE: Final = Site(
    "ModelScope",
    "modelscope.cn",
    ("modelscope.cn/", "www.modelscope.cn/", "modelscope://"),
    ("https://modelscope.cn/models/", "https://www.modelscope.cn/models/"),
    "master",
    "https://modelscope.cn",
    "MODELSCOPE_ENDPOINT",
    "MODELSCOPE_API_TOKEN",
    "set MODELSCOPE_API_TOKEN; a name that does not exist may look the same",
)
SITES: Final = (HUGGING_FACE, MODELSCOPE)
#: The hubs, by the registry in the names of their stored models.
HUB_REGISTRIES: Final = {site.registry: site for site in SITES}

# As huggingface_hub's validate_repo_id, in ASCII: `--` and `..` have a meaning in its cache.
_PART: Final = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?\Z")
_REVISION: Final = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][A-Za-z0-9_./+-]{0,249}\Z")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_NO_TAG: Final = re.compile(r"[^A-Za-z0-9_.-]")
# Tags that select no quantisation: Docker's default tag, and the default branch.
_ANY: Final = frozenset({"", DEFAULT_TAG, *(site.default_revision for site in SITES)})


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the hub, a quantisation and a revision.

    If `quantization` is None, the files in the repository decide; `revision` is a branch, a tag or
    a commit.
    """

    organisation: str
    name: str
    quantization: str | None = None
    revision: str = HUGGING_FACE.default_revision
    site: Site = HUGGING_FACE

    @classmethod
    def parse(cls, text: str) -> HubReference | None:
        """Return the model that `text` names on the hub; None if it names another place.

        A name with a digest names a stored model. Raises `InvalidReferenceError` for a name on the
        hub that breaks the grammar.
        """
        found = _without_prefix(text.strip())
        if found is None:
            return None
        site, rest = found
        rest, at, revision = rest.partition("@")
        with suppress(InvalidDigestError):
            Digest.parse(revision)
            return None
        name, colon, tag = rest.partition(":")
        parts = name.split("/")
        if len(parts) != 2:
            raise _invalid(text, f"expected ORG/NAME, got {name!r}", site)
        for part in parts:
            if not _PART.match(part):
                raise _invalid(text, f"{part!r} is not a valid name on the hub", site)
        if at and not _REVISION.match(revision):
            raise _invalid(text, f"{revision!r} is not a valid branch, tag or commit", site)
        if colon and tag:
            check_tag(tag, text)
        quantization = None if tag.lower() in _ANY else tag
        revision = revision or site.default_revision
        return cls(parts[0], parts[1], quantization, revision, site)

    @property
    def repository(self) -> str:
        """`ORG/NAME`, which the hub calls a repository id."""
        return f"{self.organisation}/{self.name}"

    @property
    def example(self) -> str:
        """How to name one of the quantisations."""
        return f"{self.site.prefixes[0]}{self.repository}:QUANT"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.match(self.revision))

    @property
    def local(self) -> Reference:
        """The default name in the store: Docker Model Runner's, with a revision in the tag."""
        parts = [self.quantization] if self.quantization else []
        if self.revision != self.site.default_revision:
            parts.append(_NO_TAG.sub("-", self.revision))
        tag = "-".join(parts)[:128] or DEFAULT_TAG
        return Reference.parse(f"{self.site.registry}/{self.repository.lower()}:{tag}")

    def at(self, revision: str) -> HubReference:
        """Return the same model at another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        tag = f":{self.quantization}" if self.quantization else ""
        at = f"@{self.revision}" if self.revision != self.site.default_revision else ""
        return f"{self.site.prefixes[0]}{self.repository}{tag}{at}"


def local_name(text: str) -> str:
    """Return the name in a store: for a model of the hub its local reference, else `text`."""
    found = HubReference.parse(text)
    return text if found is None else str(found.local)


def _without_prefix(text: str) -> tuple[Site, str] | None:
    for site in SITES:
        if prefix := next(filter(text.startswith, site.prefixes), ""):
            return site, text.removeprefix(prefix)
        if page := next(filter(text.startswith, site.pages), ""):
            name, tree, revision = text.removeprefix(page).strip("/").partition("/tree/")
            if site is MODELSCOPE:
                name = name.removesuffix("/summary").removesuffix("/files")
            return site, f"{name}@{revision}" if tree else name
    return None


def _invalid(text: str, problem: str, site: Site) -> InvalidReferenceError:
    return InvalidReferenceError(
        f"invalid reference {text[:300]!r}: {problem}",
        reference=text,
        hint=f"write {site.prefixes[0]}ORG/NAME[:QUANT][@REVISION]",
    )


def origin_annotations(reference: HubReference) -> dict[str, str]:
    """Return image-spec's annotations: the page, on the hub even for a mirror, and the commit."""
    return {
        media_types.SOURCE: f"{reference.site.pages[0]}{reference.repository}",
        media_types.REVISION: reference.revision,
    }


def hub_origin(manifest: Manifest) -> HubReference | None:
    """Return the model of the hub, at its commit, that a manifest was made from, or None."""
    page = manifest.annotations.get(media_types.SOURCE, "")
    commit = manifest.annotations.get(media_types.REVISION, "")
    if not any(page.startswith(site.pages[0]) for site in SITES):
        return None
    try:
        found = HubReference.parse(f"{page}/tree/{commit}")
    except InvalidReferenceError:  # another tool wrote these
        return None
    return found if found is not None and found.is_commit else None
