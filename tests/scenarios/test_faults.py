"""Faults of a registry, met by a whole pull: nothing wrong is ever published."""

from __future__ import annotations

import pytest

import modelpack
from modelpack.errors import (
    DigestMismatchError,
    IntegrityError,
    ModelpackError,
    RemoteUnavailableError,
    SizeMismatchError,
)
from tests.registry.faults import (
    answering,
    cut_after,
    flipped_bit,
    ignoring_range,
    redirecting,
    replaced,
    shifted_range,
    shortened,
    with_headers,
)
from tests.registry.faulty import FaultyRegistry
from tests.scenarios.published import Published

BLOBS = "/blobs/sha256:"


@pytest.mark.scenario(2)
def test_twenty_cuts(published: Published) -> None:
    for _ in range(20):
        published.registry.faults.add("GET", published.path, cut_after(7))
    assert published.pull() == published.manifest.digest
    published.check_whole()
    assert published.registry.count("GET", published.path) == 21


@pytest.mark.scenario(3)
def test_a_short_body(published: Published) -> None:
    published.registry.faults.add("GET", published.path, shortened(1), times=None)
    with pytest.raises(SizeMismatchError):
        published.pull()
    published.check_nothing_shows()


@pytest.mark.scenario(4)
def test_a_flipped_bit_once_is_fetched_again(published: Published) -> None:
    published.registry.faults.add("GET", published.path, flipped_bit(100))
    assert published.pull() == published.manifest.digest
    published.check_whole()


@pytest.mark.scenario(4)
def test_a_flipped_bit_always_is_an_error(published: Published) -> None:
    published.registry.faults.add("GET", published.path, flipped_bit(100), times=None)
    with pytest.raises(DigestMismatchError, match=str(published.weight.digest)):
        published.pull()
    published.check_nothing_shows()
    assert published.registry.count("GET", published.path) == 2
    assert not list(published.store.root.glob(f"ingest/**/*{published.weight.digest.encoded}*"))


@pytest.mark.scenario(5)
def test_a_server_that_ignores_ranges(published: Published) -> None:
    published.registry.faults.add("GET", published.path, cut_after(100))
    published.registry.faults.add("GET", published.path, ignoring_range)
    published.pull()
    published.check_whole()


@pytest.mark.scenario(6)
def test_a_range_that_starts_elsewhere(published: Published) -> None:
    published.registry.faults.add("GET", published.path, cut_after(100))
    published.registry.faults.add("GET", published.path, shifted_range(-8))
    published.pull()
    published.check_whole()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(replaced(b'{"schemaVersion":2}'), id="other-bytes"),
        pytest.param(
            with_headers(Docker_Content_Digest="sha256:" + "0" * 64),
            id="digest",
            marks=pytest.mark.scenario(8),
        ),
        pytest.param(
            with_headers(Content_Type="application/vnd.oci.image.index.v1+json"),
            id="type",
            marks=pytest.mark.scenario(9),
        ),
    ],
)
def test_a_manifest_that_lies_is_refused_before_any_blob(
    published: Published, fault: object
) -> None:
    published.registry.faults.add("GET", "/manifests/", fault, times=None)  # type: ignore[arg-type]
    reference = modelpack.Reference.parse(published.reference)
    with pytest.raises(ModelpackError) as caught:
        modelpack.pull(reference.with_digest(published.manifest.digest), store=published.store)
    assert isinstance(caught.value, IntegrityError | modelpack.errors.FormatError)
    assert published.registry.count("GET", BLOBS) == 0
    published.check_nothing_shows()


@pytest.mark.scenario(14)
def test_a_registry_that_is_down(published: Published) -> None:
    published.registry.faults.add("*", "/v2/", answering(503), times=None)
    with pytest.raises(RemoteUnavailableError) as caught:
        published.pull()
    assert caught.value.exit_code == 6
    published.check_nothing_shows()


@pytest.mark.scenario(16)
def test_blobs_that_lie_elsewhere(published: Published) -> None:
    with FaultyRegistry() as storage:
        content = published.registry.blob(published.weight.digest)
        assert content is not None
        storage.put_blob(content)
        published.registry.faults.add("GET", published.path, redirecting(storage), times=None)
        published.pull()
        published.check_whole()
        assert storage.count("GET") == 1
        assert all("authorization" not in request.headers for request in storage.requests)
