"""URL names and the repositories of the store."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelpack.artifacts.reference import Reference
from modelpack.errors import InvalidReferenceError
from modelpack.registry_server.content import Repository

COMPONENT = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", fullmatch=True)
NAMES = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join).filter(lambda n: len(n) < 200)
REGISTRIES = st.one_of(
    st.just("docker.io"),
    st.just("localhost"),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?(\.[a-z0-9]{1,4}){1,2}", fullmatch=True),
    st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,3})?:[1-9][0-9]{0,3}", fullmatch=True),
)


@pytest.mark.parametrize(
    ("name", "repository", "canonical"),
    [
        ("ai/smol", "docker.io/ai/smol", "ai/smol"),
        ("smol", "docker.io/ai/smol", "ai/smol"),
        ("docker.io/ai/smol", "docker.io/ai/smol", "ai/smol"),
        ("docker.io/smol", "docker.io/ai/smol", "ai/smol"),
        ("index.docker.io/x/y", "docker.io/x/y", "x/y"),
        ("ghcr.io/org/x", "ghcr.io/org/x", "ghcr.io/org/x"),
        ("ghcr.io/x", "ghcr.io/x", "ghcr.io/x"),
        ("hf.co/org/x", "huggingface.co/org/x", "huggingface.co/org/x"),
        ("localhost/x", "localhost/x", "localhost/x"),
        ("localhost", "docker.io/ai/localhost", "ai/localhost"),
        ("a.b", "docker.io/ai/a.b", "ai/a.b"),
        ("docker.io/foo.bar/x", "docker.io/foo.bar/x", "docker.io/foo.bar/x"),
        ("a/blobs/manifests", "docker.io/a/blobs/manifests", "a/blobs/manifests"),
        ("0123456789ab", "docker.io/ai/0123456789ab", "ai/0123456789ab"),
        ("0" * 64, "docker.io/ai/" + "0" * 64, "ai/" + "0" * 64),
    ],
)
def test_names(name: str, repository: str, canonical: str) -> None:
    parsed = Repository.parse(name)
    assert (str(parsed), parsed.name) == (repository, canonical)


@pytest.mark.parametrize(
    "name",
    ["", "A", "ai/Smol", "../etc", "a//b", "/a", "a/", "a/../b", "a:5000/b", "a b", "a_-b", "é",
     "-a", "a\n", "a\x00b", "x" * 256, "sha256:" + "0" * 64, "a_b.c/x"],
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidReferenceError):
        Repository.parse(name)


def test_the_environment_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGISTRY", "registry.example:5000")
    assert str(Repository.parse("ai/smol")) == "docker.io/ai/smol"


@given(NAMES)
@example("ai/smol")
@example("docker.io/a.b/c")
def test_a_canonical_name_stands_for_its_repository(name: str) -> None:
    try:
        repository = Repository.parse(name)
    except InvalidReferenceError:  # the first component is a host that cannot be one, like a_b.c
        first = name.partition("/")[0]
        assert "." in first
        assert "_" in first or "/" not in name
        return
    canonical = repository.name
    assert canonical is not None
    assert Repository.parse(canonical) == repository
    assert Repository.parse(canonical).name == canonical


@pytest.mark.long
@given(REGISTRIES, NAMES)
def test_two_repositories_never_share_a_name(registry: str, path: str) -> None:
    reference = Reference.parse(f"{registry}/{path}:v1", default_registry="docker.io")
    repository = Repository.of(reference)
    if repository.name is None:
        assert ":" in repository.registry
    else:
        assert Repository.parse(repository.name) == repository
        assert repository.tagged("v1") == reference


@given(NAMES)
def test_a_pushed_model_is_what_a_user_types(name: str) -> None:
    """`modelpack resolve NAME:v1` finds the manifest pushed as NAME:v1 in the same store."""
    try:
        repository = Repository.parse(name)
    except InvalidReferenceError:
        return
    assert repository.tagged("v1") == Reference.parse(f"{name}:v1", default_registry="docker.io")
