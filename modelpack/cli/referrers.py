"""`modelpack attach`, `referrers` and `detach`: add, list and delete referrers of models."""

from __future__ import annotations

from pathlib import Path

import click

from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.reference import Reference, begins_id
from modelpack.cli.help import command
from modelpack.cli.options import (
    UPLOAD,
    Settings,
    annotation_option,
    common_options,
    common_options_without,
    model_argument,
    remote_options,
    transfer_options,
)
from modelpack.cli.output import (
    full_reference,
    human_size,
    note,
    plural,
    show,
    shown_progress,
    table,
)
from modelpack.errors import UsageError
from modelpack.operations.lookup import is_stored_id
from modelpack.operations.referrers import DEFAULT_FILE_TYPE, AttachedFile
from modelpack.operations.referrers import attach as attach_files
from modelpack.operations.referrers import detach as detach_referrer
from modelpack.operations.referrers import referrers as list_referrers
from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack.trust.provenance import IN_TOTO_PREDICATE
from modelpack.trust.sigstore import PREDICATE_TYPE

LOCAL = click.option("--local", is_flag=True, help="Use the local store, not the registry.")


@command()
@model_argument("reference")
@click.argument("files", metavar="[FILE[:TYPE]]...", nargs=-1)
@click.option(
    "--artifact-type", metavar="T", required=True, help="Set the artifact type, a media type."
)
@annotation_option("referrer")
@LOCAL
@remote_options
@transfer_options(*UPLOAD)
@common_options
def attach(
    settings: Settings,
    reference: str,
    files: tuple[str, ...],
    artifact_type: str,
    annotations: dict[str, str],
    local: bool,
    remote: RemoteOptions,
) -> None:
    """Attach files, such as an SBOM or an evaluation, to a model; print the referrer's digest.

    The media type of a file may follow its name after a colon. The same files give the same digest.
    """
    where = subject_to_name(settings, reference)
    with shown_progress(settings) as progress:
        done = attach_files(
            where,
            [_file(text) for text in files],
            artifact_type=artifact_type,
            annotations=annotations,
            store=settings.existing_store() if local else None,
            remote=remote,
            progress=progress,
        )
    note(settings, f"attached {plural(len(files), 'file')} to {where}, {done.subject.digest}")
    value = {
        "reference": str(where),
        "subject": str(done.subject.digest),
        "digest": str(done.digest),
        "artifactType": artifact_type,
    }
    show(settings, value, str(done.digest))


@command()
@model_argument("reference")
@click.option("--artifact-type", metavar="T", help="List only referrers of this type.")
@LOCAL
@remote_options
@common_options_without("progress")
def referrers(
    settings: Settings,
    reference: str,
    artifact_type: str | None,
    local: bool,
    remote: RemoteOptions,
) -> None:
    """List the referrers of the model REFERENCE in its registry; of an id, those in the store."""
    where, store = named_subject(settings, reference, local=local)
    found = list_referrers(where, artifact_type=artifact_type, store=store, remote=remote)
    name = None if isinstance(where, str) else str(where)
    value = {"reference": name, "referrers": [one.to_json() for one in found]}
    rows = [
        (str(one.digest), one.artifact_type or "", human_size(one.size), _predicate(one))
        for one in found
    ]
    show(settings, value, table(("DIGEST", "ARTIFACT TYPE", "MANIFEST SIZE", "PREDICATE"), rows))


@command()
@click.argument("reference", metavar="REPOSITORY@DIGEST")
@LOCAL
@remote_options
@common_options_without("quiet", "progress")
def detach(settings: Settings, reference: str, local: bool, remote: RemoteOptions) -> None:
    """Delete a referrer of a model by its digest; print the digest."""
    where = Reference.parse(reference)
    store = settings.existing_store() if local else None
    digest = detach_referrer(where, store=store, remote=remote)
    show(settings, {"digest": str(digest)}, str(digest))


def _predicate(referrer: Descriptor) -> str:
    """Return the predicate type of an attached statement, "" for other referrers."""
    keys = (PREDICATE_TYPE, IN_TOTO_PREDICATE)
    return next(filter(None, map(referrer.annotations.get, keys)), "")


def named_subject(
    settings: Settings, typed: str, *, local: bool
) -> tuple[Reference | str, LayoutStore | None]:
    """Return the model that the user typed, and the store if the model is to be read there.

    The id of a stored model means that model, and is returned as it is.
    """
    store = settings.existing_store() if local or begins_id(typed) else None
    if store is not None and is_stored_id(store, typed):
        digest = str(store.resolve(typed).digest)
        if typed.strip() != digest:
            note(settings, f"{typed} is the stored model {digest}")
        return typed, store
    return full_reference(settings, typed), store if local else None


def subject_to_name(settings: Settings, typed: str) -> Reference:
    """Return the reference that the user typed; raise `UsageError` for the id of a stored model."""
    if begins_id(typed) and is_stored_id(settings.existing_store(), typed):
        raise UsageError(
            f"{typed}: an id does not name a registry",
            hint="type the name of the model, like REGISTRY/REPOSITORY:TAG",
        )
    return full_reference(settings, typed)


def _file(text: str) -> AttachedFile:
    """Return the file and its media type; do not split the name of an existing file."""
    path, colon, media_type = text.rpartition(":")
    if not colon or Path(text).exists() or "/" not in media_type:
        return AttachedFile(Path(text), DEFAULT_FILE_TYPE)
    return AttachedFile(Path(path), media_type)
