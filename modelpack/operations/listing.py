"""List: the models of a store with what their configs say."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack.digest import Digest
from modelpack.errors import ModelpackError
from modelpack.model import Model
from modelpack.operations.find import stored_model
from modelpack.reference import Reference, is_model_id
from modelpack.stores.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class Listed:
    """A stored model; `problem` says why `model` is None where it cannot be read."""

    digest: Digest
    references: tuple[Reference, ...]
    model: Model | None
    problem: str = ""


def list_models(store: LayoutStore, name: str | None = None) -> tuple[Listed, ...]:
    """Return the stored models; with `name`, those of that repository, tag or id.

    A model that cannot be read is listed with its problem rather than hiding the others.
    """
    listed = []
    for entry in store.models():
        references = entry.references
        if name is not None and not entry.digest.encoded.startswith(name.removeprefix("sha256:")):
            references = tuple(ref for ref in references if _matches(name, ref))
            if not references:
                continue
        try:
            model = stored_model(store, str(entry.digest))
        except ModelpackError as error:
            listed.append(Listed(entry.digest, references, None, str(error)))
        else:
            listed.append(Listed(entry.digest, references, model))
    return tuple(listed)


def _matches(name: str, reference: Reference) -> bool:
    """Whether `name` is the reference, or its repository when no tag was typed."""
    if is_model_id(name):
        return False
    wanted = Reference.parse(name)
    typed_tag = ":" in name.strip().rpartition("/")[2]
    return wanted.name == reference.name and (not typed_tag or wanted.tag == reference.tag)
