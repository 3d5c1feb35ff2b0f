"""Read the texts of a model that people look up: its chat template, licences and model card."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from modelpack.artifacts.model import Role, preferred_template
from modelpack.artifacts.reference import Reference
from modelpack.errors import NotFoundError
from modelpack.lint.checks import LintSubject, licences, templates
from modelpack.operations.lint import open_subject
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import Stop
from modelpack.store.layout import LayoutStore


class Document(StrEnum):
    """A text of a model; the value is its name in messages."""

    TEMPLATE = "chat template"
    LICENSE = "licence"
    CARD = "model card"


def read_document(
    name: str | Reference,
    document: Document,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> Mapping[str, str]:
    """Return a text of the model `name`, in the store or its registry, by the path of its file.

    A model has one chat template, that which runtimes use, and one card, but may have several
    licences. The path is empty for a template in a GGUF header, and for a licence that only the
    metadata name: its text is the SPDX identifier. Raises `NotFoundError` if the model has none.
    """
    with open_subject(
        str(name), store=store, remote=remote, from_registry=from_registry, stop=stop
    ) as (_, subject):
        found = _READERS[document](subject)
    if not found:
        raise NotFoundError(f"{name}: the model has no {document}")
    return found


def _template(subject: LintSubject) -> dict[str, str]:
    found = templates(subject)
    chosen = preferred_template([(file.role, file.path) for file in subject.files])
    if chosen is None:
        return found
    path = subject.files[chosen].path
    return {path: found[path]}


def _licences(subject: LintSubject) -> dict[str, str]:
    files = [file for file in subject.files if file.role is Role.LICENSE]
    if files:
        return {file.path: file.text() or "" for file in files}
    return {path: identifier for path, identifier in licences(subject).items() if identifier}


def _card(subject: LintSubject) -> dict[str, str]:
    readme = subject.file("readme.md")
    return {} if readme is None else {readme.path: readme.text() or ""}


_READERS = {
    Document.TEMPLATE: _template,
    Document.LICENSE: _licences,
    Document.CARD: _card,
}
