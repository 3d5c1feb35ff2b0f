"""What a user may type to name a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.json_document import encode
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    AmbiguousError,
    IntegrityError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
)
from modelpack.store.index import IndexDocument
from modelpack.store.layout import LayoutStore
from modelpack.store.lookup import Entry, Names, models
from tests.contract.parts import small_model, write_model

A = Digest("sha256", "abcd" + "0" * 60)
B = Digest("sha256", "abcd" + "1" * 60)
C = Digest("sha256", "beef" + "2" * 60)
D = Digest("sha256", "0123456789ab" + "3" * 52)


def entry(
    digest: Digest,
    name: str | None = None,
    *,
    media_type: str | None = None,
    origin: str | None = None,
) -> Entry:
    annotations = {media_types.ORIGIN: origin} if origin else {}
    kind = media_type or media_types.OCI_MANIFEST
    descriptor = Descriptor(kind, digest, 100, annotations=annotations)
    try:
        return Entry(descriptor, name, Reference.parse(name) if name else None)
    except InvalidReferenceError:
        return Entry(descriptor, name)


ENTRIES = (
    entry(A, "docker.io/ai/x:latest"),
    entry(A, "docker.io/ai/x:v1"),
    entry(B, "registry.example.com:5000/team/model:Q4_K_M"),
    entry(B, "docker.io/ai/beef:latest"),  # looks like a prefix of C
    entry(B, "docker.io/ai/0123456789ab:latest"),  # looks like the short id of D
    entry(C, origin="docker.io/ai/pulled"),
    entry(D, "a+name--of_another.tool"),
)

FOUND = [
    ("x", A, True),
    ("  x  ", A, True),
    ("X:latest", A, True),
    ("ai/x", A, True),
    ("docker.io/ai/x", A, True),
    ("index.docker.io/ai/x:v1", A, True),
    ("x:v1", A, True),
    (f"x:v1@{A}", A, True),
    (f"x@{A}", A, False),
    (f"pulled@{C}", C, False),
    (f"beef@{B}", B, False),
    (f"registry.example.com:5000/team/model@{B}", B, False),
    (str(A), A, False),
    (A.encoded, A, False),
    (C.short, C, False),
    ("beef", B, True),  # a tag wins
    ("beef2", C, False),
    ("beef22222222222222", C, False),
    ("sha256:beef2", C, False),
    (D.short, B, True),  # a tag wins
    ("sha256:" + D.short, D, False),
    (D.encoded[:13], D, False),
    ("abcd0", A, False),
    ("registry.example.com:5000/team/model:Q4_K_M", B, True),
    ("a+name--of_another.tool", D, True),
]


@pytest.mark.parametrize(("text", "digest", "by_name"), FOUND)
def test_names_that_mean_a_model(text: str, digest: Digest, by_name: bool) -> None:
    match = Names(ENTRIES).find(text)
    assert (match.entry.digest, match.by_name) == (digest, by_name)


@pytest.mark.parametrize(
    "text",
    ["y", "x:v2", "bee", "abc", "ffff", "f" * 12, "f" * 64, "sha256:" + "f" * 64, "bee:latest"],
)
def test_names_that_mean_nothing(text: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        Names(ENTRIES).find(text)
    assert caught.value.exit_code == 3
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [f"anything@{C}", f"x@{B}", f"x@{C}", f"docker.io/other/x@{A}", f"example.com/ai/x@{A}",
     f"x@{D}", f"pulled@{A}"],
)  # fmt: skip
def test_a_digest_of_another_repository_is_not_found(text: str) -> None:
    with pytest.raises(NotFoundError, match="in the store has this digest") as caught:
        Names(ENTRIES).find(text)
    assert "pull" in str(caught.value.hint)


def test_a_missing_tag_is_answered_with_the_tags_there_are() -> None:
    with pytest.raises(NotFoundError) as caught:
        Names(ENTRIES).find("x:v2")
    assert "docker.io/ai/x:v1" in str(caught.value.hint)
    assert "docker.io/ai/x:v2" in str(caught.value)


def test_a_beginning_with_an_algorithm_is_of_this_algorithm() -> None:
    same = "ab" * 32
    entries = [entry(Digest(name, same)) for name in ("blake3", "sha256")]
    for one in entries:
        text = f"{one.digest.algorithm}:{same[:8]}"
        assert Names(entries).find(text).entry is one
        with pytest.raises(NotFoundError):
            Names([other for other in entries if other is not one]).find(text)
    with pytest.raises(AmbiguousError):
        Names(entries).find(same[:8])


@pytest.mark.parametrize("text", ["abcd", "sha256:abcd"])
def test_an_ambiguous_beginning_names_the_candidates(text: str) -> None:
    with pytest.raises(AmbiguousError) as caught:
        Names(ENTRIES).find(text)
    assert caught.value.candidates == (str(A), str(B))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("text", ["x", "x:v1", "docker.io/ai/x:v1"])
def test_a_tag_with_another_digest_is_an_integrity_error(text: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        Names(ENTRIES).find(f"{text}:latest@{C}" if ":" not in text else f"{text}@{C}")
    assert (caught.value.expected, caught.value.got) == (str(C), str(A))


@pytest.mark.parametrize("text", ["", "a//b", "-x", "x:.bad", "UPPER/a b"])
def test_what_is_no_name_at_all_is_said_to_be_none(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        Names(ENTRIES).find(text)


def test_the_environment_chooses_the_registry_of_what_is_typed(
    store: LayoutStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(b"weights")
    write_model(store, model, "registry.example.com/x:latest")
    with pytest.raises(NotFoundError):
        store.resolve("x")
    monkeypatch.setenv("DEFAULT_REGISTRY", "registry.example.com")
    assert store.resolve("registry.example.com/x").digest == model.digest


def test_models_are_listed_once_with_all_names_in_order() -> None:
    listed = models(ENTRIES)
    assert [model.digest for model in listed] == [D, B, A, C]
    assert [str(reference) for reference in listed[2].references] == [
        "docker.io/ai/x:latest",
        "docker.io/ai/x:v1",
    ]
    assert listed[0].names == ("a+name--of_another.tool",)
    assert listed[0].references == ()


def test_what_is_no_model_is_not_listed() -> None:
    signature = Entry(
        Descriptor(media_types.OCI_MANIFEST, A, 9, artifact_type="application/vnd.example.sig")
    )
    cncf = Entry(
        Descriptor(media_types.OCI_MANIFEST, B, 9, artifact_type=media_types.CNCF_MANIFEST)
    )
    index = entry(C, "docker.io/ai/all:latest", media_type=media_types.OCI_INDEX)
    assert [model.digest for model in models((signature, cncf, index))] == [B]
    assert Names((signature, cncf, index)).find(str(A)).entry is signature
    assert Names((signature, cncf, index)).find("all").entry is index


digests = st.integers(0, 2**256 - 1).map(lambda number: Digest("sha256", f"{number:064x}"))


@given(st.lists(digests, min_size=1, max_size=20, unique=True), st.data())
def test_every_unique_beginning_finds_its_model_and_no_other_does(
    present: list[Digest], data: st.DataObject
) -> None:
    entries = [entry(digest) for digest in present]
    digest = data.draw(st.sampled_from(present))
    length = data.draw(st.integers(4, 64))
    prefix = digest.encoded[:length]
    alike = [other for other in present if other.encoded.startswith(prefix)]
    if len(alike) == 1:
        assert Names(entries).find(prefix).entry.digest == digest
    else:
        with pytest.raises(AmbiguousError):
            Names(entries).find(prefix)


_NAMES = (
    "docker.io/ai/x:latest", "x", "ai/x:v1", "docker.io/x:latest", "index.docker.io/ai/x:latest",
    "registry.example.com:5000/team/model:Q4_K_M", "hf.co/a/b:c", "no name!", "abcd0000", "",
)  # fmt: skip
_TEXTS = (
    *_NAMES, str(A), A.encoded, A.encoded[:12], "abcd", "beef", f"x@{A}", f"ai/x@{B}", "dead", "y",
    "docker.io/ai/x", "X", f"registry.example.com:5000/team/model@{C}", "sha256:abcd", " x ",
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B, C, D]), st.sampled_from([*_NAMES, None])), max_size=6
    ),
    st.sampled_from(_TEXTS),
)
def test_an_index_finds_the_same_without_reading_every_entry(
    held: list[tuple[Digest, str | None]], text: str
) -> None:
    def outcome(document: IndexDocument) -> object:
        try:
            match = document.find(text)
        except ModelpackError as error:
            return type(error), str(error), error.hint
        return match

    elements = []
    for digest, name in held:
        annotations = {} if name is None else {media_types.REF_NAME: name}
        elements.append(Descriptor(media_types.OCI_MANIFEST, digest, 100, annotations).to_json())
    raw = encode({"schemaVersion": 2, "manifests": elements})
    lazy, whole = IndexDocument.parse(raw, "index"), IndexDocument.parse(raw, "index")
    assert len(whole.entries) == len(held)
    assert outcome(lazy) == outcome(whole)
    for digest in (A, B, C, D):
        lazy = IndexDocument.parse(raw, "index")
        assert lazy.entries_of(digest) == whole.entries_of(digest)
