"""Models that are stored in part: what they lack, and where the rest is."""

from __future__ import annotations

from modelpack.errors import PartialModelError
from modelpack.model import Model
from modelpack.reference import Reference
from modelpack.stores.layout import LayoutStore

_MAX_SHOWN = 5


def check_whole(store: LayoutStore, model: Model) -> None:
    """Raise `PartialModelError`, which says what is missing, if layers of the model were left out.

    Costs next to nothing for a model that was pulled or packaged as a whole.
    """
    missing = store.missing(model.descriptor)
    if not missing:
        return
    lines = [f"{blob.filepath or blob.digest.short} ({blob.size} bytes)" for blob in missing]
    if len(lines) > _MAX_SHOWN:
        lines = [*lines[:_MAX_SHOWN], f"and {len(lines) - _MAX_SHOWN} more"]
    where = completing_reference(store, model)
    raise PartialModelError(
        f"{model.reference or model.short_id} is stored in part: {len(missing)} of "
        f"{len(model.manifest.unique_blobs)} blobs are missing: {', '.join(lines)}",
        missing=tuple(str(blob.digest) for blob in missing),
        hint=f"`modelpack pull {where}` fetches the rest" if where else "pull it again",
    )


def completing_reference(store: LayoutStore, model: Model) -> Reference | None:
    """Return what to pull to have the rest of exactly this model, whatever its tag is by now."""
    places = store.get(str(model.digest)).places
    return Reference.parse(f"{places[0]}@{model.digest}") if places else None
