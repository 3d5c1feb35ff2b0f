"""One suite for all targets: the behaviour that pull, push and copy rely on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.manifest import Index
from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    IntegrityError,
    InterruptedTransferError,
    ModelpackError,
    NotFoundError,
    SizeMismatchError,
)
from modelpack.storage import Outcome, Source, Target
from tests.contract.parts import (
    BytesSource,
    Watcher,
    blob_of,
    content_of,
    small_model,
    write_blobs,
    write_model,
)
from tests.contract.targets import FACTORIES, Subject

# More than a buffer, and odd, so that the last chunk is small.
CONTENT = os.urandom(3 * 1024 * 1024 + 7)


@pytest.fixture(params=sorted(FACTORIES))
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    with FACTORIES[request.param](tmp_path) as made:
        yield made


@pytest.fixture
def target(subject: Subject) -> Target:
    return subject.target


def test_it_fulfils_the_protocols(target: Target) -> None:
    assert isinstance(target, Source)
    assert isinstance(target, Target)


# Blobs


@pytest.mark.parametrize("content", [b"", b"x", b"{}", CONTENT], ids=["empty", "x", "{}", "large"])
def test_a_blob_comes_back_as_it_was_written(target: Target, content: bytes) -> None:
    blob = blob_of(content)
    assert not target.has_blob(blob)

    outcome = target.write_blob(blob, BytesSource(content), Watcher().watch)

    assert outcome is Outcome.WRITTEN
    assert target.has_blob(blob)
    assert content_of(target, blob) == content


@pytest.mark.parametrize("offset", [0, 1, 1024 * 1024, len(CONTENT) - 1])
def test_a_blob_is_read_from_any_offset(target: Target, offset: int) -> None:
    blob = blob_of(CONTENT)
    target.write_blob(blob, BytesSource(CONTENT), Watcher().watch)
    assert content_of(target, blob, offset) == CONTENT[offset:]


def test_a_blob_can_be_opened_again_and_again(target: Target) -> None:
    blob = blob_of(b"weights")
    target.write_blob(blob, BytesSource(b"weights"), Watcher().watch)
    source = target.blob(blob)
    for offset in (0, 3, 0):
        with source.open(offset) as reader:
            buffer = memoryview(bytearray(16))
            assert bytes(buffer[: reader.readinto(buffer)]) == b"weights"[offset:]


def test_a_blob_that_exists_is_not_read_again(target: Target) -> None:
    blob, source = blob_of(b"weights"), BytesSource(b"weights")
    target.write_blob(blob, source, Watcher().watch)
    opened = len(source.offsets)

    assert target.write_blob(blob, source, Watcher().watch) is Outcome.EXISTED
    assert len(source.offsets) == opened


def test_a_missing_blob_is_not_found(target: Target) -> None:
    blob = blob_of(b"nowhere")
    assert not target.has_blob(blob)
    with pytest.raises(NotFoundError), target.blob(blob).open():
        pass


def test_a_blob_of_another_size_is_not_the_blob(target: Target) -> None:
    blob = blob_of(b"weights")
    target.write_blob(blob, BytesSource(b"weights"), Watcher().watch)
    assert not target.has_blob(replace(blob, size=blob.size + 1))


@pytest.mark.parametrize(
    ("content", "sent", "error"),
    [
        (b"weights", b"WEIGHTS", DigestMismatchError),
        (CONTENT, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), DigestMismatchError),
        (CONTENT, bytes([CONTENT[0] ^ 1]) + CONTENT[1:], DigestMismatchError),
        (b"weights", b"weight", SizeMismatchError),
        (b"weights", b"", SizeMismatchError),
        (CONTENT, CONTENT[:-1], SizeMismatchError),
        (CONTENT, CONTENT[: 1024 * 1024], SizeMismatchError),
        (b"weights", b"weightss", SizeMismatchError),
        (b"", b"x", SizeMismatchError),
        (CONTENT, CONTENT + b"x", SizeMismatchError),
    ],
    ids=[
        "other bytes",
        "last bit flipped",
        "first bit flipped",
        "short",
        "nothing",
        "short by one",
        "short by chunks",
        "long",
        "something instead of nothing",
        "long by one",
    ],
)
def test_wrong_bytes_are_refused_and_nothing_shows(
    target: Target, content: bytes, sent: bytes, error: type[ModelpackError]
) -> None:
    blob = blob_of(content)
    with pytest.raises(error) as caught:
        target.write_blob(blob, BytesSource(sent), Watcher().watch)
    assert caught.value.exit_code == 5
    assert not target.has_blob(blob)
    with pytest.raises(NotFoundError), target.blob(blob).open():
        pass


def test_the_right_bytes_are_taken_after_wrong_ones(target: Target) -> None:
    blob = blob_of(CONTENT)
    with pytest.raises(DigestMismatchError):
        target.write_blob(blob, BytesSource(bytes(len(CONTENT))), Watcher().watch)
    assert target.write_blob(blob, BytesSource(CONTENT), Watcher().watch) is Outcome.WRITTEN
    assert content_of(target, blob) == CONTENT


def test_progress_is_told_in_bytes_of_the_blob(target: Target) -> None:
    watcher, blob = Watcher(), blob_of(CONTENT)
    target.write_blob(blob, BytesSource(CONTENT), watcher.watch)
    of_blob = [r for r in watcher.reports if r.digest == blob.digest and r.total == blob.size]
    assert of_blob, "nothing was reported"
    assert of_blob[-1].finished
    counts = [report.completed for report in of_blob]
    assert counts == sorted(counts)


def test_a_stop_request_ends_a_write_and_nothing_shows(target: Target) -> None:
    watcher, blob = Watcher(), blob_of(CONTENT)
    watcher.stop.request()
    with pytest.raises(InterruptedTransferError):
        target.write_blob(blob, BytesSource(CONTENT), watcher.watch)
    assert not target.has_blob(blob)


def test_threads_that_write_one_blob_at_once_all_have_it(target: Target) -> None:
    blob = blob_of(CONTENT)
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(
            pool.map(
                lambda _: target.write_blob(blob, BytesSource(CONTENT), Watcher().watch), range(4)
            )
        )
    assert Outcome.WRITTEN in outcomes
    assert content_of(target, blob) == CONTENT


# Manifests


def test_a_model_comes_back_by_name_and_by_digest(subject: Subject) -> None:
    target, model = subject.target, small_model(b"weights", b"license")
    write_model(target, model, subject.name("v1"))

    for name in (subject.name("v1"), str(model.digest)):
        found = target.resolve(name)
        assert found.digest == model.digest
        assert found.size == len(model.manifest.raw)
        assert found.media_type == media_types.OCI_MANIFEST
        assert target.fetch_manifest(found) == model.manifest.raw


def test_an_untagged_model_comes_back_by_digest(subject: Subject) -> None:
    target, model = subject.target, small_model(b"weights")
    write_model(target, model)
    assert target.resolve(str(model.digest)).digest == model.digest
    with pytest.raises(NotFoundError):
        target.resolve(subject.name("v1"))


def test_unknown_names_are_not_found(subject: Subject) -> None:
    model = small_model(b"weights")
    for name in (subject.name("v1"), str(model.digest)):
        with pytest.raises(NotFoundError):
            subject.target.resolve(name)
    with pytest.raises(NotFoundError):
        subject.target.fetch_manifest(model.descriptor)


def test_a_tag_moves(subject: Subject) -> None:
    target, old, new = subject.target, small_model(b"old"), small_model(b"new")
    write_model(target, old, subject.name("v1"))
    write_model(target, old, subject.name("old"))
    write_model(target, new, subject.name("v1"))

    assert target.resolve(subject.name("v1")).digest == new.digest
    assert target.resolve(subject.name("old")).digest == old.digest
    assert target.resolve(str(old.digest)).digest == old.digest
    assert target.fetch_manifest(old.descriptor) == old.manifest.raw


def test_writing_a_manifest_again_changes_nothing(subject: Subject) -> None:
    target, model = subject.target, small_model(b"weights")
    write_model(target, model, subject.name("v1"))
    target.write_manifest(model.descriptor, model.manifest.raw, subject.name("v1"))
    target.write_manifest(model.descriptor, model.manifest.raw, subject.name("v2"))
    target.write_manifest(model.descriptor, model.manifest.raw)
    for tag in ("v1", "v2"):
        assert target.resolve(subject.name(tag)).digest == model.digest


def test_models_share_blobs(subject: Subject) -> None:
    target = subject.target
    first, second = small_model(b"shared", b"one"), small_model(b"shared", b"two")
    write_model(target, first, subject.name("first"))
    write_model(target, second, subject.name("second"))
    for model in (first, second):
        for blob in model.manifest.blobs:
            assert content_of(target, blob) == model.contents[blob.digest]


@pytest.mark.parametrize("missing", [0, 1, 2], ids=["first layer", "second layer", "config"])
def test_a_manifest_without_its_blobs_is_refused(subject: Subject, missing: int) -> None:
    target, model = subject.target, small_model(b"weights", b"license")
    for number, blob in enumerate(model.manifest.blobs):
        if number != missing:
            content = model.contents[blob.digest]
            target.write_blob(blob, BytesSource(content), Watcher().watch)
    with pytest.raises(NotFoundError):
        target.write_manifest(model.descriptor, model.manifest.raw, subject.name("v1"))
    for name in (subject.name("v1"), str(model.digest)):
        with pytest.raises(NotFoundError):
            target.resolve(name)


def test_a_manifest_that_is_not_its_descriptor_is_refused(subject: Subject) -> None:
    target, model, other = subject.target, small_model(b"weights"), small_model(b"others!")
    write_blobs(target, model)
    write_blobs(target, other)
    raw = model.manifest.raw
    assert len(other.manifest.raw) == len(raw)
    for descriptor in (other.descriptor, replace(model.descriptor, size=len(raw) + 1)):
        with pytest.raises(IntegrityError):
            target.write_manifest(descriptor, raw, subject.name("v1"))
    with pytest.raises(NotFoundError):
        target.resolve(subject.name("v1"))


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"not JSON", b'{"schemaVersion":1}'])
def test_a_manifest_that_does_not_parse_is_refused(subject: Subject, raw: bytes) -> None:
    descriptor = Descriptor(media_types.OCI_MANIFEST, Digest.of(raw), len(raw))
    with pytest.raises(FormatError):
        subject.target.write_manifest(descriptor, raw, subject.name("v1"))
    with pytest.raises(NotFoundError):
        subject.target.resolve(subject.name("v1"))


def test_a_manifest_of_the_wrong_size_is_not_handed_out(subject: Subject) -> None:
    model = small_model(b"weights")
    write_model(subject.target, model, subject.name("v1"))
    with pytest.raises(IntegrityError):
        subject.target.fetch_manifest(replace(model.descriptor, size=model.descriptor.size + 1))


def test_an_index_of_models_comes_back(subject: Subject) -> None:
    target, models = subject.target, [small_model(b"one"), small_model(b"two")]
    for model in models:
        write_model(target, model)
    raw = encode(
        {
            "schemaVersion": 2,
            "mediaType": media_types.OCI_INDEX,
            "manifests": [model.descriptor.to_json() for model in models],
        }
    )
    index = Index.parse(raw)
    target.write_manifest(index.descriptor, raw, subject.name("all"))

    found = target.resolve(subject.name("all"))
    assert found.digest == index.digest
    assert found.media_type == media_types.OCI_INDEX
    assert Index.parse(target.fetch_manifest(found)) == index
