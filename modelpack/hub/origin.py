"""Where on the hub a stored model is from: annotations of its manifest, for people and for us."""

from __future__ import annotations

from typing import Final

from modelpack import mediatypes
from modelpack.errors import InvalidReferenceError
from modelpack.hub.reference import HubReference
from modelpack.manifest import Manifest

_HUB: Final = "https://huggingface.co/"


def origin_annotations(reference: HubReference) -> dict[str, str]:
    """Return the page and the commit of a model, as image-spec's annotations.

    The page is the hub's own, whatever mirror was asked: the same commit is the same model.
    """
    return {
        mediatypes.SOURCE: f"{_HUB}{reference.repository}",
        mediatypes.REVISION: reference.revision,
    }


def hub_origin(manifest: Manifest) -> HubReference | None:
    """Return where on the hub a model is from, at its commit; None if it is not."""
    page = manifest.annotations.get(mediatypes.SOURCE, "")
    commit = manifest.annotations.get(mediatypes.REVISION, "")
    if not page.startswith(_HUB):
        return None
    try:
        found = HubReference.parse(f"hf.co/{page.removeprefix(_HUB)}@{commit}")
    except InvalidReferenceError:  # somebody else wrote these
        return None
    return found if found is not None and found.is_commit else None
