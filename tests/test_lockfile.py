"""Lock files: equal content gives equal bytes, and errors name the place."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.lockfile import MAX_BYTES, LockFile, lockable
from modelpack.artifacts.reference import Reference
from modelpack.errors import FormatError, InvalidReferenceError, NotFoundError, UnsupportedError

A, B = Digest.of(b"a"), Digest.of(b"b")
X, Y = Reference.parse("ai/x:v1"), Reference.parse("registry.example:5000/team/y:v2")

names = st.from_regex(
    r"[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,2}:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,8}", fullmatch=True
)


def test_the_text_is_as_documented() -> None:
    text = LockFile({Y: B, X: A}).encode().decode()
    assert text.endswith(
        f"""version = 1

[[model]]
reference = "docker.io/ai/x:v1"
digest = "{A}"

[[model]]
reference = "registry.example:5000/team/y:v2"
digest = "{B}"
"""
    )
    assert LockFile.parse(text.encode()) == LockFile({X: A, Y: B})


@given(st.dictionaries(names, st.binary(max_size=4), max_size=8))
def test_a_lock_is_read_as_it_was_written(content: dict[str, bytes]) -> None:
    lock = LockFile({Reference.parse(name): Digest.of(raw) for name, raw in content.items()})
    backwards = LockFile(dict(reversed(list(lock.digests.items()))))
    assert lock.encode() == backwards.encode()
    assert LockFile.parse(lock.encode()).digests == lock.digests


@given(st.binary(max_size=200))
def test_other_bytes_are_an_error_of_ours(raw: bytes) -> None:
    with suppress(FormatError):
        LockFile.parse(raw)


def model(reference: object = str(X), digest: object = str(A), more: str = "") -> str:
    return f'version = 1\n[[model]]\nreference = "{reference}"\ndigest = "{digest}"\n{more}\n'


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UnsupportedError, "version is None, expected 1"),
        ("version = 2", UnsupportedError, "version is 2"),
        ("version = true", UnsupportedError, "version is True"),
        ("<<<<<<< HEAD", FormatError, "is not TOML"),
        ("version = 1\nmodel = 3", FormatError, r"not an array of tables"),
        ("version = 1\nmodel = [3]", FormatError, r"model\[0\]: is not a table"),
        (model(reference="x"), FormatError, r"write 'docker.io/ai/x:latest'"),
        (model(reference=f"{X}@{A}"), FormatError, r"model\[0\]: .*digest already"),
        (model(reference="UPPER"), FormatError, r"model\[0\]"),
        (model(digest="sha256:12"), FormatError, r"model\[0\]"),
        (model(digest="md5:" + "1" * 32), FormatError, r"model\[0\]"),
        (model(more='extra = "x"'), FormatError, r"unknown keys: 'extra'"),
        ("version = 1\n[[model]]\ndigest = 3", FormatError, "both strings"),
        (model() + model().removeprefix("version = 1\n"), FormatError, r"duplicate reference"),
        ("#" * (MAX_BYTES + 1), FormatError, "more than the limit"),
        ("a=" + "[" * 5000, FormatError, "is not TOML"),
    ],
)
def test_what_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LockFile.parse(text.encode())


def test_looking_up() -> None:
    lock = LockFile({X: A})
    assert lock.digest_of(X) == A
    with pytest.raises(NotFoundError) as caught:
        lock.digest_of(Y)
    assert caught.value.hint == f"run `modelpack lock {Y}`"
    assert lock.with_digests({X: B, Y: A}).digests == {X: B, Y: A}
    assert lock.without([X]).digests == {}
    with pytest.raises(InvalidReferenceError):
        lockable(f"x@{A}")
